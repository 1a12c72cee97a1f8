"""What a run of a pipeline did, or would do, as text for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .pipeline import VALIDATE, PipelineResult, Step
from .plan_text import time_text
from .report_text import report_lines
from .tables import table
from .units import size_text


def result_lines(result: PipelineResult) -> list[str]:
    """What each stage did, where the bundles are, and the report."""
    stages = [
        [name, "unchanged" if facts["skipped"] else "done", f"{facts['seconds']:.1f}"]
        for name, facts in result.stages.items()
    ]
    lines = ["", *table([["stage", "", "seconds"], *stages], numbers=(2,)), ""]
    for bundle in result.bundles:
        place = bundle.folder if bundle.status != "failed" else "FAILED: " + bundle.reason
        lines.append(f"bundle {bundle.target}: {place}")
    for name, report in result.reports.items():
        lines += [f"report {name}: {report.folder / 'report.html'}", "", *report_lines(report.content), ""]
    if result.not_validated:
        lines.append(f"not validated: {', '.join(result.not_validated)}")
    return lines


def preview_lines(steps: Sequence[Step], output: Path, free: int) -> list[str]:
    """What a run would do and why; ``free`` is in bytes."""
    rows = [["stage", "", "time", "on disk", "why"]]
    for step in steps:
        name = f"{step.stage} {step.target}".strip()
        if not step.reason:
            rows.append([name, "unchanged", "", "", ""])
            continue
        size = size_text(step.bytes) if step.bytes is not None else ""
        why = step.reason.splitlines()[0]
        rows.append([name, "runs", "" if step.stage == VALIDATE else time_text(step.seconds), size, why])
    lines, need = table(rows, numbers=(3,)), sum(step.bytes or 0 for step in steps)
    if need:
        lines += ["", f"this writes {size_text(need)} into {output}; free there: {size_text(free)}"]
    return lines
