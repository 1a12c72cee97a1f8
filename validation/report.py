"""The report: HTML for a person, JSON for a program, JUnit XML for a CI server."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from foldkv.validation.layers import DIVERGED, first_divergence
from foldkv.validation.long_context import REFERENCE_CONTEXT

if TYPE_CHECKING:
    from foldkv.validation.validate import ValidationResult

HTML, JSON, JUNIT = "report.html", "report.json", "junit.xml"
SCHEMA_VERSION = 1


def report_json(result: ValidationResult) -> dict[str, Any]:
    """The report as JSON values, as schema/report.schema.json describes them. Infinity is the string "inf"."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "passed": result.passed,
        "gates": [{**vars(v.gate), "value": v.value, "passed": v.passed} for v in result.verdicts],
        "metrics": result.metrics,
        "retrieval": result.retrieval,
        "layers": [vars(figure) for figure in result.layers],
        "selection": [vars(figure) for figure in result.selection],
        "long_context": [asdict(figure) for figure in result.long_context],
        "first_divergence": first_divergence(result.layers),
        "by_position": result.by_position,
        "worst_cases": result.worst,
        "provenance": result.provenance,
    }
    return _plain(content)  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def report_junit(result: ValidationResult) -> str:
    """One test case per gate; a failed gate is a failure with its value, threshold and reason."""
    failed = [verdict for verdict in result.verdicts if not verdict.passed]
    suite = ElementTree.Element(
        "testsuite", name="foldkv.validate", tests=str(len(result.verdicts)), failures=str(len(failed)), errors="0"
    )
    for verdict in result.verdicts:
        gate = verdict.gate
        case = ElementTree.SubElement(suite, "testcase", classname="foldkv.gates", name=gate.name)
        if not verdict.passed:
            text = f"{gate.metric} is {verdict.value:g}; expected {gate.comparison} {gate.threshold:g}. {gate.reason}"
            ElementTree.SubElement(case, "failure", message=text).text = text
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def report_html(result: ValidationResult) -> str:
    """A page that needs nothing from the network: styles and plots are in it."""
    import jinja2

    source = resources.files("foldkv.validation").joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["figure"] = format_figure
    positions = [row["position"] for row in result.by_position]
    return environment.from_string(source).render(
        result=result,
        verdicts=result.verdicts,
        first_divergence=first_divergence(result.layers),
        diverged_above=DIVERGED,
        reference_context=REFERENCE_CONTEXT,
        failed=[v for v in result.verdicts if not v.passed],
        retrieval_plot=_retrieval_plot(result.retrieval),
        kl_plot=_log_plot(positions, [row["kl_mean"] for row in result.by_position], "mean KL, nats"),
        error_plot=_log_plot(positions, [row["logit_error_max"] for row in result.by_position], "largest logit error"),
    )


def format_figure(value: float) -> str:
    """Four significant digits; small and large values in powers of ten."""
    if not math.isfinite(value):
        return {"inf": "∞", "-inf": "-∞", "nan": "not a number"}[str(value)]
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:.4g}" if 1e-3 <= abs(value) < 1e5 else f"{value:.1e}"


_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 240, 64, 16, 16, 40


def _x(position: float, low: float, high: float) -> float:
    return _LEFT + (position - low) / ((high - low) or 1) * (_WIDTH - _LEFT - _RIGHT)


def _y(share: float) -> float:
    return _TOP + (1 - share) * (_HEIGHT - _TOP - _BOTTOM)


def _log_plot(xs: Sequence[float], ys: Sequence[float], label: str) -> dict[str, Any]:
    """Points and ticks of a line with a logarithmic axis of whole decades; infinite values lie on the upper edge."""
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
    """Write report.html, report.json and junit.xml into ``folder``."""
    (folder / HTML).write_text(report_html(result), encoding="utf-8")
    (folder / JSON).write_text(json.dumps(report_json(result), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    (folder / JUNIT).write_text(report_junit(result), encoding="utf-8")
