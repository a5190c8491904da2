"""edgeft's importance matrix beside llama-imatrix's, on the same tokens.

    python benchmarks/imatrix.py --llama-imatrix PATH runs/demo

llama-imatrix reads the run's 16-bit GGUF, edgeft the model folder that it was made from. The text is
the run's training questions and solutions in a row, in chunks of 512 tokens. Both are whole processes, so loading counts.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from edgeft import child
from edgeft.allocator import allocator
from edgeft.exporters import imatrix
from edgeft.prompts import Item, read_items, write_items

CHUNK = 512


def text_of(run: Path, tokens: Tokenizer, count: int) -> tuple[str, list[list[int]]]:
    """Training questions in a row, a little more than ``count`` chunks, and the chunks' token ids."""
    text = ""
    for item in read_items(run / "data" / "train.jsonl"):
        text += item.text + tokens.decode(item.gold, skip_special_tokens=False) + "\n"
    ids: list[int] = tokens.encode(text, add_special_tokens=False).ids
    if len(ids) < (count + 1) * CHUNK:
        raise SystemExit(f"the questions have {len(ids)} tokens: lower --chunks")
    return text, [ids[at : at + CHUNK] for at in range(0, count * CHUNK, CHUNK)]


def theirs(program: Path, artifact: Path, text: Path, chunks: int, out: Path) -> float:
    """Run llama-imatrix; seconds."""
    start = time.perf_counter()
    files = ["-m", str(artifact), "-f", str(text), "-o", str(out)]
    settings = ["--no-ppl", "--parse-special", "-c", str(CHUNK), "--chunks", str(chunks)]
    subprocess.run([str(program), *files, *settings], check=True, capture_output=True)
    return time.perf_counter() - start


def ours(folder: Path, chunks: Sequence[list[int]], out: Path, dtype: str) -> float:
    """Run edgeft's child; seconds."""
    questions = out.with_suffix(".jsonl")
    write_items(questions, [Item(str(i), "", "", ids, [], "") for i, ids in enumerate(chunks)])
    request: dict[str, str | int] = {
        "folder": str(folder),
        "questions": str(questions),
        "out": str(out),
    }
    request |= {"seed": 0, "dataset": "benchmark", "dtype": dtype}
    start = time.perf_counter()
    child.run("edgeft.exporters.imatrix", request, allocator())
    return time.perf_counter() - start


def correlations(one: Path, other: Path) -> list[float]:
    """Of every weight's columns, Pearson's."""
    a, b = imatrix.read(one).columns, imatrix.read(other).columns
    if a.keys() != b.keys():
        raise SystemExit(f"not of the same weights: {sorted(a.keys() ^ b.keys())}")
    return [float(np.corrcoef(a[name], b[name])[0, 1]) for name in a]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--llama-imatrix", type=Path, required=True, help="the program")
    parser.add_argument("--chunks", type=int, default=48, help="of 512 tokens")
    given = parser.parse_args()
    tokens = Tokenizer.from_file(str(given.run / "merged" / "tokenizer.json"))
    text, chunks = text_of(given.run, tokens, given.chunks)
    with tempfile.TemporaryDirectory() as place:
        file, reference = Path(place) / "text.txt", Path(place) / "theirs.gguf"
        file.write_text(text, encoding="utf-8")
        artifact = given.run / "gguf" / "tuned" / "model.gguf"
        seconds = theirs(given.llama_imatrix, artifact, file, given.chunks, reference)
        made = imatrix.read(reference)
        print(f"{len(chunks)} chunks of {CHUNK} tokens, {len(made.columns)} weights")
        print(f"llama-imatrix ({made.chunks} chunks)  {seconds:.1f} s")
        for dtype in ("float32", "bfloat16"):
            out = Path(place) / f"{dtype}.gguf"
            seconds = ours(given.run / "merged", chunks, out, dtype)
            found = correlations(out, reference)
            print(
                f"edgeft, {dtype}  {seconds:.1f} s  correlation with it: "
                f"min {min(found):.5f}, median {statistics.median(found):.6f}"
            )


if __name__ == "__main__":
    main()
