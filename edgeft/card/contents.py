"""What goes into a model card's folder: which files under which names, and what the model is."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeft import model, tasks
from edgeft import run as runs
from edgeft.check import named
from edgeft.errors import UserError, near
from edgeft.report.build import Report, _verdict
from edgeft.report.ship import Limits, choices
from edgeft.report.variant import Variant

Facts = dict[str, Any]

# The embedded models by what they are on the hub: id and license.
_EMBEDDED = {"smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}
# Tasks whose questions anybody may see, so that one can stand in the card.
_PUBLIC = ("wordmath", "gsm8k", "orca-math", "svamp", "gsm-symbolic")
_LEAST_CONTEXT = 512  # tokens, room for questions longer than those scored
_QUANTIZATION = re.compile(r"(i?q\d\w*|tq\d\w*|mxfp4\w*|b?f16|f32)(?=-|$)")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Source:
    """Where the questions are from.

    Attributes:
        name: for people.
        hub: the data set's id on the hub; None: it is not from there.
        config: its configuration there.
        split: the data set's own, or ``evaluation``.
    """

    name: str
    hub: str | None = None
    config: str | None = None
    split: str = "evaluation"


@dataclass(frozen=True)
class About:
    """The model, apart from figures.

    Attributes:
        name: the card's title.
        repo_id: where it will be on the hub; None: not said.
        model: the base's name for people, never a path.
        base: the base's id on the hub; None: it is a local one.
        license: the base's where it is known.
        gguf: the file that the base was dequantized from; None: it was not.
        trained: whether this run trained on these questions; an adapter from elsewhere did not.
        chat: whether prompts are made by the model's chat template.
        question: an example, or a placeholder.
    """

    name: str
    repo_id: str | None
    model: str
    base: str | None
    license: str | None
    gguf: str | None
    task: str
    source: Source
    trained: bool
    chat: bool
    question: str


@dataclass(frozen=True)
class Shipped:
    """One target's files.

    Attributes:
        place: the file or folder in the card's folder.
        files: where each file is now, by its name in the card's folder.
        sha256: of the artifact's files, by the same names.
        context: tokens, prompt and answer, a power of two that the scored questions fit into.
        max_new_tokens: that an answer may take.
        stop: ids that end an answer.
    """

    target: str
    runtime: str
    place: str
    files: dict[str, Path]
    sha256: dict[str, str]
    context: int
    max_new_tokens: int
    stop: list[int]

    @property
    def adapter(self) -> str | None:
        """The adapter beside the base, if it is not merged."""
        path = f"{self.place}/adapter.gguf"
        return path if path in self.files else None


def check_repo_id(repo_id: str | None) -> str | None:
    """``repo_id``, if the hub takes such a name.

    Raises:
        UserError: it does not.
    """
    wrong = repo_id is not None and (
        not _ID.fullmatch(repo_id) or "--" in repo_id or ".." in repo_id or len(repo_id) > 96
    )
    if wrong:
        raise UserError(f"--repo-id takes ORG/NAME, such as ann/smollm2-wordmath, not '{repo_id}'")
    return repo_id


def describe(run: Path, report: Report, repo_id: str | None) -> About:
    """What the recipe and the run say about the model; no path is in it."""
    reference = str(report.recipe.get("model", ""))
    base, license_ = _EMBEDDED.get(reference, (_hub_id(run, reference), None))
    name = _plain(base.partition("/")[2] if base else model.name_of(reference))
    gguf = model.EMBEDDED[reference][1] if reference in model.EMBEDDED else Path(reference).name
    task = report.recipe.get("task") or {}
    named_so = _plain(str(task.get("name", "task")))
    source = _source(run, named_so, task.get("data"))
    task_name = _plain(Path(source.name).stem) if named_so == "jsonl" else named_so
    data = _json(run / "data" / "data.json")
    return About(
        name=repo_id.partition("/")[2] if repo_id else f"{name}-{task_name}",
        repo_id=repo_id,
        model=name,
        base=base,
        license=license_,
        gguf=gguf if gguf.endswith(".gguf") else None,
        task=task_name,
        source=source,
        trained=not report.recipe.get("adapter"),
        chat=bool(data.get("chat_template", True)),
        question=_question(run, task),
    )


def select(
    run: Path, report: Report, asked: Sequence[str], prefix: str, hashes: Facts
) -> tuple[Report, list[Shipped], dict[str, str]]:
    """The targets that go into a card, the largest first.

    Args:
        asked: targets or formats; none: every target that can.
        prefix: what names of files begin with.
        hashes: remembers SHA-256, see :func:`edgeft.run.hash_cache`.

    Returns:
        The report of these targets alone, their files, and why others are left out.

    Raises:
        UserError: a target that was asked for cannot go into a card, or none can.
    """
    benched = list(dict.fromkeys(v.target for v in report.variants))
    shipped: list[Shipped] = []
    variants: list[Variant] = []
    left_out: dict[str, str] = {}
    for target in named(asked, report.variants) or benched:
        if target not in benched:
            raise UserError(
                f"{target} has no scores with the run's weights: edgeft bench {run}"
                f"{near(target, benched) if benched else ''}"
            )
        bundle = run / "export" / target / "tuned"
        mine = [v for v in report.variants if v.target == target and _is_scored(run, v, bundle)]
        if why := _unfit(bundle, mine, hashes):
            left_out[target] = why
            continue
        taken = {one.place for one in shipped}
        shipped.append(_shipped(run, bundle, target, prefix, taken))
        variants += mine
    if left_out and (asked or not shipped):
        target, why = next(iter(left_out.items()))
        raise UserError(f"{target} cannot go into a card: {why}")
    if not shipped:
        raise UserError(f"{run}: nothing is benched that could go into a card: edgeft bench {run}")
    return _only(report, variants), shipped, left_out


def _is_scored(run: Path, variant: Variant, bundle: Path) -> bool:
    """Whether it is this very bundle that was scored on the variant's device."""
    manifest = bundle / "manifest.json"
    stage = _json(run / "bench" / variant.device / variant.target / "tuned" / "stage.json")
    return manifest.is_file() and stage.get("manifest") == runs.sha256(manifest)


