"""A report as text for people."""

from __future__ import annotations

from typing import Any

from .tables import table


def report_lines(content: dict[str, Any]) -> list[str]:
    """A report from its JSON: gates, what lacks evidence, notes, what changed, and the verdict."""
    from .validation.report import format_beside

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
