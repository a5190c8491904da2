"""A fixed set of prompts that are not math: did tuning cost what the model knew before?

A smoke test of forgetting, not a benchmark. It is scored by log-likelihoods alone.
"""

from __future__ import annotations

import tomllib
from importlib.resources import files

from edgeft.tasks import Question

SPLIT = "general"  # the name of its file beside the task's own splits


def questions() -> list[Question]:
    """One question a choice, with the id ``general-<prompt>/<choice>``; choice 0 is the right one.

    ``solution`` and ``answer`` are both the whole answer with that choice in it.
    """
    text = (files("edgeft.tasks") / "general.toml").read_text(encoding="utf-8")
    found = []
    for i, prompt in enumerate(tomllib.loads(text)["prompt"]):
        for j, choice in enumerate(prompt["choices"]):
            answer = prompt["answer"].replace("{}", choice)
            found.append(Question(f"general-{i}/{j}", prompt["question"], answer, answer))
    return found
