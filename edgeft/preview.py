"""``edgeft prompt``: a question as the model sees it, with what training learns from in colour."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from edgeft import child, model
from edgeft.prompts import read_items
from edgeft.recipe import Recipe
from edgeft.tasks import SHOTS_OUT_OF

_SPLITS = ("train", "evaluation")
_LEARNT, _READ = "bold green", "dim"
_DIGITS = 6


def preview(recipe: Recipe, count: int) -> list[dict[str, Any]]:
    """The first questions of the training and evaluation splits.

    Returns:
        One object a question: ``split``, ``id``, ``text`` (the rendered prompt), ``answer``, and
        ``tokens``, each with ``id``, ``text`` and ``loss`` (whether training learns it).

    Raises:
        UserError: the model's tokenizer or the questions cannot be had.
    """
    task = recipe.task
    enough = max(count, task.shots, SHOTS_OUT_OF)  # more would change nothing that is shown
    task = replace(task, limit=min(enough, task.limit or enough))
    with tempfile.TemporaryDirectory() as scratch:
        request = {
            "folder": str(model.tokenizer_folder(recipe.model, Path(scratch) / "model")),
            "out": scratch,
            "task": asdict(task),
            "seed": recipe.question_seed,
            "room": {},
        }
        child.run("edgeft.prompts", request)
        from tokenizers import Tokenizer

        words = Tokenizer.from_file(f"{scratch}/tokenizer/tokenizer.json")
        return [
            {
                "split": split,
                "id": item.id,
                "text": item.text,
                "answer": item.answer,
                "tokens": [
                    {"id": i, "text": text, "loss": at >= len(item.prompt)}
                    for at, (i, text) in enumerate(_pieces(words, [*item.prompt, *item.gold]))
                ],
            }
            for split in _SPLITS
            for item in read_items(Path(scratch) / f"{split}.jsonl")[:count]
        ]


def _pieces(words: Any, ids: list[int]) -> list[tuple[int, str]]:
    """Each id with the text that it adds; a character of several tokens comes with its last."""
    pieces, told = [], ""
    for i, token in enumerate(ids):
        text = words.decode(ids[: i + 1], skip_special_tokens=False)
        new = "" if text.endswith("\ufffd") else text[len(told) :]
        told = told if text.endswith("\ufffd") else text
        pieces.append((token, new))
    return pieces


def show(questions: list[dict[str, Any]]) -> None:
    """Print them; green: what training learns from, its loss mask."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for question in questions:
        tokens = question["tokens"]
        learnt = sum(token["loss"] for token in tokens)
        role = "learnt" if question["split"] == "train" else "gold answer, scored by likelihood"
        head = f"{question['split']}: {question['id']}, {len(tokens) - learnt} tokens + {learnt} "
        console.print(Text(f"{head}({role}); answer {question['answer']}", "bold"), soft_wrap=True)
        body, ids = Text(), Text()
        for token in tokens:
            style = _LEARNT if token["loss"] else _READ
            body.append(token["text"], style)
            ids.append(f"{token['id']:>{_DIGITS}}", style).append(" ")
        console.print(body, soft_wrap=True)
        console.print(ids)
        console.print()
