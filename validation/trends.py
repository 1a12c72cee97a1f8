"""How the figures of one model moved from report to report: a page with one plot per gate and target."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..artifact import artifact_kind, write_whole
from ..errors import FoldkvError, InputError, listing
from ..manifests import EvidenceManifest
from .baseline import JSON, read_report, unlike
from .gates import FAILS, HOLDS, NOT_INFORMATIVE, PROFILE_GATES
from .pages import plain, render

#: What tells series apart, beside the gate.
_KIND = ("target", "backend", "profile", "precision", "layout")
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 300, 120, 56, 10, 100


@dataclass(frozen=True)
class Point:
    """A gate in one report.

    Attributes:
        report: number of the report in the page's list.
        value: None if nothing was measured.
        threshold: that it was judged by.
        verdict: ``holds``, ``fails`` or ``not informative``.
        unlike: why the value cannot be compared with the one before; None if it can.
    """

    report: int
    value: float | None
    threshold: float
    verdict: str
    unlike: str | None


@dataclass(frozen=True)
class Series:
    """A gate on one target, by date."""

    gate: str
    metric: str
    comparison: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Trends:
    """What a folder of reports says.

    Attributes:
        checkpoint: sha256 of the model's checkpoint.
        reports: by date: folder (relative to the folder that was read), date, version of foldkv, target, headline, whether it passed.
        targets: name of a kind of bundle -> its gates.
        left_out: reports that this version cannot read, and why.
    """

    checkpoint: str
    reports: list[dict[str, Any]]
    targets: dict[str, list[Series]]
    left_out: dict[str, str]


def read_trends(folder: Path) -> Trends:
    """The trends of all reports in a folder, however deep they lie.

    Raises:
        InputError: it has no report that this version reads, or reports of several checkpoints.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not a folder; expected the folder that holds the folders of --report. Check the path."
        )
    found, left_out = list[tuple[str, dict[str, Any]]](), dict[str, str]()
    for file in sorted(folder.rglob(JSON)):
        name = file.parent.relative_to(folder).as_posix()
        if artifact_kind(file.parent) == EvidenceManifest.KIND:
            continue  # it has a copy of a report
        try:
            found.append((name, read_report(file.parent)))
        except FoldkvError as error:
            left_out[name] = str(error)
    if not found:
        reasons = [f"{name}: {why}" for name, why in left_out.items()]
        title = f"{folder} has no report that can be read"
        raise InputError(
            listing(title, reasons or [f"no {JSON} was found"], "Give the folder that holds the folders of --report.")
        )
    found.sort(key=lambda row: (row[1]["provenance"]["date"], row[0]))
    checkpoints: dict[str, list[str]] = {}
    for name, content in found:
        checkpoints.setdefault(content["provenance"]["checkpoint_sha256"], []).append(name)
    if len(checkpoints) > 1:
        rows = [f"{sha[:12]}...: {', '.join(names)}" for sha, names in checkpoints.items()]
        raise InputError(
            listing(
                f"{folder} has reports of {len(checkpoints)} checkpoints",
                rows,
                "Give a folder with the reports of one.",
            )
        )
    reports = [
        {"folder": name, "passed": content["passed"], "headline": content["headline"]}
        | {key: content["provenance"][key] for key in ("date", "foldkv", *_KIND)}
        for name, content in found
    ]
    return Trends(next(iter(checkpoints)), reports, _targets([content for _, content in found]), left_out)


def _targets(reports: Sequence[dict[str, Any]]) -> dict[str, list[Series]]:
    kinds: dict[tuple[str, ...], list[int]] = {}
    for number, content in enumerate(reports):
        about = content["provenance"]
        # Versions of a backend are one series.
        key = tuple(about[name].partition(" ")[0] if name == "backend" else about[name] for name in _KIND)
        kinds.setdefault(key, []).append(number)
    differing = [at for at in range(len(_KIND)) if len({key[at] for key in kinds}) > 1 or not at]
    return {", ".join(key[at] for at in differing): _series(reports, numbers) for key, numbers in sorted(kinds.items())}


def _series(reports: Sequence[dict[str, Any]], numbers: Sequence[int]) -> list[Series]:
    gates: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for number in numbers:
        for gate in reports[number]["gates"]:
            gates.setdefault(gate["name"], []).append((number, gate))
    found = []
    for name, rows in gates.items():
        points, before = list[Point](), None
        for number, gate in rows:
            value = None if gate["value"] is None else float(gate["value"])
            why = None if before is None else _unlike(reports, before, (number, gate))
            points.append(Point(number, value, float(gate["threshold"]), gate["verdict"], why))
            before = (number, gate) if value is not None else before
        found.append(Series(name, rows[-1][1]["metric"], rows[-1][1]["comparison"], tuple(points)))
    return found


