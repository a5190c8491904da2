"""ONNX through onnxruntime-genai: the graph is the model, the runtime scores as one at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shapes import LLAMA3

from edgeft import prompts
from edgeft.errors import UserError
from edgeft.exporters import onnx, verify
from edgeft.runtimes import common_prefix, onnxruntime_genai, open_session
from edgeft.tasks import Question

# Of different lengths, so that a batch of them is padded.
QUESTIONS = [
    Question(str(i), f"Tom has {i} apples" + " and buys more" * (i % 5) + ".", f"{i}", str(i))
    for i in range(1, 13)
]
NEW = 12
FAMILIES: list[tuple[str, str, dict[str, Any]]] = [
    ("Llama", "smollm", {}),
    (
        "Llama",
        "llama-bpe",
        {
            "tie_word_embeddings": False,
            "rope_parameters": LLAMA3,
        },
    ),
    ("Qwen2", "qwen2", {}),
    ("Qwen3", "qwen2", {"head_dim": 32}),
    (
        "Gemma3",
        "smollm",
        {
            "head_dim": 16,
            "num_hidden_layers": 7,  # the sixth attends globally, the others in a window
            "sliding_window": 16,
            "query_pre_attn_scalar": 16,
        },
    ),
]
# Of the easy ones the first is enough for every edit.
SOME_SLOW = [
    family if i in (0, len(FAMILIES) - 1) else pytest.param(*family, marks=pytest.mark.slow)
    for i, family in enumerate(FAMILIES)
]


def encode(folder: Path, out: Path) -> Path:
    out.mkdir(exist_ok=True)
    prompts.encode(folder, {"evaluation": QUESTIONS}, out)
    return out / "evaluation.jsonl"


@pytest.fixture(scope="module")
def exported(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny Llama in every precision."""
    out = tmp_path_factory.mktemp("onnx")
    for precision in onnx.PRECISIONS:
        onnx.export(tiny, out / precision, onnx.OnnxSettings(precision), [2])
    return {precision: out / precision for precision in onnx.PRECISIONS}


@pytest.fixture(scope="module")
def evaluation(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode(tiny, tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def items(evaluation: Path) -> list[prompts.Item]:
    return prompts.read_items(evaluation)


@pytest.fixture(scope="module")
def sessions(exported: dict[str, Path]) -> Iterator[dict[int, Any]]:
    """By the number of sequences in a batch."""
    opened = {
        parallel: open_session(
            "onnxruntime-genai", exported["fp32"], threads=1, context=200, parallel=parallel
        )
        for parallel in (1, 4, 32)
    }
    yield opened
    for session in opened.values():
        session.close()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "pre", "config"), SOME_SLOW)
