"""Tokens per second on one ONNX folder: edgeft beside the plain onnxruntime-genai loop.

    python benchmarks/onnx_loop.py runs/demo/export/onnx-int4/tuned/model

Both read the same random prompts and write the same number of tokens, alone and 16 at a time. They
take turns, so that other work on the machine hits both; figures are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai

from edgeft.runtimes import onnxruntime_genai as ours
from edgeft.runtimes import thread_count

Ids = list[list[int]]


def edgeft(session: ours.GenaiSession, prompts: Ids, new: int) -> float:
    """Seconds of our runtime."""
    start = time.perf_counter()
    tokens = sum(len(done.tokens) for done in session.generate(prompts, new, set()))
    seconds = time.perf_counter() - start
    assert tokens == new * len(prompts), "a sequence stopped early: give another --seed"
    return seconds


def plain(model: genai.Model, prompts: Ids, new: int) -> float:
    """Seconds of the loop in onnxruntime-genai's own examples."""
    start = time.perf_counter()
    parameters = genai.GeneratorParams(model)
    length = len(prompts[0]) + new
    parameters.set_search_options(batch_size=len(prompts), max_length=length, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array(prompts, np.int32))
    steps = 0
    while not generator.is_done():
        generator.generate_next_token()
        generator.get_next_tokens()
        steps += 1
    assert steps == new
    return time.perf_counter() - start


def main() -> None:
    """Parse, measure in turns, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    prompt, new = given.prompt_tokens, given.new_tokens
    threads = thread_count(0)
    config = genai.Config(str(given.folder))
    options = {"decoder": {"session_options": {"intra_op_num_threads": threads}}}
    config.overlay(json.dumps({"model": options}))
    model = genai.Model(config)
    vocabulary = json.loads((given.folder / "genai_config.json").read_text())["model"]["vocab_size"]
    for rows in (1, 16):
        session = ours.open_session(
            given.folder, threads=threads, context=prompt + new, parallel=rows
        )
        random = np.random.default_rng(given.seed)
        prompts: Ids = random.integers(0, vocabulary, (rows, prompt)).tolist()
        contenders: dict[str, Callable[[int], float]] = {
            "edgeft": partial(edgeft, session, prompts),
            "plain loop": partial(plain, model, prompts),
        }
        prefill: dict[str, list[float]] = {name: [] for name in contenders}
        decode: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(given.rounds + 1):
            for name, seconds in contenders.items():
                time.sleep(0.2)  # the other's threads have stopped spinning
                first, whole = seconds(1), seconds(new)
                if turn:  # the first warms up
                    prefill[name].append(rows * prompt / first)
                    decode[name].append(rows * (new - 1) / (whole - first))
        for title, rates in (("prefill", prefill), ("decode", decode)):
            mine, theirs = (statistics.median(rates[name]) for name in contenders)
            ratio = statistics.median(
                a / b for a, b in zip(rates["edgeft"], rates["plain loop"], strict=True)
            )
            print(
                f"batch {rows:2}  {title:7}  edgeft {mine:7.1f} tok/s  plain loop {theirs:7.1f}  "
                f"edgeft is {ratio:.2f} x"
            )
        session.close()


if __name__ == "__main__":
    main()
