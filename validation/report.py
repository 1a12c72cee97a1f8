"""The report: HTML and Markdown for a person, JSON for a program, JUnit XML for a CI server."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from .baseline import JSON
from .behaviour_cases import KINDS
from .deployments import MEASURED
from .divergence import DIVERGED
from .gates import FAILS, HOLDS, LOOSENED, NOT_INFORMATIVE, Verdict
from .kl_table import METRICS, TABLE
from .long_context import REFERENCE_CONTEXT
from .pages import format_beside, render
from .result import ValidationResult, to_json
from .scope import scope

HTML, MARKDOWN, JUNIT = "report.html", "report.md", "junit.xml"


def report_junit(result: ValidationResult) -> str:
    """One test case per gate. A gate that fails is a failure with its value, threshold and reason. One that is not informative
    is an error, because a skipped case would leave a build green. Notes and changed thresholds are output."""
    counts = {word: sum(verdict.word == word for verdict in result.verdicts) for word in (FAILS, NOT_INFORMATIVE)}
    suite = ElementTree.Element(
        "testsuite",
        name="foldkv.validate",
        tests=str(len(result.verdicts)),
        failures=str(counts[FAILS]),
        errors=str(counts[NOT_INFORMATIVE]),
    )
    for verdict in result.verdicts:
        gate = verdict.gate
        case = ElementTree.SubElement(suite, "testcase", classname="foldkv.gates", name=gate.name)
        if verdict.word == FAILS:
            value = format_beside(verdict.value, gate.threshold)
            text = f"{gate.metric} is {value}; expected {gate.comparison} {gate.threshold:g}. {gate.reason}"
            ElementTree.SubElement(case, "failure", message=text).text = text
        elif verdict.word == NOT_INFORMATIVE:
            text = f"{NOT_INFORMATIVE}: {verdict.lack}"
            ElementTree.SubElement(case, "error", message=text, type=NOT_INFORMATIVE).text = text
        if gate.changed:
            ElementTree.SubElement(case, "system-out").text = threshold_words(verdict)
    ElementTree.SubElement(suite, "system-out").text = "\n".join([result.headline, *result.notes()])
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def threshold_words(verdict: Verdict) -> str:
    """For example ``loosened: <= 0.001, by default <= 1e-06``."""
    gate = verdict.gate
    return f"{gate.changed}: {gate.comparison} {gate.threshold:g}, by default {gate.comparison} {gate.default:g}"


def report_html(result: ValidationResult) -> str:
    """A page that needs nothing from the network: styles and plots are in it."""
    positions, plots = [row["position"] for row in result.by_position], dict[str, Any]()
    if not result.not_executed:
        plots = {
            "retrieval_plot": _retrieval_plot(result.retrieval),
            "kl_plot": _log_plot(positions, [row["kl_mean"] for row in result.by_position], "mean KL, nats"),
            "error_plot": _log_plot(
                positions, [row["logit_error_max"] for row in result.by_position], "largest logit error"
            ),
        }
    return _rendered(
        "report.html.j2",
        result,
        classes={HOLDS: "good", FAILS: "bad", NOT_INFORMATIVE: "unsure"},
        loosened=LOOSENED,
        diverged_above=DIVERGED,
        reference_context=REFERENCE_CONTEXT,
        kl_metrics=METRICS,
        **plots,
    )


def report_markdown(result: ValidationResult) -> str:
    """Verdicts and tables for a pull request or the summary of a CI run."""
    return _rendered("report.md.j2", result)


def _rendered(template: str, result: ValidationResult, **values: Any) -> str:
    """A template with what all forms show."""
    verdicts = sorted(result.verdicts, key=lambda verdict: _FIRST[verdict.word])
    return render(
        template,
        result=result,
        verdicts=verdicts,
        kl_table=TABLE,
        kinds=KINDS,
        deployments=MEASURED,
        scope=scope(result.provenance),
        **values,
    )


#: In the table, gates that need attention come first.
_FIRST = {FAILS: 0, NOT_INFORMATIVE: 1, HOLDS: 2}


_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 240, 64, 16, 16, 40


def _x(position: float, low: float, high: float) -> float:
    return _LEFT + (position - low) / ((high - low) or 1) * (_WIDTH - _LEFT - _RIGHT)


def _y(share: float) -> float:
    return _TOP + (1 - share) * (_HEIGHT - _TOP - _BOTTOM)


def _log_plot(xs: Sequence[float], ys: Sequence[float], label: str) -> dict[str, Any]:
    """Points and ticks of a line with a logarithmic axis of whole decades; infinite values are on the upper edge."""
    finite = [math.log10(max(y, 1e-16)) for y in ys if math.isfinite(y)] or [-16.0, 0.0]
    low, high = math.floor(min(finite)), math.ceil(max(finite))
    high = max(high, low + 1)
    points = []
    for x, y in zip(xs, ys, strict=True):
        level = math.log10(max(y, 1e-16)) if math.isfinite(y) else high
        points.append((_x(x, min(xs), max(xs)), _y((level - low) / (high - low))))
    step = max(1, (high - low) // 5)
    return {
        "label": label, "points": points, "path": " ".join(f"{x:.1f},{y:.1f}" for x, y in points),
        "y_ticks": [(_y((d - low) / (high - low)), f"1e{d}") for d in range(low, high + 1, step)],
        "x_ticks": [(_x(x, min(xs), max(xs)), f"{x:.0f}") for x in xs[:: max(1, len(xs) // 6)]],
        "width": _WIDTH, "height": _HEIGHT, "left": _LEFT, "right": _WIDTH - _RIGHT, "bottom": _HEIGHT - _BOTTOM,
    }  # fmt: skip


def _retrieval_plot(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    xs = list(range(len(rows)))
    series = []
    for name, shift in (("reference", -5), ("subject", 5)):
        marks = []
        for x, row in zip(xs, rows, strict=True):
            low, high = row[f"{name}_interval"]
            marks.append((_x(x, -0.5, len(rows) - 0.5) + shift, _y(row[name]), _y(low), _y(high)))
        series.append({"name": name, "marks": marks, "path": " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in marks)})
    return {
        "series": series,
        "y_ticks": [(_y(share / 4), f"{share * 25} %") for share in range(5)],
        "x_ticks": [(_x(x, -0.5, len(rows) - 0.5), str(row["distance"])) for x, row in zip(xs, rows, strict=True)],
        "width": _WIDTH, "height": _HEIGHT, "left": _LEFT, "right": _WIDTH - _RIGHT, "bottom": _HEIGHT - _BOTTOM,
    }  # fmt: skip


def write_report(result: ValidationResult, folder: Path) -> None:
    """Write report.html, report.md, report.json and junit.xml into ``folder``."""
    (folder / HTML).write_text(report_html(result), encoding="utf-8")
    (folder / MARKDOWN).write_text(report_markdown(result), encoding="utf-8")
    content = json.dumps(to_json(result), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / JSON).write_text(content + "\n", encoding="utf-8")
    (folder / JUNIT).write_text(report_junit(result), encoding="utf-8")
