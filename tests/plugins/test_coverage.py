"""The coverage table says what injection does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from foldkv.artifact import read_manifest
from foldkv.cli import main
from foldkv.export.checkpoint.config_reader import spec_from_file
from foldkv.export.contract.layouts import LAYOUTS
from foldkv.export.contract.profiles import PROFILES
from foldkv.export.package import read_package
from foldkv.export.stitch import flat_model
from foldkv.optimize.targets import load_targets
from foldkv.plugins.coverage import coverage
from foldkv.plugins.declarations import BODIES, PLUGINS
from foldkv.plugins.inject import inject_nodes

DATA = Path(__file__).parents[1] / "data"
SMS = sorted({target.sm for target in load_targets().values() if target.sm})


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_the_released_models_have_every_plugin_on_every_target_and_layout(name: str) -> None:
    rows = coverage(spec_from_file(DATA / f"deepseek-v4-{name}.json"), SMS)
    assert {row.operator for row in rows} == set(PLUGINS) - ({"FoldkvWindowAttention"} if name == "pro" else set())
    for row in rows:
        assert set(row.gaps) == set(SMS)
        # FP4 of several tiles does not fit rows with one scale.
        gap = row.row_format == "nvfp4" or (row.operator, row.row_format) == ("FoldkvCompressFp4", "index_fp8")
        assert all(bool(reason) == gap for reason in row.gaps.values()), row


@pytest.mark.parametrize("profile", PROFILES)
def test_the_table_agrees_with_injection(tiny_graph: Path, served_graph: Path, profile: str) -> None:
    graph = {"hf": tiny_graph, "served": served_graph}[profile]
    spec = spec_from_file(graph / "config.json")
    state = read_manifest(graph, kind="foldkv.graph")["state"]
    found = coverage(spec, [80], [profile])
    assert all(row in coverage(spec, [80]) for row in found)
    table = {(row.operator, row.row_format): row.gaps for row in found if row.dtype in ("", "bfloat16")}
    for layout in ("dense", "fp8", "fp8+fp4") if profile == "hf" else ("dense", "fp8+fp4"):
        model = flat_model(read_package(graph))
        injection = inject_nodes(
            model, state, rope_dim=spec.rope_dim, target="a100", sm=80, dtype="bfloat16", layout=layout
        )
        for given in injection.given:
            assert all(table[given.plugin.operator, rows] == {80: ""} for rows in given.row_formats)
    assert {rows for _, rows in table} == {
        f for layout in LAYOUTS.values() for f in (layout.row_format, layout.index_row_format)
    }


def test_sizes_that_no_kernel_takes_are_a_gap(tiny_graph: Path) -> None:
    spec = spec_from_file(tiny_graph / "config.json")
    odd = dataclasses.replace(spec, head_dim=72, rope_dim=24)
    gaps = {row.operator: row.gaps[80] for row in coverage(odd, [80]) if row.row_format == "dense"}
    assert "72 wide; expected a multiple of 16" in gaps["FoldkvSparseAttention"]
    assert gaps["FoldkvIndexSelect"] == ""


def test_the_command_prints_the_table_and_the_reasons(tiny_graph: Path) -> None:
    result = CliRunner().invoke(main, ["targets", "--coverage", str(DATA / "deepseek-v4-flash.json")])
    assert result.exit_code == 0
    assert "sm121" in result.output and "(1) does not read rows in nvfp4" in result.output
    assert all(why in result.output for why in BODIES.values())
    facts = json.loads(CliRunner().invoke(main, ["targets", "--coverage", str(tiny_graph), "--json"]).stdout)
    assert facts["bodies"] == BODIES and len(facts["plugins"]) > 20
