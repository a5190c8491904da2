"""Questions per second, and the same answers: edgeft beside the ways people score a model today.

    python benchmarks/score.py [--shots 0 5] [--llama-batched-bench PATH] [--rounds 3]

One model, one file at Q8_0, the same questions as token ids, the same number of new tokens, none
stops early:

- edgeft: llama.cpp in continuous batches, the prompts' common prefix computed once;
- one at a time: llama-cpp-python's high-level API, which keeps the last prompt's prefix;
- one request each: the same API as a server for lm-evaluation-harness's requests sees them, every
  prompt computed from its first token;
- lm-eval hf: lm-evaluation-harness's own transformers model in float32 on the CPU, one request at
  a time and in batches (fewer questions: it is slow);
- llama-batched-bench, if given: prompts of the same mean length, as many at once. It is built from
  the sources inside llama-cpp-python's sdist (``pip download --no-deps --no-binary :all:``):
  ``cmake -B build -DBUILD_SHARED_LIBS=OFF vendor/llama.cpp``, then
  ``cmake --build build --target llama-batched-bench``.

The contenders take turns, each in a process of its own, so that other work on the machine hits all
of them; figures are medians. Then the questions are answered for real, in a batch and one at a
time, and the answers that differ are counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from edgeft import child, model, prompts, tasks
from edgeft.runtimes import Session, common_prefix, open_session, thread_count
from edgeft.tasks.build import build

Ids = list[list[int]]
HARNESS_BATCH = 8


@dataclass(frozen=True)
class Work:
    """What every contender does; as JSON it goes to its process."""

    gguf: str
    folder: str
    prompts: Ids
    texts: list[str]
    new: int
    threads: int
    parallel: int
    program: str | None
    stop: list[int]


def prepared(scratch: Path) -> tuple[Path, Path]:
    """The embedded model as a folder and as a GGUF at Q8_0."""
    folder = model.resolve("smollm2-135m", scratch / "model")
    whole, small = scratch / "f16.gguf", scratch / "q8_0.gguf"
    request = {"folder": str(folder), "name": "bench", "llama_cpp": None, "out": str(whole)}
    child.run("edgeft.exporters.gguf", request)
    request = {"source": str(whole), "out": str(small), "ftype": "Q8_0"}
    child.run("edgeft.exporters.quantize", request)
    return folder, small


def edgeft(work: Work) -> float:
    """Questions per second of our runtime."""
    with opened(work, work.parallel) as session:
        start = time.perf_counter()
        tokens = sum(len(d.tokens) for d in session.generate(work.prompts, work.new, set()))
        seconds = time.perf_counter() - start
    assert tokens == work.new * len(work.prompts)
    return len(work.prompts) / seconds


def one_at_a_time(work: Work, *, forget: bool = False) -> float:
    """Questions per second of ``llama_cpp.Llama``; ``forget``: without the last prompt's prefix."""
    import llama_cpp

    engine = llama_cpp.Llama(
        work.gguf,
        n_ctx=max(map(len, work.prompts)) + work.new,
        n_threads=work.threads,
        n_threads_batch=work.threads,
        flash_attn=True,
        verbose=False,
    )
    start = time.perf_counter()
    for prompt in work.prompts:
        if forget:
            engine.reset()
        tokens = list(itertools.islice(engine.generate(prompt, temp=0.0), work.new))
        assert len(tokens) == work.new
    return len(work.prompts) / (time.perf_counter() - start)


def harness(work: Work, batch: int) -> float:
    """Questions per second of lm-evaluation-harness's ``hf`` model."""
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(work.threads)
    engine = HFLM(
        pretrained=work.folder,
        tokenizer=prompts.load_tokenizer(Path(work.folder)),
        device="cpu",
        dtype="float32",
        batch_size=batch,
    )
    options = {"until": ["\0"], "max_gen_toks": work.new, "min_new_tokens": work.new}
    texts = work.texts[: 2 * HARNESS_BATCH]
    asked = [Instance("generate_until", {}, (text, options), i) for i, text in enumerate(texts)]
    start = time.perf_counter()
    assert len(engine.generate_until(asked, disable_tqdm=True)) == len(texts)
    return len(texts) / (time.perf_counter() - start)


