"""Chat template and tokenization, done once on the host: questions become token ids.

Every runtime on every device gets these ids, so a score can only differ because of the weights or
the arithmetic (DESIGN, decision 1).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgeft import child
from edgeft.errors import UserError
from edgeft.tasks import Question, TaskSettings, draw_shots, general
from edgeft.tasks.build import build

EVALUATION = "evaluation"  # the split that is scored
_NEEDED = ("train", EVALUATION)
# How a model without a chat template goes on to a question of its own.
_NEXT = re.compile(r"\n\s*Question:")
TOO_LONG = "longer than the model's context"


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
class Form:
    """How questions are put: worked examples before each evaluation question, a system prompt."""

    shots: Sequence[Question] = ()
    system: str | None = None


@dataclass(frozen=True)
class Room:
    """What fits into a model.

    Attributes:
        context: tokens that it holds; None: as many as one likes.
        new: tokens that may follow an evaluation prompt.
    """

    context: int | None = None
    new: int = 0


@dataclass(frozen=True)
class Encoded:
    """What the tokenizer and the chat template say about a model.

    Attributes:
        stop: ids that end a completion.
        chat: whether the prompts were made by the model's chat template.
        too_long: questions that do not fit into the model, by split; they are left out.
    """

    stop: list[int]
    chat: bool
    too_long: dict[str, int] = field(default_factory=dict)


def read_items(path: Path) -> list[Item]:
    """The questions in a JSON-lines file."""
    with path.open(encoding="utf-8") as lines:
        return [Item(**json.loads(line)) for line in lines]


def first(items: list[Item], limit: int | None) -> list[Item]:
    """The first ``limit`` questions of the headline group; None: every question."""
    return items if limit is None else [item for item in items if not item.group][:limit]


def write_items(path: Path, items: Iterable[Item]) -> None:
    """One JSON object a line."""
    with path.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items)


def encode(
    folder: Path,
    splits: dict[str, Sequence[Question]],
    out: Path,
    form: Form = Form(),
    room: Room = Room(),
) -> Encoded:
    """Write ``<split>.jsonl`` for each split into ``out``, by the tokenizer of a model folder.

    What is trained on has no worked examples in front.

    Raises:
        UserError: the folder has no usable tokenizer, its chat template does not render, or no
            training or no evaluation question fits.
    """
    tokenizer = load_tokenizer(folder)
    stop = set(_generation_stops(folder))
    if tokenizer.eos_token_id is not None:
        stop.add(tokenizer.eos_token_id)
    too_long = {}
    for name, questions in splits.items():
        items = encoded_items(tokenizer, name, questions, form)
        stop |= {item.gold[-1] for item in items}
        new = room.new if name == EVALUATION else 0
        kept = [item for item in items if _fits(item, room.context, new)]
        if items and not kept and name in _NEEDED:
            raise UserError(_nothing_fits(name, items, form, room))
        if len(kept) < len(items):
            too_long[name] = len(items) - len(kept)
        write_items(out / f"{name}.jsonl", kept)
    tokenizer.save_pretrained(out / "tokenizer")
    return Encoded(sorted(stop), bool(tokenizer.chat_template), too_long)


def encoded_items(
    tokenizer: Any, split: str, questions: Sequence[Question], form: Form
) -> list[Item]:
    """The questions of a split as the model sees them."""
    if not questions:
        return []
    form = form if split == EVALUATION else Form((), form.system)
    end = _end_of_turn(tokenizer, questions[0])
    return [_item(tokenizer, question, form, end) for question in questions]


def _fits(item: Item, context: int | None, new: int) -> bool:
    return context is None or len(item.prompt) + max(new, len(item.gold)) <= context


def _nothing_fits(name: str, items: Sequence[Item], form: Form, room: Room) -> str:
    prompt = min(len(item.prompt) for item in items)
    new = room.new if name == EVALUATION else min(len(item.gold) for item in items)
    return (
        f"no question of '{name}' fits: the shortest prompt has {prompt} tokens and {new} more may "
        f"follow, but the model was made for {room.context} in all: lower task.shots "
        f"({len(form.shots)}) or bench.max_new_tokens ({room.new})"
    )


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


def prompt_text(tokenizer: Any, question: Question, form: Form = Form()) -> str:
    """A question as the model is asked it, behind the system prompt and worked examples.

    With a chat template every example is a turn of the user's and the assistant's answer to it,
    without one a paragraph. Both are lm-evaluation-harness's (``fewshot_as_multiturn``; GSM8K's
    ``Question: ... Answer: ...``).

    Raises:
        UserError: the chat template does not render.
    """
    if not tokenizer.chat_template:
        blocks = [f"{_plain(shot)} {shot.solution}\n\n" for shot in form.shots]
        system = f"{form.system}\n\n" if form.system else ""
        return system + "".join(blocks) + _plain(question)
    turns = [{"role": "system", "content": form.system}] if form.system else []
    turns += [turn for shot in form.shots for turn in _turns(shot)]
    return _chat(tokenizer, [*turns, _turns(question)[0]], True)


def own_answer(text: str) -> str:
    """A completion up to where the model begins to ask a next question."""
    return _NEXT.split(text, 1)[0]


def _plain(question: Question) -> str:
    """What a model without a chat template is asked; a recipe's template is the whole of it."""
    return question.prompt or f"Question: {question.question}\nAnswer:"


