"""Engines whose routed experts are plugins: their weights are inputs as stored, which nothing else reads."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from foldkv.artifact import read_manifest
from foldkv.export.contract.engine_set import ENGINES, STORED, EngineTable
from foldkv.export.contract.operators import PACKED_EXPERTS, ROUTED_EXPERTS
from foldkv.export.contract.weights import E2M1, E4M3, EXPONENT
from foldkv.export.package import read_package
from foldkv.optimize.build import build_bundles
from foldkv.optimize.recipe import Shapes

pytestmark = pytest.mark.slow
SMALL = Shapes(batch=(1, 1, 2), chunk=(1, 1, 16), context=(64, 64, 256))
_PACKED = ("ffn.experts.codes", "ffn.experts.scales")


@pytest.mark.parametrize(
    ("form", "operator", "roles"),
    [
        ("instruct", PACKED_EXPERTS[E2M1, EXPONENT], _PACKED),
        ("base", PACKED_EXPERTS[E4M3, EXPONENT], _PACKED),
        ("plain", ROUTED_EXPERTS, ("ffn.experts.w13", "ffn.experts.w2")),
    ],
)
def test_experts_are_plugin_layers_that_alone_read_their_weights(
    form: str, operator: str, roles: tuple[str, ...], tiny_graph: Path,
    released_graph: Callable[[str], Path], tmp_path: Path,
) -> None:  # fmt: skip
    package = read_package(tiny_graph if form == "plain" else released_graph(form))
    [result] = build_bundles(package.folder, tmp_path / "out", ["a100"], shapes=SMALL, cache=tmp_path / "cache").results
    assert result.reason == ""
    manifest = read_manifest(result.folder, kind="foldkv.bundle")
    [row] = [row for row in manifest["plugins"] if row["name"] == operator]
    assert row["nodes"] == len(package.layers) and row["row_formats"] == ["dense"]
    # Both ways to find pairs, and both products: what a step and a chunk launch is in the bundle.
    functions = sorted(name.rpartition("-")[0] for name in row["kernels"])
    assert functions == ["down", "down", "gate_up", "gate_up", "group", "weigh"]
    table = EngineTable.read(result.folder / ENGINES)
    for layer, name in enumerate(package.layers):
        plan = (result.folder / table.plans[name]).read_bytes().decode("latin-1")
        for role in roles:
            taken, weight = table.weights[name][role], package.lock.weights[f"layers.{layer}"][role]
            dtype = "bfloat16" if form == "plain" else "int8"
            assert (taken.form, taken.dtype, taken.bytes) == (STORED, dtype, weight.bytes)
            # In the plan's text, the input itself is what one custom layer reads, and nothing else does.
            readers = [line for line in plan.splitlines() if f'"{role}.1"' in line and " input={" in line]
            assert readers and all(re.match(r"\s*custom_layer=\{ name=", line) for line in readers)
