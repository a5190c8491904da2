"""Chat template and tokenization, done once on the host: questions become token ids.

Every runtime on every device gets these ids, so a score can only differ because of the weights or
the arithmetic (DESIGN, decision 1).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeft import child
from edgeft.errors import UserError
from edgeft.tasks import Question

EVALUATION = "evaluation"  # the split that is scored
_NEXT = "\n\nQuestion:"  # how a model without a chat template goes on to a question of its own


@dataclass(frozen=True)
class Item:
    """One question as the model sees it.

    Attributes:
        id: the question's.
        group: the question's, ``""`` or a part reported apart.
        question: what people read.
        prompt: token ids up to where the answer begins.
        gold: token ids of the worked solution and the end of the turn.
        answer: the answer alone.
        text: the rendered prompt, for checking other tokenizers against ``prompt``.
    """

    id: str
    group: str
    question: str
    prompt: list[int]
    gold: list[int]
    answer: str
    text: str = ""


@dataclass(frozen=True)
class Encoded:
    """What the tokenizer and the chat template say about a model.

    Attributes:
        stop: ids that end a completion.
        chat: whether the prompts were made by the model's chat template.
    """

    stop: list[int]
    chat: bool


def read_items(path: Path) -> list[Item]:
    """The questions in a JSON-lines file."""
    with path.open(encoding="utf-8") as lines:
        return [Item(**json.loads(line)) for line in lines]


def write_items(path: Path, items: Iterable[Item]) -> None:
    """One JSON object a line."""
    with path.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items)


def encode(
    folder: Path,
    splits: dict[str, Sequence[Question]],
    out: Path,
    shots: Sequence[Question] = (),
) -> Encoded:
    """Write ``<split>.jsonl`` for each split into ``out``, by the tokenizer of a model folder.

    Args:
        shots: worked examples in front of every evaluation question, the same for all; what is
            trained on has none.

    Raises:
        UserError: the folder has no usable tokenizer, or its chat template does not render.
    """
    tokenizer = load_tokenizer(folder)
    chat = bool(tokenizer.chat_template)
    stop = set(_generation_stops(folder))
    if tokenizer.eos_token_id is not None:
        stop.add(tokenizer.eos_token_id)
    for name, questions in splits.items():
        before = shots if name == EVALUATION else ()
        items = [_item(tokenizer, question, before) for question in questions]
        stop |= {item.gold[-1] for item in items}
        write_items(out / f"{name}.jsonl", items)
    tokenizer.save_pretrained(out / "tokenizer")
    return Encoded(sorted(stop), chat)


def load_tokenizer(folder: Path) -> Any:
    """A model folder's tokenizer, as its ``tokenizer.json`` has it.

    transformers 5 builds Llama's anew from the vocabulary alone: then ``</s>`` is no longer
    followed by a space, which is what the model was trained with and what llama.cpp does.

    Raises:
        UserError: the folder has no usable tokenizer.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    as_written = (folder / "tokenizer.json").is_file()
    try:
        return (PreTrainedTokenizerFast if as_written else AutoTokenizer).from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder} has no usable tokenizer: {reason}") from error


def prompt_text(tokenizer: Any, question: str, shots: Sequence[Question] = ()) -> str:
    """A question as the model is asked it, behind worked examples.

    With a chat template every example is a turn of the user's and the assistant's answer to it,
    without one a paragraph. Both are lm-evaluation-harness's (``fewshot_as_multiturn``; GSM8K's
    ``Question: ... Answer: ...``).

    Raises:
        UserError: the chat template does not render.
    """
    if not tokenizer.chat_template:
        blocks = [f"Question: {shot.question}\nAnswer: {shot.solution}\n\n" for shot in shots]
        return "".join(blocks) + f"Question: {question}\nAnswer:"
    turns = [turn for shot in shots for turn in _turns(shot)]
    return _chat(tokenizer, [*turns, {"role": "user", "content": question}], True)


def own_answer(text: str) -> str:
    """A completion up to where the model begins to ask a next question."""
    return text.partition(_NEXT)[0]


def _generation_stops(folder: Path) -> list[int]:
    path = folder / "generation_config.json"
    eos = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    return eos if isinstance(eos, list) else [] if eos is None else [eos]


def _item(tokenizer: Any, question: Question, shots: Sequence[Question]) -> Item:
    chat = bool(tokenizer.chat_template)
    text = prompt_text(tokenizer, question.question, shots)
    prompt = tokenizer.encode(text, add_special_tokens=not chat)
    end = _end_of_turn(tokenizer, question) if chat else tokenizer.eos_token_id
    if end is None:
        raise UserError("the tokenizer has neither an end-of-turn nor an end-of-text token")
    # A plain prompt ends without a space, which then belongs to the answer's first token.
    solution = question.solution if chat else " " + question.solution
    whole: list[int] = tokenizer.encode(text + solution, add_special_tokens=not chat)
    # Alone, a SentencePiece tokenizer would begin the solution with a space of its own.
    alone = whole[: len(prompt)] != prompt
    rest = tokenizer.encode(solution, add_special_tokens=False) if alone else whole[len(prompt) :]
    gold = [*rest, end]
    return Item(question.id, question.group, question.question, prompt, gold, question.answer, text)


def _turns(question: Question) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": question.question},
        {"role": "assistant", "content": question.solution},
    ]


def _chat(tokenizer: Any, turns: list[dict[str, str]], ask: bool) -> str:
    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask)
    except Exception as error:  # whatever a model's own Jinja raises
        raise UserError(f"the model's chat template does not render: {error}") from error
    return text


def _end_of_turn(tokenizer: Any, question: Question) -> int | None:
    """The first special token that the template puts behind the solution."""
    rest = _chat(tokenizer, _turns(question), False).rpartition(question.solution)[2]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ids: list[int] = tokenizer.encode(rest, add_special_tokens=False)
    eos: int | None = tokenizer.eos_token_id
    return next((i for i in ids if i in special), eos)


def _work(request: Any, emit: Callable[..., None]) -> None:
    splits: dict[str, Sequence[Question]] = {
        name: [Question(**q) for q in questions] for name, questions in request["splits"].items()
    }
    shots = [Question(**q) for q in request.get("shots", ())]
    encoded = encode(Path(request["folder"]), splits, Path(request["out"]), shots)
    emit("encoded", **asdict(encoded))


if __name__ == "__main__":
    child.serve(_work)
