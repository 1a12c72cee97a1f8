"""Facts as text: columns are aligned, sizes have units, runs are counted."""

from __future__ import annotations

from foldkv.tables import describe, table


def test_columns_are_aligned_and_lines_end_without_spaces() -> None:
    assert table([["a", "n", ""], ["long", "10", "why"]], numbers=(1,)) == ["a      n", "long  10  why"]


def test_text_has_units_tables_and_runs() -> None:
    facts = {
        "bytes": 3 << 20, "seconds": 90.0, "layer_types": ["a"] * 5 + ["b"], "sizes": [1, 1, 256], "empty": [], "nothing": {},
        "files": {"x": 1024}, "warnings": ["w" * 100, "v" * 100], "rows": [{"name": "n", "sm": 80}, {"name": "longer", "sm": 9}],
    }  # fmt: skip
    assert describe(facts).splitlines() == [
        "bytes: 3.00 MiB", "seconds: 90 s", "layer_types: 5 x a, b", "sizes: 1, 1, 256", "empty: none", "nothing: none",
        "files:", "  x: 1.00 KiB", "warnings:", f"  {'w' * 100}", f"  {'v' * 100}", "rows:", "  name    sm", "  n       80", "  longer  9",
    ]  # fmt: skip
