"""The onnxruntime runtime, on graphs that optimum really exports: batches never change answers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgeft.errors import UserError
from edgeft.runtimes import Completion, Session, common_prefix, onnxruntime, open_session
from edgeft.runtimes import transformers as host

pytestmark = pytest.mark.slow

NEW = 8
HEAD = [1, 510, 42, 7, 7, 900, 31, 5, 88, 12]
# The last is a piece of the first: behind the shared head nothing is left of it but one token.
PROMPTS = [
    HEAD + tail
    for tail in ([11, 12, 13], [400 + i for i in range(30)], [77, 3], [9] * 17, [6, 5, 4, 3], [11])
]
CONTINUATIONS = [[5, 6, 7], [90], [12, 13, 14, 15, 16], [], [3, 2], [2]]


@pytest.fixture(scope="module")
def graph(tiny: Path, portable_graph: Callable[[Path, str], Path]) -> Path:
    return portable_graph(tiny, "fp32")


@pytest.fixture(scope="module")
def sessions(graph: Path) -> dict[int, onnxruntime.OnnxSession]:
    """By the number of sequences in a batch."""
    return {
        parallel: onnxruntime.open_session(graph, threads=1, context=64, parallel=parallel)
        for parallel in (1, 2, 6)
    }


@pytest.fixture(scope="module")
def eight_bits(tiny: Path, portable_graph: Callable[[Path, str], Path]) -> onnxruntime.OnnxSession:
    return onnxruntime.open_session(portable_graph(tiny, "int8"), threads=1, context=64, parallel=6)


@pytest.fixture(scope="module")
def reference(tiny: Path) -> host.TransformersSession:
    return host.open_session(tiny, threads=1, context=64, parallel=1)


def answers(
    session: Session, prompts: list[list[int]], stop: set[int]
) -> list[tuple[list[int], str]]:
    done: list[Completion] = sorted(session.generate(prompts, NEW, stop), key=lambda one: one.index)
    assert [one.index for one in done] == list(range(len(prompts)))
    return [(one.tokens, one.finish) for one in done]


def test_greedy_in_batches_is_the_hosts(
    sessions: dict[int, onnxruntime.OnnxSession], reference: host.TransformersSession
) -> None:
    alone = [answers(reference, [prompt], set())[0] for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens, _ in alone}) == len(PROMPTS)
    assert answers(sessions[1], PROMPTS, set()) == alone
    assert answers(sessions[2], PROMPTS, set()) == alone
    assert answers(sessions[6], PROMPTS, set()) == alone


def test_stop_ids_end_rows_at_different_steps(
    sessions: dict[int, onnxruntime.OnnxSession],
) -> None:
    free = answers(sessions[6], PROMPTS, set())
    assert all(len(tokens) == NEW and finish == "length" for tokens, finish in free)
    stop = {free[0][0][2], free[1][0][4], free[3][0][0]}
    expected = []
    for tokens, _ in free:
        cut = next((at for at, token in enumerate(tokens) if token in stop), NEW)
        expected.append((tokens[:cut], "stop" if cut < NEW else "length"))
    assert len({len(tokens) for tokens, _ in expected}) > 2
    assert answers(sessions[6], PROMPTS, stop) == expected
    assert answers(sessions[1], PROMPTS, stop) == expected


def test_a_shared_prefix_changes_nothing(sessions: dict[int, onnxruntime.OnnxSession]) -> None:
    assert common_prefix(PROMPTS) == len(HEAD)
    other = [2, *PROMPTS[0]]  # with it nothing is shared
    assert common_prefix([other, *PROMPTS]) == 0
    assert answers(sessions[6], [other, *PROMPTS], set())[1:] == answers(
        sessions[6], PROMPTS, set()
    )


def test_score_is_the_sum_of_log_softmax(
    sessions: dict[int, onnxruntime.OnnxSession], reference: host.TransformersSession
) -> None:
    pairs = list(zip(PROMPTS, CONTINUATIONS, strict=True))
    got = list(sessions[6].score(pairs))
    assert got == pytest.approx(list(sessions[1].score(pairs)), abs=1e-3)
    for (prompt, continuation), score in zip(pairs, got, strict=True):
        # Two prompts that share nothing, so that logits stand at every position.
        rows = next(iter(reference.logits([[*prompt, *continuation], [2]]))).astype(np.float64)
        rows = rows[len(prompt) - 1 : len(prompt) + len(continuation) - 1]
        logs = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
        expected = logs[np.arange(len(continuation)), continuation].sum()
        assert score == pytest.approx(expected, abs=1e-3)


def test_logits_stand_behind_the_common_prefix(
    sessions: dict[int, onnxruntime.OnnxSession], reference: host.TransformersSession
) -> None:
    expected = list(reference.logits(PROMPTS))
    for session in sessions.values():
        got = list(session.logits(PROMPTS))
        assert [rows.shape for rows in got] == [rows.shape for rows in expected]
        assert max(np.abs(a - b).max() for a, b in zip(got, expected, strict=True)) < 1e-3


def test_logits_of_the_last_tokens(
    sessions: dict[int, onnxruntime.OnnxSession], reference: host.TransformersSession
) -> None:
    prompts, last = [PROMPTS[1], PROMPTS[1], PROMPTS[5]], [3, 40, 1]
    whole = [next(iter(reference.logits([p, [p[0] + 1]]))) for p in prompts]
    for session in sessions.values():
        for rows, n, all_rows in zip(session.logits(prompts, last), last, whole, strict=True):
            assert len(rows) == n
            assert np.abs(rows - all_rows[-n:]).max() < 1e-3


def test_quantized_activations_see_one_prompt_whole(
    eight_bits: onnxruntime.OnnxSession,
) -> None:
    """Dynamic quantization takes its scale from the whole call, so company would change answers."""
    together = answers(eight_bits, PROMPTS, set())
    assert together == [answers(eight_bits, [prompt], set())[0] for prompt in PROMPTS]
    pairs = list(zip(PROMPTS, CONTINUATIONS, strict=True))
    assert list(eight_bits.score(pairs)) == [next(eight_bits.score([pair])) for pair in pairs]


def test_quantized_score_is_that_of_generating(eight_bits: onnxruntime.OnnxSession) -> None:
    """At each step what generating chose is the most likely, so no other token scores higher."""
    tokens, _ = answers(eight_bits, PROMPTS, set())[0]
    for at, other in enumerate((3, 700, 12, 5)):
        tried = [[*tokens[:at], token] for token in (tokens[at], other)]
        chosen, worse = eight_bits.score([(PROMPTS[0], continuation) for continuation in tried])
        assert chosen > worse


def test_what_does_not_fit_is_refused(sessions: dict[int, onnxruntime.OnnxSession]) -> None:
    with pytest.raises(UserError, match=r"prompt 1 has 60 tokens and 8 more .* holds 64"):
        list(sessions[1].generate([PROMPTS[0], [5] * 60], NEW, set()))
    with pytest.raises(UserError, match="prompt 0 is empty"):
        list(sessions[1].logits([[]]))


def test_one_stream_is_timed_token_by_token(sessions: dict[int, onnxruntime.OnnxSession]) -> None:
    timing = sessions[1].time(16, 4)
    assert len(timing.token_s) == 3
    assert timing.ttft_s > 0 and min(timing.token_s) > 0


@pytest.mark.parametrize("kept", [0, 100, 5_000_000])
def test_a_damaged_graph_is_one_line(graph: Path, tmp_path: Path, kept: int) -> None:
    with (graph / "model.onnx").open("rb") as whole:
        (tmp_path / "model.onnx").write_bytes(whole.read(kept))
    with pytest.raises(UserError) as caught:
        open_session("onnxruntime", tmp_path, threads=1, context=64, parallel=1)
    line = str(caught.value)
    assert line.startswith(f"{tmp_path}/model.onnx does not open in onnxruntime: ")
    assert line.endswith("; export it again") and "\n" not in line


def test_another_graph_is_refused(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, save

    ids, out = (
        helper.make_tensor_value_info(name, TensorProto.INT64, [1]) for name in ("input_ids", "y")
    )
    node = helper.make_node("Identity", ["input_ids"], ["y"])
    made = helper.make_graph([node], "g", [ids], [out])
    save(
        helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8),
        tmp_path / "model.onnx",
    )
    with pytest.raises(UserError, match="it takes no attention_mask"):
        onnxruntime.open_session(tmp_path, threads=1, context=64, parallel=1)


def test_a_graph_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.onnx does not exist"):
        onnxruntime.open_session(tmp_path, threads=1, context=64, parallel=1)


def test_no_training_library_is_loaded(graph: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from edgeft.runtimes import open_session\n"
        f"s = open_session('onnxruntime', Path({str(graph)!r}), threads=1, context=32, parallel=1)\n"
        "print(len(next(iter(s.generate([[1, 2]], 2, set()))).tokens))\n"
        "print([name for name in ('torch', 'transformers', 'onnx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["2", "[]"]
