"""Questions per second on one GGUF: edgeft beside the ways people score one today.

    python benchmarks/throughput.py [MODEL.gguf] [--llama-batched-bench PATH]

Every contender answers the same questions with the same number of new tokens, none stops early:

- edgeft: continuous batches over the prompts' shared prefix;
- llama-cpp-python's high-level API, one question at a time, with its prefix cache;
- llama.cpp's llama-batched-bench, if given: prompts of the same mean length, as many at once.

The contenders take turns, so that other work on the machine hits all of them; figures are medians.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import llama_cpp
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from edgeft import model, tasks
from edgeft.runtimes import common_prefix, thread_count
from edgeft.runtimes import llama_cpp as ours

Prompts = list[list[int]]


def questions(gguf: Path, count: int) -> Prompts:
    """Word problems in the file's own chat template, as token ids."""
    made = tasks.find("wordmath").make(tasks.TaskSettings("wordmath", 0, 0, count), 0).evaluation
    session = ours.open_session(gguf, threads=1, context=8, parallel=1)
    template = ours.chat_template(session) or "{{ messages[0].content }}\n"
    # The tokenizer puts a BOS in front where the file asks for one.
    render = Jinja2ChatFormatter(template, eos_token="", bos_token="")
    texts = [render(messages=[{"role": "user", "content": q.question}]).prompt for q in made]
    prompts = [ours.tokenize(session, text, special=True) for text in texts]
    session.close()
    return prompts


def edgeft(gguf: Path, prompts: Prompts, new: int, threads: int, parallel: int) -> float:
    """Questions per second of our runtime."""
    context = max(map(len, prompts)) + new
    session = ours.open_session(gguf, threads=threads, context=context, parallel=parallel)
    start = time.perf_counter()
    tokens = sum(len(done.tokens) for done in session.generate(prompts, new, set()))
    seconds = time.perf_counter() - start
    session.close()
    assert tokens == new * len(prompts)
    return len(prompts) / seconds


def one_at_a_time(gguf: Path, prompts: Prompts, new: int, threads: int) -> float:
    """Questions per second of ``llama_cpp.Llama``, which keeps the last prompt's prefix."""
    engine = llama_cpp.Llama(
        str(gguf),
        n_ctx=max(map(len, prompts)) + new,
        n_threads=threads,
        n_threads_batch=threads,
        flash_attn=True,
        verbose=False,
    )
    start = time.perf_counter()
    for prompt in prompts:
        tokens = list(itertools.islice(engine.generate(prompt, temp=0.0), new))
        assert len(tokens) == new
    seconds = time.perf_counter() - start
    engine.close()
    return len(prompts) / seconds


def batched_bench(
    program: Path, gguf: Path, prompts: Prompts, new: int, threads: int, parallel: int
) -> float:
    """Questions per second of llama-batched-bench, by its own clock."""
    length = round(statistics.fmean(map(len, prompts)))
    shape = {"-npp": length, "-ntg": new, "-npl": parallel, "-c": parallel * (length + new)}
    options = [str(word) for pair in shape.items() for word in pair]
    done = subprocess.run(
        [
            program,
            "-m",
            gguf,
            *options,
            "-t",
            str(threads),
            "-fa",
            "on",
            "--output-format",
            "jsonl",
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    [result] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return parallel / float(result["t"])


def main() -> None:
    """Parse, measure in turns, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("gguf", type=Path, nargs="?", help="none: the embedded SmolLM2-135M")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=30)
    parser.add_argument("--parallel", type=int, default=32)
    parser.add_argument("--threads", type=int, default=0, help="0: every core")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama-batched-bench", type=Path, metavar="PATH")
    given = parser.parse_args()
    gguf, new, parallel = (
        given.gguf or model.embedded("smollm2-135m"),
        given.new_tokens,
        given.parallel,
    )
    threads = thread_count(given.threads)
    prompts = questions(gguf, given.questions)
    contenders: dict[str, Callable[[], float]] = {
        "edgeft": lambda: edgeft(gguf, prompts, new, threads, parallel),
        "one at a time": lambda: one_at_a_time(gguf, prompts, new, threads),
    }
    if program := given.llama_batched_bench:
        contenders["llama-batched-bench"] = lambda: batched_bench(
            program, gguf, prompts, new, threads, parallel
        )
    lengths = sorted(map(len, prompts))
    print(
        f"{gguf.name}: {len(prompts)} questions of {lengths[0]} to {lengths[-1]} tokens, "
        f"{common_prefix(prompts)} of them shared, {new} new; {threads} threads; "
        f"load {os.getloadavg()[0]:.1f} before the start"
    )
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(given.rounds):
        for name, measure in contenders.items():
            rates[name].append(measure())
    first = statistics.median(rates["edgeft"])
    for name, each in rates.items():
        rounds = " ".join(f"{rate:.2f}" for rate in each)
        rate = statistics.median(each)
        print(f"{name:>20}  {rate:6.2f} questions/s  edgeft is {first / rate:.2f} x  ({rounds})")


if __name__ == "__main__":
    main()