def _unfit(bundle: Path, scored: Sequence[Variant], hashes: Facts) -> str | None:
    """Why a bundle cannot be shipped; None: it can."""
    manifest = _json(bundle / "manifest.json")
    export = f"edgeft export {bundle.parents[2]} --target {bundle.parent.name}"
    if not manifest:
        return f"its tuned bundle is not in the run: {export}"
    if not manifest.get("verify"):
        return f"its export was not verified: {export}"
    if not scored:
        return f"its file is not the one that was scored: edgeft bench {bundle.parents[2]}"
    for name, facts in _artifact_files(manifest).items():
        path = bundle / name
        if not path.is_file() or runs.sha256(path, hashes) != facts["sha256"]:
            return f"{path} is not the file that was exported: {export}"
    return None


def _artifact_files(manifest: Facts) -> Facts:
    artifact = str(manifest["artifact"])
    return {
        name: facts
        for name, facts in manifest["files"].items()
        if name == artifact or name.startswith(artifact + "/")
    }


def _shipped(run: Path, bundle: Path, target: str, prefix: str, taken: set[str]) -> Shipped:
    manifest = _json(bundle / "manifest.json")
    artifact = str(manifest["artifact"])
    found = _artifact_files(manifest)
    if artifact in found:  # one file
        place = _free(f"{prefix}-{_suffix(target)}", Path(artifact).suffix, taken)
    else:
        place = _free(_plain(target), "", taken)
    names = {name: place + name.removeprefix(artifact) for name in found}
    files = {names[name]: bundle / name for name in found}
    hashes = {names[name]: str(facts["sha256"]) for name, facts in found.items()}
    if manifest["runtime"] != "llama.cpp":  # whose files hold the tokenizer
        places = (run / "merged", run / "data" / "tokenizer")
        folder = next((p for p in places if (p / _TOKENIZER[0]).is_file()), places[-1])
        for path in (folder / name for name in _TOKENIZER):
            if path.is_file():
                files.setdefault(f"{place}/{path.name}", path)
    return Shipped(
        target=target,
        runtime=str(manifest["runtime"]),
        place=place,
        files=files,
        sha256=hashes,
        context=1 << (max(_LEAST_CONTEXT, int(manifest["context"])) - 1).bit_length(),
        max_new_tokens=int(manifest["max_new_tokens"]),
        stop=[int(i) for i in manifest["stop"]],
    )


