"""All targets of a run in one table: what was tried to keep the benefit, and what it cost.

python benchmarks/repair/table.py runs/demo
"""

from __future__ import annotations

import argparse
from pathlib import Path

from edgeft.report.build import build
from edgeft.report.figures import megabytes, number, percent, ratio_interval
from edgeft.report.results import LOCAL


def main() -> None:
    """Parse, read, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    report = build(parser.parse_args().run)
    scores = {
        (group.group, group.target): group.score
        for group in report.groups
        if group.device in (LOCAL, None)
    }
    [group] = {name for name, _ in scores} or [None]
    print(f"| | size | base | tuned | retention (95% interval) | {group} | general | tok/s |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")

    def unseen(target: str | None) -> str:
        found = scores.get((str(group), target))
        return f"{round(found.tuned.accuracy * found.tuned.n)} of {found.tuned.n}" if found else ""

    host, here = report.host, [v for v in report.variants if v.device == LOCAL]
    change = f"{report.forgetting.nll_change:+.2f}" if report.forgetting else ""
    print(
        f"| host | | {percent(host.base.accuracy)} | {percent(host.tuned.accuracy)} | "
        f"| {unseen(None)} | {change} | |"
    )
    for v in sorted(here, key=lambda v: v.target):
        s, left = v.survival, ""
        if s.retention is not None and s.retention_ci is not None:
            left = f"{s.retention:.2f} ({ratio_interval(s.retention_ci)})"
        change = f"{v.general.nll_change:+.2f}" if v.general else ""
        speed = number((v.latency or {}).get("decode_tok_s"), "{:.0f}")
        print(
            f"| {v.target} | {megabytes(v.bytes)} | {percent(s.here.base.accuracy)} "
            f"| {percent(s.here.tuned.accuracy)} | {left} | {unseen(v.target)} | {change} "
            f"| {speed} |"
        )


if __name__ == "__main__":
    main()
