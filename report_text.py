"""A report as text for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .tables import table

if TYPE_CHECKING:
    from .validation.trends import Trends


def report_lines(content: dict[str, Any]) -> list[str]:
    """A report from its JSON: gates, what lacks evidence, notes, what changed, and the verdict."""
    from .validation.pages import format_beside

    rows = [["gate", "", "measured", "", "threshold", ""]]
    for gate in content["gates"]:
        word = gate["verdict"].upper() if gate["verdict"] == "fails" else gate["verdict"]
        changed = f"{gate['changed']}, default {gate['default']:g}" if gate["changed"] else ""
        value, threshold = gate["value"], float(gate["threshold"])
        value = format_beside(None if value is None else float(value), threshold)
        rows.append([gate["name"], word, value, gate["comparison"], f"{threshold:g}", changed])
    return [
        *table(rows, numbers=(2,)),
        "",
        *(
            f"{gate['name']} is not informative: {gate['lack']}"
            for gate in content["gates"]
            if gate["verdict"] == "not informative" and not content["not_executed"]
        ),
        *(f"note: {note}" for note in content["notes"]),
        *(_comparison(content["comparison"]) if content["comparison"] else ()),
        ("PASSED: " if content["passed"] else "NOT PASSED: ") + content["headline"],
    ]


def trend_lines(trends: Trends) -> list[str]:
    """Trends: the newest value of every gate on every target, its report, and the values before that it can be compared with."""
    from .validation.pages import format_figure

    rows = [["target", "gate", "verdict", "newest", "", "threshold", "report", "before, newest first"]]
    for target, gates in trends.targets.items():
        for series in gates:
            *earlier, now = series.points
            comparable, after = list[str](), now
            for point in reversed(earlier[-4:]):
                if after.unlike is not None:
                    break
                comparable.append(format_figure(point.value))
                after = point
            before = ", ".join(comparable)
            rows.append(
                [
                    target,
                    series.gate,
                    now.verdict,
                    format_figure(now.value),
                    series.comparison,
                    f"{now.threshold:g}",
                    trends.reports[now.report]["folder"],
                    before,
                ]
            )
    left = [f"left out: {name}: {why}" for name, why in trends.left_out.items()]
    count = len(trends.reports)
    return [
        *table(rows, numbers=(3, 5)),
        "",
        *left,
        f"{count} report{'s' if count != 1 else ''} of the checkpoint {trends.checkpoint[:12]}...",
    ]


def _comparison(found: dict[str, Any]) -> list[str]:
    rows = [["gate", "before", "now", ""]]
    for gate in found["gates"]:
        sides = [
            f"{float(side['value']):.4g}" if side and side["value"] is not None else ""
            for side in (gate["before"], gate["now"])
        ]
        rows.append([gate["name"], *sides, gate["change"]])
    return [
        f"since {found['report']} ({found['date']}; {found['headline']}):",
        *table(rows, numbers=(1, 2)),
        *(f"differs: {difference}" for difference in found["differences"]),
    ]