def _free(stem: str, suffix: str, taken: set[str]) -> str:
    """A name that no other target has, on a file system that ignores case either."""
    names = [stem + suffix, *(f"{stem}-{i}{suffix}" for i in range(2, len(taken) + 2))]
    used = {name.lower() for name in taken}
    return next(name for name in names if name.lower() not in used)


def _suffix(target: str) -> str:
    """``gguf-q4_k_m-imatrix`` as ``Q4_K_M-imatrix``: where people look for the quantization."""
    name = target.removeprefix("gguf-")
    found = _QUANTIZATION.match(name)
    return _plain(name[: found.end()].upper() + name[found.end() :] if found else name)


def _plain(name: str) -> str:
    """A name that needs no quoting on any system."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-.") or "model"


def _only(report: Report, variants: list[Variant]) -> Report:
    """The report of these variants alone."""
    places = {(v.target, v.device) for v in variants} | {(None, None)}
    return replace(
        report,
        variants=variants,
        groups=[g for g in report.groups if (g.target, g.device) in places],
        readings=[r for r in report.readings if (r.target, r.device) in places],
        ship=[] if report.host.verdict else choices(variants, Limits()),
        verdict=_verdict(report.host, variants),
    )


def _hub_id(run: Path, reference: str) -> str | None:
    """The base's id on the hub, unless the reference is a local one."""
    if not _ID.fullmatch(reference) or reference.endswith(".gguf") or Path(reference).exists():
        return None
    # A relative folder looks like an id from elsewhere; the adapter knows where the base was.
    base = _json(run / "train" / "adapter" / "adapter_config.json").get("base_model_name_or_path")
    cached = f"models--{reference.replace('/', '--')}"
    if base and Path(str(base)).is_absolute() and cached not in Path(str(base)).parts:
        return None
    return reference


def _source(run: Path, task: str, data: str | None) -> Source:
    """Where the questions are from; a local file only by its name."""
    split = _split(run)
    if data is None:
        try:
            module = sys.modules[tasks.find(task).make.__module__]
        except UserError:  # another package's task that is not installed here
            return Source(task, split=split)
        hub, config = getattr(module, "HUB", None), getattr(module, "CONFIG", None)
        return Source(hub or task, hub, config, split)
    if _ID.fullmatch(data) and not Path(data).exists() and not data.endswith((".json", ".jsonl")):
        return Source(data, data, None, split)
    return Source(_plain(Path(data).name) if task == "jsonl" else task, split=split)


def _split(run: Path) -> str:
    """``test`` where the questions' ids say so: the data set's own split."""
    return "test" if re.search(r"-test-\d+$", str(_first_item(run).get("id", ""))) else "evaluation"


def _question(run: Path, task: Facts) -> str:
    """An example that anybody may see."""
    open_to_all = task.get("name") in _PUBLIC and not task.get("data") and not task.get("template")
    found = _first_item(run).get("question") if open_to_all else None
    return str(found or "Your question")


def _first_item(run: Path) -> Facts:
    path = run / "data" / "evaluation.jsonl"
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8") as lines:
        return dict(json.loads(next(lines, "{}")))


def _json(path: Path) -> Facts:
    try:
        found: Facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found