def test_fp32_is_the_host(
    family: str, pre: str, config: dict[str, Any], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_model(family, pre=pre, **config)
    onnx.check_supported(folder)
    onnx.export(folder, tmp_path / "model", onnx.OnnxSettings(), [2])
    evaluation = encode(folder, tmp_path / "data")
    done = verify.verify("onnxruntime-genai", tmp_path / "model", folder, evaluation, exact=True)
    assert done.positions > 100
    assert done.top1_agreement == 1.0
    assert done.max_logit_diff < 2e-3
    assert abs(done.mean_kl) < 1e-6
    assert done.chat_template is True


@pytest.mark.slow
def test_fewer_bits_diverge_more(exported: dict[str, Path], tiny: Path, evaluation: Path) -> None:
    kl = {}
    for precision, folder in exported.items():
        exact = precision == "fp32"
        found = verify.verify("onnxruntime-genai", folder, tiny, evaluation, exact=exact)
        assert found.tokenizer_prompts == len(QUESTIONS)
        kl[precision] = found.mean_kl
    assert kl["fp32"] < 0.1 * kl["int8"] < 0.1 * kl["int4"]
    bytes_ = {p: (exported[p] / "model.onnx.data").stat().st_size for p in ("int8", "int4")}
    assert bytes_["int4"] < 0.5 * bytes_["int8"]


@pytest.mark.slow
def test_another_models_weights_are_found(
    exported: dict[str, Path], make_model: Callable[..., Path], evaluation: Path
) -> None:
    other = make_model("Llama", seed=5)
    with pytest.raises(UserError, match="weights were not written right"):
        verify.verify("onnxruntime-genai", exported["fp32"], other, evaluation, exact=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("eos", "said"),
    [
        (0, r"does not end an answer at '<\|im_end\|>' \(token 2\), where solutions end"),
        ([2, 33], r"ends an answer at '1' \(token 33\), which stands within solutions"),
    ],
)
def test_a_wrong_eos_is_found(
    eos: Any, said: str, exported: dict[str, Path], tiny: Path, evaluation: Path, tmp_path: Path
) -> None:
    """DESIGN's trap 5: the builder copies one that is wrong."""
    folder = shutil.copytree(exported["int4"], tmp_path / "model")
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = eos
    (folder / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        verify.verify("onnxruntime-genai", folder, tiny, evaluation, exact=False)


@pytest.mark.slow
def test_the_eos_is_the_given_one(exported: dict[str, Path], tiny: Path, tmp_path: Path) -> None:
    onnx.export(tiny, tmp_path / "model", onnx.OnnxSettings(), [0, 2])
    config = json.loads((tmp_path / "model" / "genai_config.json").read_text())
    assert config["model"]["eos_token_id"] == [0, 2]
    assert config["search"]["do_sample"] is False


def answers(session: Any, ids: list[list[int]], stop: set[int]) -> list[tuple[list[int], str]]:
    done = sorted(session.generate(ids, NEW, stop), key=lambda one: one.index)
    assert [one.index for one in done] == list(range(len(ids)))
    return [(one.tokens, one.finish) for one in done]


@pytest.mark.slow
def test_a_batch_answers_as_one_at_a_time_and_as_the_host(
    sessions: dict[int, Any], items: list[prompts.Item], tiny: Path
) -> None:
    ids = [item.prompt for item in items]
    assert len({len(prompt) for prompt in ids}) > 3
    alone = answers(sessions[1], ids, {2})
    assert answers(sessions[4], ids, {2}) == alone
    assert answers(sessions[32], ids, {2}) == alone
    host = open_session("transformers", tiny, threads=1, context=200, parallel=4)
    assert answers(host, ids, {2}) == alone
    host.close()


@pytest.mark.slow
def test_a_sliding_window_answers_as_the_host(
    make_model: Callable[..., Path], items: list[prompts.Item], tmp_path: Path
) -> None:
    family, pre, config = FAMILIES[-1]
    folder = make_model(family, pre=pre, **config)
    onnx.export(folder, tmp_path / "model", onnx.OnnxSettings(), [2])
    ids = [item.prompt for item in items]
    got = []
    for runtime, artifact in (("onnxruntime-genai", tmp_path / "model"), ("transformers", folder)):
        session = open_session(runtime, artifact, threads=1, context=200, parallel=8)
        got.append(answers(session, ids, {2}))
        session.close()
    assert got[0] == got[1]


@pytest.mark.slow
def test_a_prompt_that_ends_in_the_padding(
    sessions: dict[int, Any], items: list[prompts.Item]
) -> None:
    """Its last token is text: GenAI alone would take it for padding and answer the one before."""
    pad = 2
    ids = [[*item.prompt, pad] for item in items[:3]] + [items[3].prompt]
    assert answers(sessions[4], ids, {2}) == answers(sessions[1], ids, {2})
    host_order = [answers(sessions[1], [prompt], {2})[0] for prompt in ids]
    assert answers(sessions[4], ids, {2}) == host_order
    [first] = sessions[1].score([(ids[0], [77])])
    logits = next(iter(sessions[1].logits([ids[0], ids[1]])))[-1].astype(np.float64)
    assert first == pytest.approx(logits[77] - np.log(np.exp(logits).sum()), abs=1e-4)


def test_score_is_the_sum_over_full_logits(
    sessions: dict[int, Any], items: list[prompts.Item], tiny: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    pairs = [(item.prompt, item.gold * (1 + i % 3)) for i, item in enumerate(items)]
    got = list(sessions[32].score(pairs))
    assert got == pytest.approx(list(sessions[1].score(pairs)), rel=1e-5)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    for (prompt, gold), value in zip(pairs[:4], got, strict=False):
        with torch.inference_mode():
            logs = model(torch.tensor([[*prompt, *gold]])).logits[0].log_softmax(-1)
        rows = logs[len(prompt) - 1 : -1]
        expected = rows[torch.arange(len(gold)), torch.tensor(gold)].sum().item()
        assert value == pytest.approx(expected, rel=1e-4)
    empty = sessions[4].score([(items[0].prompt, [42]), (items[1].prompt, [])])
    assert list(empty)[1] == 0


def test_logits_stand_behind_the_common_prefix(
    sessions: dict[int, Any], items: list[prompts.Item]
) -> None:
    ids = [item.prompt for item in items]
    shared = common_prefix(ids)
    assert shared > 10
    assert [len(rows) for rows in sessions[4].logits(ids)] == [len(p) - shared for p in ids]


def test_logits_of_the_last_tokens(sessions: dict[int, Any], items: list[prompts.Item]) -> None:
    ids, last = [items[0].prompt] * 2 + [items[1].prompt], [3, 9, 1]
    whole = [next(iter(sessions[1].logits([p, [p[0] + 1]]))) for p in ids]
    for rows, n, all_rows in zip(sessions[4].logits(ids, last), last, whole, strict=True):
        assert np.abs(rows - all_rows[-n:]).max() < 1e-3
        assert len(rows) == n


def test_one_stream_is_timed_token_by_token(sessions: dict[int, Any]) -> None:
    timing = sessions[1].time(16, 5)
    assert len(timing.token_s) == 4
    assert timing.ttft_s > 0 and min(timing.token_s) > 0


def test_what_does_not_fit_is_refused(sessions: dict[int, Any]) -> None:
    with pytest.raises(UserError, match="the context holds 200"):
        list(sessions[1].generate([[5] * 195], NEW, {2}))


@pytest.mark.slow
def test_a_damaged_folder_is_one_line(exported: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no genai_config.json"):
        onnxruntime_genai.open_session(tmp_path, threads=1, context=8, parallel=1)
    for path in exported["fp32"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="does not open in onnxruntime-genai: .*; export it again"):
        onnxruntime_genai.open_session(tmp_path, threads=1, context=8, parallel=1)


def test_wrong_settings_and_architectures_are_one_line(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="target mine: unknown key 'onnx.block'.*block_size"):
        onnx.settings_of("mine", {"block": 32})
    with pytest.raises(UserError, match=r"target mine: onnx.algorithm: unknown 'k-quant'.*k_quant"):
        onnx.settings_of("mine", {"precision": "int4", "algorithm": "k-quant"})
    config = json.loads((tiny / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "architectures": ["GPT2LMHeadModel"]})
    )
    with pytest.raises(UserError, match="cannot export GPT2LMHeadModel to ONNX .*Llama"):
        onnx.check_supported(tmp_path)


@pytest.mark.slow
def test_a_builders_failure_is_its_one_line(tiny: Path, tmp_path: Path) -> None:
    settings = onnx.OnnxSettings("int4", block_size=17)
    with pytest.raises(UserError, match="the ONNX model builder failed on .*: ") as caught:
        onnx.export(tiny, tmp_path / "model", settings, [2])
    assert "\n" not in str(caught.value)
