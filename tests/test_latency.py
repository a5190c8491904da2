"""Latency in depth: weights read a token, the memory's limit, llama-bench's own fields."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_runs import make_run, write_json

from edgeft import bench, child
from edgeft.bench.bandwidth import read_bandwidth
from edgeft.bench.job import Job
from edgeft.bench.latency import forget
from edgeft.exporters.weights import bytes_per_token
from edgeft.report import llama_bench, tables
from edgeft.report.build import build


@pytest.fixture
def job(embedded_gguf: Path, tmp_path: Path) -> Job:
    """Timing opens the artifact and nothing else."""
    return Job(
        runtime="llama.cpp",
        artifact=embedded_gguf,
        evaluation=tmp_path,
        tokenizer=tmp_path,
        task="wordmath",
        max_new_tokens=1,
        stop=[2],
        context=8,
        threads=1,
        bytes_per_token=bytes_per_token(embedded_gguf),
    )


@pytest.mark.slow
def test_depths_and_the_memorys_limit(job: Job, tmp_path: Path) -> None:
    bench.latency(job, tmp_path, prompt_tokens=16, new_tokens=8, repetitions=2, depths=[16, 300])
    facts = json.loads((tmp_path / "latency.json").read_text())
    assert list(facts["decode_tok_s_by_depth"]) == ["16", "300"]
    assert 0 < facts["token_ms_p50"] <= facts["token_ms_p95"]
    assert facts["load_cold_s"] > 0 and facts["load_s"] > 0
    assert 90 < facts["steady_rss_mb"] <= facts["peak_rss_mb"] + 1
    assert len(facts["prefill_s"]) == len(facts["decode_s"]) == 2
    speed = facts["bytes_per_token"] * facts["decode_tok_s"] / 1e9
    assert facts["bandwidth_share"] == pytest.approx(
        speed / facts["memory_bandwidth_gb_s"], rel=0.05
    )
    assert 0 < facts["bandwidth_share"] < 1.1


@pytest.mark.slow
def test_without_depths_the_bandwidth_is_not_measured(job: Job, tmp_path: Path) -> None:
    bench.latency(job, tmp_path, prompt_tokens=8, new_tokens=4, repetitions=1)
    facts = json.loads((tmp_path / "latency.json").read_text())
    assert not {"decode_tok_s_by_depth", "memory_bandwidth_gb_s"} & facts.keys()


def test_memory_is_read_at_the_speed_of_memory() -> None:
    assert 1 < read_bandwidth(1) < 500


def test_forgetting_a_file_leaves_it_whole(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"x" * 100_000)
    forget(tmp_path / "model")
    assert (tmp_path / "model" / "weights").read_bytes() == b"x" * 100_000


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_is_read_whole_only_where_it_is_the_output(
    make_model: Callable[..., Path], tmp_path: Path, tied: bool
) -> None:
    from gguf import GGUFReader

    folder = make_model("Llama", tie_word_embeddings=tied)
    out = tmp_path / "model.gguf"
    request = {"folder": str(folder), "name": "x", "llama_cpp": None, "out": str(out)}
    child.run("edgeft.exporters.gguf", request)
    sizes = {t.name: int(t.n_bytes) for t in GGUFReader(out).tensors}
    assert ("output.weight" in sizes) == (not tied)
    skipped = 0 if tied else sizes["token_embd.weight"]
    assert bytes_per_token(out) == sum(sizes.values()) - skipped


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_the_same_of_an_onnx_graph(
    make_model: Callable[..., Path], tmp_path: Path, tied: bool
) -> None:
    from edgeft.exporters import onnx

    folder = make_model("Llama", tie_word_embeddings=tied)
    onnx.export(folder, tmp_path / "model", onnx.settings_of("x", {"precision": "fp32"}), [2])
    weights = (folder / "model.safetensors").stat().st_size
    table = 4 * 49152 * 64
    assert bytes_per_token(tmp_path / "model") == pytest.approx(
        weights - (0 if tied else table), rel=0.05
    )


FIELDS = """build_commit build_number cpu_info gpu_info backends model_filename model_type model_size
model_n_params n_batch n_ubatch n_threads cpu_mask cpu_strict poll type_k type_v n_gpu_layers
n_cpu_moe split_mode main_gpu no_kv_offload flash_attn devices tensor_split tensor_buft_overrides
embeddings no_op_offload n_prompt n_gen n_depth test_time avg_ns stddev_ns avg_ts stddev_ts
samples_ns samples_ts"""


def test_rows_in_llama_benchs_fields(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ["gguf-q8_0"])
    assert llama_bench.rows(build(run)) == []  # timed by an earlier edgeft, without samples
    path = run / "bench/local/gguf-q8_0/tuned/latency.json"
    timed: dict[str, Any] = json.loads(path.read_text())
    write_json(path, {**timed, "prefill_s": [0.2, 0.25], "decode_s": [0.63, 0.7]})
    llama_bench.write(run, tmp_path / "rows.json")
    prefill, decode = json.loads((tmp_path / "rows.json").read_text())
    assert set(prefill) == set(decode) == set(FIELDS.split())
    assert (prefill["n_prompt"], prefill["n_gen"], prefill["n_depth"]) == (128, 0, 0)
    assert (decode["n_prompt"], decode["n_gen"], decode["n_depth"]) == (0, 63, 128)
    assert decode["samples_ts"] == pytest.approx([100, 90])
    assert decode["avg_ts"] == pytest.approx(95) and decode["stddev_ts"] == pytest.approx(
        7.0711, rel=1e-4
    )
    assert prefill["avg_ns"] == 225_000_000


def test_the_table_close_to_the_limit(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ["gguf-q8_0", "gguf-q4_0"])
    path = run / "bench/local/gguf-q8_0/tuned/latency.json"
    deep = {
        "load_cold_s": 0.9,
        "token_ms_p50": 8.0,
        "token_ms_p95": 9.5,
        "decode_tok_s_by_depth": {"128": 125.0, "1024": 98.2},
        "steady_rss_mb": 280.0,
        "bytes_per_token": 144_000_000,
        "bandwidth_share": 0.72,
    }
    write_json(path, {**json.loads(path.read_text()), **deep})
    [table] = [t for t in tables.tables(build(run)) if t.title == "Close to the limit"]
    [row] = table.rows
    assert row == [
        *("gguf-q8_0", "0.90", "0.41", "8.00, 9.50", "125.0", "98.2"),
        *("280", "144.0 MB", "72%"),
    ]
