"""The table of the CUDA provider's kernels as its script writes it, from kernels that are made up."""

from __future__ import annotations

import json
from pathlib import Path

import provider_kernels
from provider_kernels import TABLE, _merged, write


def pairs(kernels: list[dict[str, list[str]]]) -> set[tuple[str, str]]:
    return {(t, u) for kernel in kernels for t in kernel["T"] for u in kernel["U"]}


def test_kernels_in_fewer_rows_are_the_same_kernels() -> None:
    kernels = [{"T": [t], "U": ["float", "int64"]} for t in ("float", "double")]
    kernels += [{"T": ["float16"], "U": ["float"]}, {"T": ["float16"], "U": ["float16"]}]
    rows = _merged([*kernels, kernels[0]])
    assert len(rows) == 2 and pairs(rows) == pairs(kernels)
    assert ("float16", "int64") not in pairs(rows)
    assert kernels[0] == {"T": ["float"], "U": ["float", "int64"]}


def test_a_table_that_is_written_again_has_the_same_bytes(tmp_path: Path) -> None:
    write(json.loads(TABLE.read_text()), tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == TABLE.read_bytes()
    assert provider_kernels._names({"tensor(int8)", "seq(tensor(float))", "tensor(bool)"}) == ["bool", "int8"]
