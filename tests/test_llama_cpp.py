"""The llama.cpp runtime, on the real embedded model: batches change speed, never answers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgeft.errors import UserError
from edgeft.runtimes import common_prefix, llama_cpp

HEAD = "<|im_start|>system\nYou answer briefly.<|im_end|>\n<|im_start|>user\n"
TAIL = "<|im_end|>\n<|im_start|>assistant\n"
ASKED = (
    "Tom has 3 apples and buys 4 more. How many has he?",
    "What is the capital of France?",
    "Name a colour.",
    # Behind the shared head longer than one piece, so it is fed in several.
    "Count these words: " + "one two three four five six seven eight nine ten " * 9,
    "Add 5 and 6.",
)
NEW = 12


@pytest.fixture(scope="module")
def sessions(embedded_gguf: Path) -> Iterator[dict[int, llama_cpp.LlamaSession]]:
    """By the number of sequences in a batch."""
    opened = {
        parallel: llama_cpp.open_session(embedded_gguf, threads=1, context=200, parallel=parallel)
        for parallel in (1, 2, 5)
    }
    yield opened
    for session in opened.values():
        session.close()


@pytest.fixture(scope="module")
def prompts(sessions: dict[int, llama_cpp.LlamaSession]) -> list[list[int]]:
    return [llama_cpp.tokenize(sessions[1], HEAD + text + TAIL, special=True) for text in ASKED]


def answers(
    session: llama_cpp.LlamaSession, prompts: list[list[int]], stop: set[int]
) -> list[tuple[list[int], str]]:
    done = sorted(session.generate(prompts, NEW, stop), key=lambda one: one.index)
    assert [one.index for one in done] == list(range(len(prompts)))
    return [(one.tokens, one.finish) for one in done]


def full_logits(gguf: Path, tokens: list[int]) -> np.ndarray:
    """float32 [len(tokens), vocabulary], by the high-level API: a path that shares none of ours."""
    from llama_cpp import Llama

    engine = Llama(str(gguf), n_ctx=256, n_threads=1, logits_all=True, verbose=False)
    engine.eval(tokens)
    logits = np.array(engine.scores[: len(tokens)], np.float32)
    engine.close()
    return logits


@pytest.mark.slow
def test_a_batch_answers_as_one_at_a_time(
    sessions: dict[int, llama_cpp.LlamaSession], prompts: list[list[int]]
) -> None:
    alone = answers(sessions[1], prompts, {2})
    assert answers(sessions[2], prompts, {2}) == alone
    assert answers(sessions[5], prompts, {2}) == alone
    assert answers(sessions[5], prompts[1:4], {2}) == alone[1:4]


def test_greedy_is_the_top_token_of_the_high_level_api(
    sessions: dict[int, llama_cpp.LlamaSession], prompts: list[list[int]], embedded_gguf: Path
) -> None:
    tokens, _ = answers(sessions[5], prompts, set())[0]
    logits = full_logits(embedded_gguf, prompts[0] + tokens)[len(prompts[0]) - 1 : -1]
    chosen = logits[np.arange(NEW), tokens]
    assert (logits.max(-1) - chosen).max() < 0.1  # arithmetic may swap near ties, no more


def test_stop_ids_are_the_given_ones(
    sessions: dict[int, llama_cpp.LlamaSession], prompts: list[list[int]]
) -> None:
    free = answers(sessions[5], prompts, set())
    assert all(len(tokens) == NEW and finish == "length" for tokens, finish in free)
    word = free[0][0][3]
    cut = free[0][0].index(word)
    assert answers(sessions[5], prompts, {word})[0] == (free[0][0][:cut], "stop")


@pytest.mark.slow
def test_score_is_the_sum_over_full_logits(
    sessions: dict[int, llama_cpp.LlamaSession], prompts: list[list[int]], embedded_gguf: Path
) -> None:
    gold = [
        llama_cpp.tokenize(sessions[1], text, special=True)
        for text in ("He has 7 apples.", "Paris.", "Red" + " and blue" * 12, "90", "11<|im_end|>")
    ]
    pairs = list(zip(prompts, gold, strict=True))
    got = list(sessions[2].score(pairs))
    assert got == list(sessions[5].score(pairs)) == list(sessions[1].score(pairs))
    for index in (0, 2):
        rows = full_logits(embedded_gguf, prompts[index] + gold[index]).astype(np.float64)
        rows = rows[len(prompts[index]) - 1 : -1]
        top = rows.max(-1, keepdims=True)
        logs = rows - top - np.log(np.exp(rows - top).sum(-1, keepdims=True))
        expected = logs[np.arange(len(rows)), gold[index]].sum()
        assert got[index] == pytest.approx(expected, rel=0.02)


def test_logits_stand_behind_the_common_prefix(
    sessions: dict[int, llama_cpp.LlamaSession], prompts: list[list[int]], embedded_gguf: Path
) -> None:
    shared = common_prefix(prompts)
    assert shared > 10
    got = list(sessions[2].logits(prompts))
    assert [len(rows) for rows in got] == [len(prompt) - shared for prompt in prompts]
    whole = full_logits(embedded_gguf, prompts[3])[shared:]
    assert (whole.argmax(-1) == got[3].argmax(-1)).mean() > 0.9
    # Kernels round differently, mostly by one shift for all tokens, which softmax does not see.
    apart = whole - got[3]
    assert np.abs(apart - apart.mean(-1, keepdims=True)).mean() < 0.2


def test_a_continuation_of_nothing_scores_zero(
    sessions: dict[int, llama_cpp.LlamaSession], prompts: list[list[int]]
) -> None:
    first, empty = sessions[2].score([(prompts[0], [42]), (prompts[1], [])])
    assert first < 0 and empty == 0


def test_the_common_prefix_leaves_every_prompt_a_token() -> None:
    assert common_prefix([[1, 2, 3], [1, 2, 4]]) == 2
    assert common_prefix([[1, 2], [1, 2, 3]]) == 1
    assert common_prefix([[7], [7, 8]]) == 0
    assert common_prefix([[1, 2, 3]]) == 2


def test_what_does_not_fit_is_refused(
    sessions: dict[int, llama_cpp.LlamaSession], prompts: list[list[int]]
) -> None:
    with pytest.raises(UserError, match=r"prompt 1 has 195 tokens and 12 more .* holds 200"):
        list(sessions[1].generate([prompts[0], [5] * 195], NEW, set()))
    with pytest.raises(UserError, match="prompt 0 is empty"):
        list(sessions[1].logits([[]]))


def test_one_stream_is_timed_token_by_token(sessions: dict[int, llama_cpp.LlamaSession]) -> None:
    timing = sessions[1].time(16, 4)
    assert len(timing.token_s) == 3
    assert timing.ttft_s > 0 and min(timing.token_s) > 0


def test_the_files_own_tokenizer_and_template(
    sessions: dict[int, llama_cpp.LlamaSession],
) -> None:
    ids = llama_cpp.tokenize(sessions[1], "<|im_end|>", special=True)
    assert ids == [2]  # and no BOS: the file does not ask for one
    assert len(llama_cpp.tokenize(sessions[1], "<|im_end|>", special=False)) > 1
    assert "im_start" in (llama_cpp.chat_template(sessions[1]) or "")


@pytest.mark.parametrize("kept", [0, 100, 1_000_000, 60_000_000])
def test_a_damaged_file_is_one_line(embedded_gguf: Path, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "model.gguf"
    with embedded_gguf.open("rb") as whole:
        path.write_bytes(whole.read(kept))
    with pytest.raises(UserError) as caught:
        llama_cpp.open_session(path, threads=1, context=64, parallel=1)
    line = str(caught.value)
    assert line.startswith(f"{path} does not open in llama.cpp: ")
    assert line.endswith("; export it again") and "\n" not in line
    assert "no reason" not in line


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone.gguf does not exist"):
        llama_cpp.open_session(tmp_path / "gone.gguf", threads=1, context=64, parallel=1)


def test_no_training_library_is_loaded(embedded_gguf: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from edgeft.runtimes import open_session\n"
        f"s = open_session('llama.cpp', Path({str(embedded_gguf)!r}), threads=1, context=32,"
        " parallel=1)\n"
        "print(len(next(iter(s.generate([[1, 2]], 2, set()))).tokens))\n"
        "print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["2", "[]"]
