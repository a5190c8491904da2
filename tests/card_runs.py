"""A run that a card can be made of: bundles with real files, marked as scored."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import yaml
from report_runs import make_run, write_json

from edgeft import run as runs
from edgeft.report.build import Report
from edgeft.report.figures import ratio_interval

MODEL, TASK = "HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct-wordmath"
ARTIFACTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "gguf-f16": ("llama.cpp", ("model.gguf",)),
    "gguf-q8_0": ("llama.cpp", ("model.gguf",)),
    "gguf-q4_k_m-imatrix": ("llama.cpp", ("model.gguf",)),
    "gguf-q4_0+lora": ("llama.cpp", ("model/adapter.gguf", "model/model.gguf")),
    "onnx-int4": ("onnxruntime-genai", ("model/genai_config.json", "model/model.onnx")),
    "onnx-portable-int8": ("onnxruntime", ("model/model.onnx",)),
}


def export(run: Path, target: str, files: dict[str, bytes] | None = None, **more: Any) -> None:
    """A tuned bundle with real files, and the mark that it is what was scored on every device."""
    bundle = run / "export" / target / "tuned"
    runtime, names = ARTIFACTS[target]
    for name, content in (files or {name: f"{target}/{name}".encode() for name in names}).items():
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).write_bytes(content)
    listed = {
        str(path.relative_to(bundle)): {"bytes": path.stat().st_size, "sha256": runs.sha256(path)}
        for path in bundle.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    manifest = {
        "runtime": runtime,
        "target": target,
        "artifact": "model.gguf" if names == ("model.gguf",) else "model",
        "files": listed,
        "verify": {"tokenizer_prompts": 240, "chat_template": True, "positions": 0},
        "context": 600,
        "max_new_tokens": 96,
        "stop": [2, 7],
        **more,
    }
    write_json(bundle / "manifest.json", manifest)
    for stage in run.glob(f"bench/*/{target}/tuned/stage.json"):
        mark = {"fingerprint": "x", "manifest": runs.sha256(bundle / "manifest.json")}
        write_json(stage, mark)


def bench(run: Path, target: str, like: str) -> None:
    shutil.copytree(run / "bench/local" / like, run / "bench/local" / target)


def set_recipe(run: Path, **changes: Any) -> None:
    path = run / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    for key, value in changes.items():
        recipe[key] = {**(recipe.get(key) or {}), **value} if isinstance(value, dict) else value
    path.write_text(yaml.safe_dump(recipe))


def make_card_run(folder: Path) -> Path:
    """A run of a hub model with every kind of artifact."""
    make_run(folder, ["gguf-f16", "gguf-q8_0", "gguf-q4_0"])
    (folder / "bench/local/gguf-q4_0").rename(folder / "bench/local/gguf-q4_k_m-imatrix")
    shutil.rmtree(folder / "export/gguf-q4_0")
    for target in ("gguf-q4_0+lora", "onnx-int4", "onnx-portable-int8"):
        bench(folder, target, like="gguf-q8_0")
    for target in ARTIFACTS:
        export(folder, target)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / "data" / "tokenizer").mkdir(parents=True, exist_ok=True)
        (folder / "data" / "tokenizer" / name).write_text("{}")
    set_recipe(folder, model=MODEL)
    return folder


def text_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


def head_of(folder: Path) -> dict[str, Any]:
    from huggingface_hub import metadata_load

    found: dict[str, Any] = metadata_load(folder / "README.md")
    return found


def blocks(text: str, language: str) -> list[str]:
    found = re.findall(rf"^(`{{3,}}){language}\n(.*?)\n\1$", text, re.S | re.M)
    return [block for _, block in found]


def row_of(text: str, name: str) -> list[str]:
    row = next(line for line in text.splitlines() if line.startswith(f"| {name} | "))
    return [cell.strip() for cell in row.strip("|").split("|")]


def scores(report: Report, target: str) -> list[str]:
    """What the table says of a target, written out here independently."""
    [v] = [v for v in report.variants if v.target == target]
    s = v.survival
    assert s.retention is not None and s.retention_ci is not None and v.bytes and v.latency
    return [
        *("local", f"{v.bytes / 1e6:.1f} MB"),
        *(f"{100 * s.here.base.accuracy:.1f}%", f"{100 * s.here.tuned.accuracy:.1f}%"),
        f"{s.retention:.2f} ({ratio_interval(s.retention_ci)})",
        *(f"{v.latency['decode_tok_s']:.1f}", s.verdict),
    ]
