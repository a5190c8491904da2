"""Whether a run keeps enough of its benefit: for other people's CI.

What is asked of every target on every device is one of:

* with ``min_retention``: that the estimate of retention reaches it, as in ``edgeft report
  --min-retention``; the interval is shown beside it;
* with ``confident`` too: that the lower end of the 95% interval does, which needs more questions;
* without: that the verdict is ``survives``, which is the lower end against the recipe's ``keep``.

What was asked for by name and never benched fails, for a CI must not be green on something missing.
Where nothing is named, all that was benched is checked, and a run with nothing benched fails.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from edgeft import catalog
from edgeft import run as runs
from edgeft.errors import UserError, near
from edgeft.report.build import Report, build
from edgeft.report.figures import NONE, Table, percent, ratio_interval
from edgeft.report.markdown import as_table, escaped
from edgeft.report.variant import Variant
from edgeft.survival import Interval, Survival

SUMMARY = "GITHUB_STEP_SUMMARY"  # GitHub's name of the file that a step's summary is appended to
_EVERY = "every target"
# What XML 1.0 has no place for, not even escaped.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Wanted:
    """What is asked of retention; see the module's text.

    Attributes:
        min_retention: None: the verdict must be ``survives``.
        confident: the interval's lower end must reach it.
    """

    min_retention: float | None = None
    confident: bool = False

    @property
    def estimate(self) -> bool:
        """Whether it is the estimate that counts, and not the interval's lower end."""
        return self.min_retention is not None and not self.confident

    def __post_init__(self) -> None:
        share = self.min_retention
        if share is not None and not (math.isfinite(share) and share > 0):
            raise UserError(f"--min-retention takes a share of the benefit, as 0.9, not {share}")


@dataclass(frozen=True)
class Row:
    """One target on one device.

    Attributes:
        device: None: the target was benched nowhere.
        why: what it keeps, or why it fails, as the end of a sentence that begins with its name.
        retention: None where it was not benched or the host has no benefit.
        verdict: None where it was not benched.
    """

    target: str
    device: str | None
    passed: bool
    why: str
    retention: float | None = None
    retention_ci: Interval | None = None
    verdict: str | None = None

    @property
    def name(self) -> str:
        """What a sentence calls it."""
        return self.target if self.device is None else f"{self.target} on {self.device}"


@dataclass(frozen=True)
class Checked:
    """The result.

    Attributes:
        run: the run's name.
        line: all of it in one line.
    """

    run: str
    wanted: Wanted
    passed: bool
    line: str
    rows: list[Row]


def check_run(
    run: Path,
    wanted: Wanted,
    targets: Sequence[str] | None = None,
    devices: Sequence[str] | None = None,
) -> Checked:
    """Check a run directory; nothing is written there.

    Args:
        targets: names, or formats for all benched targets of theirs; None: all.
        devices: names; None: all that benched such a target.

    Raises:
        UserError: it is no run, or it has no scores on the host.
    """
    report = build(runs.check(run))
    return check(report, wanted, named(targets or [], report.variants), devices or [])


def check(
    report: Report, wanted: Wanted, targets: Sequence[str] = (), devices: Sequence[str] = ()
) -> Checked:
    """Check a report; no ``targets`` or no ``devices``: all of them."""
    benched = list(dict.fromkeys(v.target for v in report.variants))
    rows: list[Row] = []
    for target in dict.fromkeys(targets or benched):
        found = {v.device: v for v in report.variants if v.target == target}
        hint = "" if found or not benched else f" ({near(target, benched).removeprefix('; ')})"
        places: list[str | None] = [*(devices or found)] or [None]
        for device in dict.fromkeys(places):
            if variant := found.get(device or ""):
                rows.append(_row(variant, report, wanted))
            elif targets:
                rows.append(Row(target, device, False, f"was never benched{hint}"))
    if not targets:
        rows += _missing(report, devices)
    passed = bool(rows) and all(row.passed for row in rows)
    return Checked(report.name, wanted, passed, _line(report, rows, wanted), rows)


def named(asked: Sequence[str], variants: Sequence[Variant]) -> list[str]:
    """The targets that are meant: a format's name stands for every benched target of it."""
    benched = list(dict.fromkeys(v.target for v in variants))
    formats = {name: target.format for name, target in catalog.targets().items()} if asked else {}
    found: list[str] = []
    for name in asked:
        of_format = [t for t in benched if formats.get(t) == name]
        found += [name] if name in benched else of_format or [name]
    return list(dict.fromkeys(found))


def _row(variant: Variant, report: Report, wanted: Wanted) -> Row:
    s = variant.survival
    place = (variant.target, variant.device)
    if s.retention is None or s.retention_ci is None:
        few = f"cannot be judged: the {s.here.tuned.n} questions asked there show no benefit on the host"
        why = f"has nothing to keep: {s.verdict} on the host" if report.host.verdict else few
        return Row(*place, False, why, verdict=s.verdict)
    if wanted.min_retention is None:
        passed = s.verdict == "survives"
    else:
        passed = _figure(s, wanted) >= wanted.min_retention
    why = _kept(s.retention, s.retention_ci, report, wanted)
    if not passed:
        verdict = f"is {s.verdict}: " if wanted.min_retention is None else ""
        why = f"{verdict}{why}, {_asked(report, wanted)}"
        if s.needed_questions:
            why += f" (about {s.needed_questions:,} questions would decide it)"
    return Row(*place, passed, why, s.retention, s.retention_ci, s.verdict)


