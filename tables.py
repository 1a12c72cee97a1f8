"""Facts as text for people: tables with aligned columns, and nested facts as one line each, with sizes in units."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .units import duration_text, size_text


def table(rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> list[str]:
    """The lines of a table: columns aligned, those in ``numbers`` to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


_LONG = 120  # a list with more characters is written one item per line,
_FEW = 4  # or counted if its items repeat that often


def describe(facts: Mapping[str, Any]) -> str:
    """Facts as lines for people: nested facts are indented, rows of one shape become a table."""
    return "\n".join(_lines(facts, "", ""))


def _lines(facts: Mapping[str, Any], indent: str, parent: str) -> list[str]:
    lines: list[str] = []
    for name, value in facts.items():
        if isinstance(value, Mapping) and value:
            rows = _rows(value)
            lines.append(f"{indent}{name}:")
            lines += _indented(rows, f"{indent}  ") if rows else _lines(value, f"{indent}  ", name)
        elif isinstance(value, Sequence) and value and all(isinstance(row, Mapping) for row in value):
            columns = list(dict.fromkeys(key for row in value for key in row))
            lines.append(f"{indent}{name}:")
            lines += _indented(
                [columns, *([_text(key, row.get(key), "") for key in columns] for row in value)], f"{indent}  "
            )
        elif isinstance(value, Sequence) and not isinstance(value, str) and len(", ".join(map(str, value))) > _LONG:
            counts = Counter(_text("", item, name) for item in value)
            if len(value) > _FEW * len(counts):
                found = ", ".join(f"{count} x {text}" for text, count in counts.items())
                lines.append(f"{indent}{name}: {len(value)} ({found})")
                continue
            lines.append(f"{indent}{name}:")
            lines += [f"{indent}  {_text('', item, name)}" for item in value]
        else:
            lines.append(f"{indent}{name}: {_text(name, value, parent)}")
    return lines


def _rows(table: Mapping[str, Any]) -> list[list[str]]:
    """A mapping of rows of one shape, as a table; empty for anything else."""
    if not all(isinstance(row, Mapping) and row for row in table.values()):
        return []
    columns = list(next(iter(table.values())))
    if len(table) < 2 or any(list(row) != columns for row in table.values()):
        return []
    cells = [cell for row in table.values() for cell in row.values() if isinstance(cell, Mapping)]
    if any(not isinstance(value, int | str) for cell in cells for value in cell.values()):
        return []
    return [["", *columns], *([name, *(_text(key, row[key], "") for key in columns)] for name, row in table.items())]


def _indented(rows: list[list[str]], indent: str) -> list[str]:
    return [f"{indent}{line}".rstrip() for line in table(rows)]


def _text(name: str, value: Any, parent: str) -> str:
    """One fact: bytes and seconds in units, lists with commas, runs of equal values counted."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, int):
        if name == "bytes" or name.endswith("_bytes") or parent in ("files", "sequence_bytes"):
            return size_text(value)
        return f"{value:,}" if abs(value) > 9999 else str(value)
    if isinstance(value, float):
        if name == "seconds":
            return duration_text(value)
        return f"{value:.6g}" if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(key, item, name)}" for key, item in value.items()) or "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        runs: list[list[Any]] = []
        for item in value:
            if runs and runs[-1][0] == item:
                runs[-1][1] += 1
            else:
                runs.append([item, 1])
        long = len(value) > 4  # [1, 1, 256] is three sizes, not a run of two
        texts = [
            f"{count} x {_text('', item, name)}" if count > 1 and long else ", ".join([_text("", item, name)] * count)
            for item, count in runs
        ]
        return ", ".join(texts) or "none"
    return str(value)