def _generation_stops(folder: Path) -> list[int]:
    path = folder / "generation_config.json"
    eos = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    return eos if isinstance(eos, list) else [] if eos is None else [eos]


def _item(tokenizer: Any, question: Question, form: Form, end: int | None) -> Item:
    chat = bool(tokenizer.chat_template)
    text = prompt_text(tokenizer, question, form)
    prompt = tokenizer.encode(text, add_special_tokens=not chat)
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
        {"role": "user", "content": question.prompt or question.question},
        {"role": "assistant", "content": question.solution},
    ]


def _chat(tokenizer: Any, turns: list[dict[str, str]], ask: bool) -> str:
    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask)
    except Exception as error:  # whatever a model's own Jinja raises
        raise UserError(f"the model's chat template does not render: {error}") from error
    return text


def _end_of_turn(tokenizer: Any, question: Question) -> int | None:
    """The first special token that the template puts behind a solution."""
    eos: int | None = tokenizer.eos_token_id
    if not tokenizer.chat_template:
        return eos
    rest = _chat(tokenizer, _turns(question), False).rpartition(question.solution)[2]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ids: list[int] = tokenizer.encode(rest, add_special_tokens=False)
    return next((i for i in ids if i in special), eos)


def _work(request: Any, emit: Callable[..., None]) -> None:
    settings = TaskSettings(**request["task"])
    made = build(settings, request["seed"])
    splits: dict[str, Sequence[Question]] = {
        "train": made.train,
        "heldout": made.heldout,
        EVALUATION: made.evaluation,
        general.SPLIT: general.questions(),
    }
    form = Form(draw_shots(made.train, settings.shots, request["seed"]), settings.system)
    folder, out = Path(request["folder"]), Path(request["out"])
    encoded = encode(folder, splits, out, form, Room(**request["room"]))
    counts = {
        name: len(questions) - encoded.too_long.get(name, 0)
        for name, questions in splits.items()
        if name != general.SPLIT
    }
    left_out = {**made.left_out, **_by_reason(encoded.too_long)}
    emit("encoded", stop=encoded.stop, chat=encoded.chat, counts=counts, left_out=left_out)


def _by_reason(too_long: dict[str, int]) -> dict[str, int]:
    return {f"{TOO_LONG} ({split})": count for split, count in too_long.items()}


if __name__ == "__main__":
    child.serve(_work)