def _kept(retention: float, ci: Interval, report: Report, wanted: Wanted) -> str:
    """Retention in words; what misses by less than two decimals shows that it does."""
    least = _least(report, wanted)
    if wanted.estimate:
        return f"keeps {_told_from(retention, least)} ({ratio_interval(ci)}) of the benefit"
    interval = f"{_told_from(ci[0], least)} to {ci[1]:z.2f}"
    return f"keeps {retention:z.2f} ({interval}) of the benefit"


def _missing(report: Report, devices: Sequence[str]) -> list[Row]:
    """Devices with nothing benched that were asked for, or the run if it has nothing at all."""
    known = {v.device for v in report.variants}
    rows = [
        Row(_EVERY, device, False, "is missing: nothing was benched there")
        for device in dict.fromkeys(devices)
        if device not in known
    ]
    if not known and not rows:
        rows.append(Row(_EVERY, None, False, "is missing: nothing was benched"))
    return rows


def _line(report: Report, rows: Sequence[Row], wanted: Wanted) -> str:
    failed = [row for row in rows if not row.passed]
    host = report.host
    said = []
    if host.verdict:
        said.append(
            f"{host.verdict} on the host: {percent(host.base.accuracy)} right before fine-tuning "
            f"and {percent(host.tuned.accuracy)} after, so there is nothing to keep"
        )
        failed = [row for row in failed if row.verdict is None]
    said += [f"{row.name} {row.why}" for row in failed]
    passed = [row for row in rows if row.passed]
    if said:
        if passed:
            said.append(f"{_names(passed)} {'passes' if len(passed) == 1 else 'pass'}")
        return _one_line(f"check failed: {'; '.join(said)}")
    least = min(passed, key=lambda row: _figure(row, wanted))
    return _one_line(
        f"check passed: {_names(passed)}; {_asked(report, wanted)}, the least is {least.name}, "
        f"which {least.why}"
    )


def _least(report: Report, wanted: Wanted) -> float:
    return report.keep if wanted.min_retention is None else wanted.min_retention


def _asked(report: Report, wanted: Wanted) -> str:
    for_sure = "" if wanted.estimate else " for sure"
    return f"{_share(_least(report, wanted))} are wanted{for_sure}"


def _figure(found: Row | Survival, wanted: Wanted) -> float:
    """The figure that counts, of what has one."""
    assert found.retention is not None and found.retention_ci is not None
    return found.retention if wanted.estimate else found.retention_ci[0]


def _names(rows: Sequence[Row]) -> str:
    """Targets, with their devices where there is more than one."""
    several = len({row.device for row in rows}) > 1
    at: dict[str, list[str]] = {}
    for row in rows:
        at.setdefault(row.target, []).append(str(row.device))
    return ", ".join(f"{t} on {' and '.join(d)}" if several else t for t, d in at.items())


def _told_from(value: float, least: float) -> str:
    """A figure to two decimals, or to as many more as show that it is under ``least``."""
    texts = [f"{value:z.{digits}f}" for digits in range(2, 16)]
    return next((text for text in texts if value >= least or float(text) < least), texts[-1])


def _share(share: float) -> str:
    """0.9 as ``0.90``, 0.925 as it is."""
    return f"{share:.2f}" if round(share, 2) == share else f"{share:g}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def as_json(checked: Checked) -> dict[str, Any]:
    """What ``--json`` prints."""
    return {"schema": 1, **asdict(checked)}


def write_junit(checked: Checked, path: Path) -> None:
    """JUnit XML: one test case a target and device, ``classname`` is the run's name and the device.

    Raises:
        UserError: it cannot be written.
    """
    failures = str(sum(not row.passed for row in checked.rows))
    counts = {"tests": str(len(checked.rows)), "failures": failures, "errors": "0"}
    every = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(every, "testsuite", {"name": _xml(checked.run), **counts})
    for row in checked.rows:
        group = checked.run if row.device is None else f"{checked.run}.{row.device}"
        names = {"classname": _xml(group), "name": _xml(row.target), "time": "0"}
        case = ElementTree.SubElement(suite, "testcase", names)
        sentence = _xml(_one_line(f"{row.name} {row.why}"))
        if row.passed:
            ElementTree.SubElement(case, "system-out").text = sentence
        else:
            about = {"message": sentence, "type": row.verdict or "missing"}
            ElementTree.SubElement(case, "failure", about).text = sentence
    ElementTree.indent(every)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        ElementTree.ElementTree(every).write(temporary, encoding="utf-8", xml_declaration=True)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {runs.disk_reason(error)}") from error


def _xml(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)


def summary(checked: Checked) -> str:
    """Markdown: the line, and a table of what was checked."""
    rows = [
        [
            row.target,
            row.device or NONE,
            NONE
            if row.retention is None or row.retention_ci is None
            else f"{row.retention:z.2f} ({ratio_interval(row.retention_ci)})",
            row.verdict or "not benched",
            "✓ pass" if row.passed else "✗ fail",
        ]
        for row in checked.rows
    ]
    header = ["target", "device", "retention (95% interval)", "verdict", ""]
    table = as_table(Table("", "", header, rows, (2, 2)))
    return f"### edgeft: {escaped(checked.run)}\n\n{escaped(checked.line)}\n\n{table}\n"


def append_summary(checked: Checked) -> None:
    """Append the summary to the file that GitHub Actions names, if it names one.

    Raises:
        UserError: that file cannot be written.
    """
    if not (place := os.environ.get(SUMMARY)):
        return
    try:
        with Path(place).open("a", encoding="utf-8", errors="replace") as out:
            out.write(summary(checked) + "\n")
    except OSError as error:
        raise UserError(f"cannot append to {SUMMARY}={place}: {error.strerror}") from error