def batched_bench(work: Work) -> float:
    """Questions per second of llama-batched-bench, by its own clock."""
    length = round(statistics.fmean(map(len, work.prompts)))
    context = work.parallel * (length + work.new)
    shape = {"-npp": length, "-ntg": work.new, "-npl": work.parallel, "-c": context}
    options = [str(word) for pair in shape.items() for word in pair]
    done = subprocess.run(
        [
            *(str(work.program), "-m", work.gguf, *options, "-t", str(work.threads)),
            *("-fa", "on", "--output-format", "jsonl"),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    [result] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return work.parallel / float(result["t"])


CONTENDERS: dict[str, Callable[[Work], float]] = {
    "edgeft": edgeft,
    "one at a time": one_at_a_time,
    "one request each": lambda work: one_at_a_time(work, forget=True),
    "llama-batched-bench": batched_bench,
    "lm-eval hf, one by one": lambda work: harness(work, 1),
    f"lm-eval hf, batch {HARNESS_BATCH}": lambda work: harness(work, HARNESS_BATCH),
}


def opened(work: Work, parallel: int) -> closing[Session]:
    """Our runtime on the file."""
    context = max(map(len, work.prompts)) + work.new
    path = Path(work.gguf)
    return closing(
        open_session("llama.cpp", path, threads=work.threads, context=context, parallel=parallel)
    )


def answers(work: Work, parallel: int) -> list[list[int]]:
    """The tokens of every answer, as a benchmark has them."""
    found: list[list[int]] = [[] for _ in work.prompts]
    with opened(work, parallel) as session:
        for done in session.generate(work.prompts, work.new, set(work.stop)):
            found[done.index] = done.tokens
    return found


def measured(name: str, work: Work) -> float:
    """One contender in a process of its own."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(work.__dict__, file)
        file.flush()
        done = subprocess.run(
            [sys.executable, __file__, "--contender", name, file.name],
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
    return float(done.stdout.split()[-1])


def compare(work: Work, names: Sequence[str], rounds: int) -> None:
    """Measure in turns and print."""
    rates: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            rates[name].append(measured(name, work))
    first = statistics.median(rates["edgeft"])
    for name, each in rates.items():
        by_round = " ".join(f"{rate:.2f}" for rate in each)
        rate = statistics.median(each)
        print(f"{name:>24}  {rate:6.2f} questions/s  edgeft is {first / rate:5.2f} x  ({by_round})")
    together, alone = answers(work, work.parallel), answers(work, 1)
    same = sum(a == b for a, b in zip(together, alone, strict=True))
    print(f"answers in batches of {work.parallel} and one at a time: {same} of {len(alone)} equal")


def main() -> None:
    """Parse, prepare, compare for each number of worked examples."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", default="wordmath")
    parser.add_argument("--data", help="where the task's questions are")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--shots", type=int, nargs="*", default=[0, 5])
    parser.add_argument("--new-tokens", type=int, default=30)
    parser.add_argument("--parallel", type=int, default=32)
    parser.add_argument("--threads", type=int, default=0, help="0: every core")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="of the contenders these")
    parser.add_argument("--llama-batched-bench", metavar="PATH")
    parser.add_argument("--contender", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.contender:
        name, job = given.contender
        print(CONTENDERS[name](Work(**json.loads(Path(job).read_text()))))
        return
    settings = tasks.TaskSettings(
        given.task, train=64, heldout=0, evaluation=given.questions, data=given.data
    )
    splits = build(settings, 0)
    threads = thread_count(given.threads)
    names = [name for name in CONTENDERS if name in (given.only or CONTENDERS)]
    if not given.llama_batched_bench:
        names = [name for name in names if name != "llama-batched-bench"]
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        folder, gguf = prepared(scratch)
        for shots in given.shots:
            form = prompts.Form(tasks.draw_shots(splits.train, shots, 0))
            encoded = prompts.encode(folder, {"evaluation": splits.evaluation}, scratch, form)
            items = prompts.read_items(scratch / "evaluation.jsonl")
            ids = [item.prompt for item in items]
            work = Work(
                *(str(gguf), str(folder), ids, [item.text for item in items], given.new_tokens),
                *(threads, given.parallel, given.llama_batched_bench, encoded.stop),
            )
            lengths = sorted(map(len, ids))
            print(
                f"SmolLM2-135M at Q8_0, {shots} shots: {len(ids)} questions of {lengths[0]} to "
                f"{lengths[-1]} tokens, {common_prefix(ids)} of them shared, {work.new} new; "
                f"{threads} threads; load {os.getloadavg()[0]:.1f} before the start",
                flush=True,
            )
            compare(work, names, given.rounds)


if __name__ == "__main__":
    main()
