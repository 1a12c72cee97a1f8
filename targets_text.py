"""Targets, and which of a model's operators have plugins there, as text for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .manifests import OperatorCoverage
from .optimize.targets import Target
from .plugins.coverage import CoverageRow
from .tables import table


def target_lines(targets: Iterable[Target], built_with: Mapping[str, Sequence[str]]) -> list[str]:
    """A table of targets; ``built_with`` has by name the backends that this machine can build for one with."""
    rows = [["target", "sm", "memory", "GB/s", "precision", "backends", "built here"]]
    for target in targets:
        memory = f"{target.memory_gib} GiB" if target.memory_gib else ""
        cells = [str(target.sm or ""), memory, str(target.bandwidth_gb_s or ""), target.precision]
        here = built_with[target.name]
        first = "yes" if target.backends[0] in here else f"with --backend {here[0]}" if here else "no"
        rows.append([target.name, *cells, ", ".join(target.backends), first])
    lines = table(rows, numbers=(1, 2, 3))
    if any(row[-1] != "yes" for row in rows[1:]):
        lines.append("`foldkv targets --json` shows what is missing for a target with its first backend.")
    return lines


def coverage_lines(found: Sequence[CoverageRow], sms: Sequence[int], bodies: Mapping[str, str]) -> list[str]:
    """A table of operators by compute capability, with the reasons why there is no plugin."""
    rows = [["operator", "state", "rows", "type", *(f"sm{sm}" for sm in sms)]]
    reasons: dict[str, int] = {}
    for row in found:
        marks = ["yes" if not gap else f"no ({reasons.setdefault(gap, len(reasons) + 1)})" for gap in row.gaps.values()]
        rows.append([row.operator, row.group, row.row_format, row.dtype, *marks])
    return [
        *table(rows),
        *(f"({number}) {reason}" for reason, number in reasons.items()),
        *(f"{operator} {why}." for operator, why in bodies.items()),
    ]


def injection_lines(operators: Sequence[OperatorCoverage]) -> list[str]:
    """A table of the operators of an injected graph, with the reasons of those that got no plugin."""
    rows = [["operator", "nodes", "plugin", "why not"]]
    for row in operators:
        why = "; ".join(f"{count} x {reason}" for reason, count in row.refusals.items())
        rows.append([row.operator, str(row.nodes), str(row.injected), why])
    return table(rows, numbers=(1, 2))
