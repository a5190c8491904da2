"""What to try when fine-tuning did not help."""

from __future__ import annotations

from typing import Any

from edgeft.survival import Benefit

# "The Fine-Tuning Trap", arXiv 2606.06920: full fine-tuning below 300M parameters ends worse than
# zero-shot, and is advised against below 500M.
_FULL_FROM = 500e6


def advice(host: Benefit, recipe: dict[str, Any], train: dict[str, Any]) -> list[str]:
    """What to try, likeliest first; nothing where there is a benefit.

    Args:
        recipe: as in ``recipe.yaml``.
        train: as in ``train.json``; empty for an adapter trained elsewhere.
    """
    if host.verdict is None:
        return []
    settings = recipe.get("train") or {}
    if recipe.get(
        "adapter"
    ):  # trained elsewhere: our settings, and an earlier training, are not its
        settings, train = {}, {}
    method, lr = train.get("method") or settings.get("method"), settings.get("lr")
    parameters = train.get("parameters")
    said = []
    if method == "full" and (parameters is None or parameters < _FULL_FROM):
        size = f" and this one has {parameters / 1e6:.0f}M" if parameters else ""
        said.append(
            "Try --method lora or dora: full fine-tuning is advised against below 500M parameters"
            f"{size} (arXiv 2606.06920)."
        )
    points = [p for p in train.get("heldout") or [] if p[1] is not None]
    if len(points) > 1:
        said += _from_curve(points, train, lr)
    falling = len(points) > 1 and points[-1][1] < points[-2][1]
    if host.verdict == "no-benefit" and falling:
        said.append("The held-out loss was still falling: try a larger train.epochs.")
    elif lr and not any("train.lr" in line for line in said):
        said.append(f"Try a lower learning rate, such as --set train.lr={lr / 3:.1g}.")
    if method != "full" and host.verdict == "negative-transfer":
        size = f" than {parameters / 1e6:.0f}M parameters" if parameters else ""
        said.append(f"Try a larger model{size}: this one may be too small for the task.")
    if host.verdict == "no-benefit":
        said.append(
            f"The interval includes 0 at {host.base.n} questions: a larger task.evaluation "
            "narrows it."
        )
    return said


def _from_curve(points: list[Any], train: dict[str, Any], lr: float | None) -> list[str]:
    best = min(points, key=lambda point: point[1])
    first, last = points[0], points[-1]
    rate = f" and --set train.lr={lr / 3:.1g}" if lr else ""
    if best is first:
        return [f"The held-out loss only rose: fewer steps{rate}."]
    if best is last:
        return []
    kept = "" if train.get("keep") == "best" else " (--keep best keeps that point's weights)"
    return [
        f"The held-out loss was lowest at step {best[0]} of {last[0]}: fewer steps{rate}{kept}."
    ]
