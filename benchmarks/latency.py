"""One stream's prefill and decode speed: edgeft beside the field's own programs, on the same file.

    python benchmarks/latency.py --llama-bench PATH runs/demo/export/gguf-*/tuned [--rounds 5]

For a GGUF file the peer is llama-bench, built from the sources inside llama-cpp-python's sdist
(``pip download --no-deps --no-binary :all: llama-cpp-python``): ``cmake -B build
-DBUILD_SHARED_LIBS=OFF vendor/llama.cpp``, then ``cmake --build build --target llama-bench``. Another
build of the same sources alone moves a figure by up to 5%, so link llama-bench's objects with the
installed ``llama_cpp/lib/lib{llama,ggml,ggml-cpu,ggml-base}.so`` to compare the timing and nothing
else. For an onnxruntime-genai folder it is the plain loop of its own examples. Same threads, prompt
and number of new tokens. They take turns, the first one in each round too, each in a process of its
own; figures are medians, the ratio that of the rounds' ratios, since the machine drifts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from edgeft import bench
from edgeft.bench.job import Job
from edgeft.runtimes import thread_count

Speeds = tuple[float, float]  # prefill and decode, tokens a second


def edgeft(job: Job, prompt: int, new: int, repetitions: int) -> Speeds:
    """As ``edgeft bench`` times it."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        bench.latency(job, out, prompt_tokens=prompt, new_tokens=new, repetitions=repetitions)
        found = json.loads((Path(scratch) / "latency.json").read_text())
    return found["prefill_tok_s"], found["decode_tok_s"]


def llama_bench(program: str, job: Job, prompt: int, new: int, repetitions: int) -> Speeds:
    """By its own clock: the prompt alone, and new tokens behind as many."""
    options = {
        "-m": job.artifact,
        "-t": job.threads,
        "-p": prompt,
        "-n": new - 1,
        "-r": repetitions,
    }
    words = [str(word) for pair in options.items() for word in pair]
    done = subprocess.run(
        [program, *words, "-d", f"0,{prompt}", "-o", "json"],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    rows = {(r["n_prompt"] > 0, r["n_depth"]): r for r in json.loads(done.stdout)}
    return rows[True, 0]["avg_ts"], rows[False, prompt]["avg_ts"]


def plain_loop(job: Job, prompt: int, new: int, repetitions: int) -> Speeds:
    """onnxruntime-genai's own loop, in a process of its own."""
    request = json.dumps([str(job.artifact), job.threads, prompt, new, repetitions])
    done = subprocess.run(
        [sys.executable, __file__, "--loop", request], check=True, stdout=subprocess.PIPE, text=True
    )
    first, each = json.loads(done.stdout)
    return prompt / first, 1 / each


def loop(folder: str, threads: int, prompt: int, new: int, repetitions: int) -> Speeds:
    """Median seconds to the first token and for each further one."""
    import numpy as np
    import onnxruntime_genai as genai

    config = genai.Config(folder)
    options = {"decoder": {"session_options": {"intra_op_num_threads": threads}}}
    config.overlay(json.dumps({"model": options}))
    model = genai.Model(config)
    ids = np.random.default_rng(0).integers(100, 1000, (1, prompt)).astype(np.int32)
    firsts, rest = [], []
    for _ in range(repetitions + 1):
        parameters = genai.GeneratorParams(model)
        length = prompt + new
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = genai.Generator(model, parameters)
        start = time.perf_counter()
        generator.append_tokens(ids)
        generator.generate_next_token()
        first = time.perf_counter()
        while not generator.is_done():
            generator.generate_next_token()
        firsts.append(first - start)
        rest.append((time.perf_counter() - first) / (new - 1))
    return statistics.median(firsts[1:]), statistics.median(rest[1:])


def main() -> None:
    """Parse, measure in turns, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundles", type=Path, nargs="*")
    parser.add_argument("--llama-bench", metavar="PATH")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: every core")
    parser.add_argument("--loop", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.loop:
        print(json.dumps(loop(*json.loads(given.loop))))
        return
    shape = (given.prompt_tokens, given.new_tokens, given.repetitions)
    threads = thread_count(given.threads)
    print(
        f"{shape[0]} prompt tokens, {shape[1]} new, {threads} threads, load {os.getloadavg()[0]:.1f}"
    )
    for bundle in given.bundles:
        job = replace(bench.job_of_bundle(bundle), threads=threads)
        is_gguf = job.runtime == "llama.cpp"
        if is_gguf and not given.llama_bench:
            parser.error("a GGUF file is compared with --llama-bench PATH")
        peer = partial(llama_bench, given.llama_bench) if is_gguf else plain_loop
        ours: list[Speeds] = []
        theirs: list[Speeds] = []
        turns = [(ours, edgeft), (theirs, peer)]
        for _ in range(given.rounds):
            for found, measure in turns:
                found.append(measure(job, *shape))
            turns.reverse()
        for at, what in enumerate(("prefill", "decode")):
            mine, other = (statistics.median(s[at] for s in each) for each in (ours, theirs))
            ratios = [a[at] / b[at] for a, b in zip(ours, theirs, strict=True)]
            name = "llama-bench" if is_gguf else "plain loop"
            print(
                f"{bundle.parent.name:>16} {what:>8}  edgeft {mine:7.1f}  {name} {other:7.1f} tok/s  "
                f"ratio {statistics.median(ratios):.3f}  "
                f"(by round {' '.join(f'{ratio:.2f}' for ratio in ratios)})",
                flush=True,
            )


if __name__ == "__main__":
    main()