def _unlike(
    reports: Sequence[dict[str, Any]], before: tuple[int, dict[str, Any]], now: tuple[int, dict[str, Any]]
) -> str | None:  # fmt: skip
    old, new = (reports[number]["provenance"] for number, _ in (before, now))
    known = {gate.name: gate for gate in PROFILE_GATES.get(new["profile"], ())}
    gate = known.get(now[1]["name"])
    if gate is None:
        return "a gate that this version does not know"
    return unlike(gate.of, now[1]["metric"], before[1]["metric"], old, new)


def check_page(path: Path) -> None:
    """Check the name of a page.

    Raises:
        InputError: it does not end in .html.
    """
    if Path(path).suffix.lower() != ".html":
        raise InputError(f"the page of trends is written as .html; {path} ends in {Path(path).suffix!r}.")


def write_page(trends: Trends, path: Path, folder: Path) -> None:
    """Write the page; it needs nothing from the network. Reports are linked relative to it.

    Args:
        trends: of ``folder``.
        path: of the page.
        folder: that was read.

    Raises:
        InputError: the path does not end in .html.
        SystemFailure: it cannot be written.
    """
    check_page(path)
    base = os.path.relpath(Path(folder).resolve(), Path(path).resolve().parent)
    links = [(Path(base) / row["folder"] / "report.html").as_posix() for row in trends.reports]
    page = render(
        "trends.html.j2", trends=trends, links=links, plot=plot, last=_last,
        classes={HOLDS: "good", FAILS: "bad", NOT_INFORMATIVE: "unsure"},
    )  # fmt: skip
    write_whole(Path(path), page)


def _last(series: Series) -> dict[str, Any]:
    """The newest point of a series, and how its value changed since the newest one that it can be compared with."""
    *earlier, now = series.points
    measured = [point for point in earlier if point.value is not None]
    if now.value is None or not measured or now.unlike is not None:
        return {"now": now, "ratio": None}
    before = measured[-1].value or 0.0
    return {"now": now, "ratio": now.value / before if before and math.isfinite(before) else None}


def plot(series: Series) -> dict[str, Any]:
    """Coordinates of a small plot: values by report, thresholds, and lines between values that can be compared.

    Errors (the smaller, the better) have a logarithmic axis, shares a linear one. Infinite values are on the upper edge.
    """
    values = [point.value for point in series.points if point.value is not None and math.isfinite(point.value)]
    levels = [*values, *(point.threshold for point in series.points if math.isfinite(point.threshold))]
    logarithmic = (
        series.comparison == "<=" and all(level >= 0 for level in levels) and any(level > 0 for level in levels)
    )
    least = min((level for level in levels if level > 0), default=1.0) / 10

    def scale(level: float) -> float:
        return math.log10(max(level, least)) if logarithmic else level

    low, high = min(map(scale, levels), default=0.0), max(map(scale, levels), default=1.0)
    if logarithmic:
        low, high = math.floor(low), math.ceil(high)
    if high <= low:
        low, high = low - 0.5, high + 0.5

    def y(level: float) -> float:
        share = (scale(level) - low) / (high - low) if math.isfinite(level) else float(level > 0)
        return round(_BOTTOM - share * (_BOTTOM - _TOP), 1)

    step = (_WIDTH - _LEFT - 16) / max(1, len(series.points) - 1)
    marks, lines, before = [], [], None
    for at, point in enumerate(series.points):
        x = round(_LEFT + 6 + at * step, 1)
        if point.value is None or math.isnan(point.value):
            continue
        marks.append({"x": x, "y": y(point.value), "point": point})
        if before is not None and point.unlike is None:
            lines.append((*before, x, y(point.value)))
        before = (x, y(point.value))
    thresholds = [
        (round(_LEFT + 6 + at * step - 5, 1), round(_LEFT + 6 + at * step + 5, 1), y(point.threshold))
        for at, point in enumerate(series.points)
        if math.isfinite(point.threshold)
    ]
    ticks = [
        (y(10**level if logarithmic else level), f"1e{level:.0f}" if logarithmic else f"{level:.3g}")
        for level in (low, high)
    ]
    return {
        "marks": marks, "lines": lines, "thresholds": thresholds, "ticks": ticks, "width": _WIDTH, "height": _HEIGHT,
        "left": _LEFT, "bottom": _BOTTOM, "top": _TOP,
    }  # fmt: skip


def facts(trends: Trends) -> dict[str, Any]:
    """The trends as JSON values; infinity is the string "inf"."""
    return plain(asdict(trends))  # type: ignore[no-any-return]
