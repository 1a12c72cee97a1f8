"""Injection: rules, reasons, counts, and a graph that still computes the same."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from whole import first_chunk, logits, whole_model

from foldkv.artifact import read_manifest, verify_files
from foldkv.cli import main
from foldkv.errors import ArtifactError, InputError
from foldkv.export.contract.operators import PACKED_EXPERTS
from foldkv.export.contract.profiles import PROFILES
from foldkv.export.package import KIND, read_package
from foldkv.export.stitch import flat_model
from foldkv.optimize.build import build_bundles
from foldkv.plugins.declarations import BODIES, FIELDS, PLUGINS, PluginSpec
from foldkv.plugins.inject import inject, inject_nodes, strip_injection, updated_in_place
from foldkv.runtime.session import Session

#: Operators of graphs with plain weights. Products become operators later, as an engine is built (optimize/passes/linears.py).
EXPORTED = set(PLUGINS) - {"FoldkvBlockLinear", *PACKED_EXPERTS.values()}
SPARSE = PLUGINS["FoldkvSparseAttention"]
UPDATE = replace(PLUGINS["FoldkvWindowUpdate"], version="2", sms=frozenset({80}))
A100 = {"target": "a100", "sm": 80, "dtype": "bfloat16"}


def marked(graph: Path) -> list[onnx.NodeProto]:
    model = flat_model(read_package(graph))
    return [node for node in model.graph.node if any(a.name == "plugin_namespace" for a in node.attribute)]


def attributes(node: onnx.NodeProto) -> dict[str, object]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def test_nodes_that_a_plugin_takes_are_marked_and_the_others_have_a_reason(tiny_graph: Path, tmp_path: Path) -> None:
    injection = inject(tiny_graph, tmp_path / "out", **A100, plugins=[SPARSE, UPDATE])
    counts = read_manifest(tiny_graph, kind=KIND)["operators"]
    rows = {row.operator: row for row in injection.rows}
    assert {name: row.nodes for name, row in rows.items()} == counts
    assert {name: row.injected for name, row in rows.items() if row.injected} == {
        "FoldkvSparseAttention": 2,
        "FoldkvWindowUpdate": 4,
    }
    assert all(row.injected + sum(row.refusals.values()) == row.nodes for row in injection.rows)
    assert rows["FoldkvRope"].refusals == {BODIES["FoldkvRope"]: counts["FoldkvRope"]}
    assert rows["FoldkvCompress"].refusals == {"no plugin for this operator": counts["FoldkvCompress"]}
    found = {(node.op_type, attributes(node)["plugin_version"]) for node in marked(tmp_path / "out")}
    assert found == {("FoldkvSparseAttention", b"1"), ("FoldkvWindowUpdate", b"2")}
    for node in marked(tmp_path / "out"):
        values = attributes(node)
        assert values["plugin_namespace"] == b"foldkv" and set(FIELDS) <= set(values)
        assert (values["sm"], values["dtype"], values["row_format"], values["rope_dim"]) == (
            80,
            b"bfloat16",
            b"dense",
            16,
        )
    assert marked(tiny_graph) == []


@pytest.mark.parametrize(("layout", "index_rows"), [("dense", "dense"), ("fp8", "index_fp8"), ("fp8+fp4", "index_fp4")])
def test_every_operator_on_compressed_kv_is_given_the_rows_that_it_touches(
    tiny_graph: Path, tmp_path: Path, layout: str, index_rows: str
) -> None:
    injection = inject(tiny_graph, tmp_path / "out", **A100, layout=layout)
    refused = {row.operator for row in injection.rows if row.injected < row.nodes}
    assert refused == {row.operator for row in injection.rows} & set(BODIES) == {"FoldkvRope"}
    served = {"FoldkvCompressFp8", "FoldkvCompressFp4", "FoldkvCompressOnlineFp8"}
    assert {row.operator for row in injection.rows} - refused == EXPORTED - served
    main = "dense" if layout == "dense" else "fp8_ds_mla"
    expected = {name: {main if PLUGINS[name].row_formats else "dense"} for name in EXPORTED - served} | {
        "FoldkvCompress": {main, index_rows}, "FoldkvIndexScores": {index_rows},
    }  # fmt: skip
    assert {given.plugin.operator: set(given.row_formats) for given in injection.given} == expected
    for node in marked(tmp_path / "out"):
        index = node.input[0].endswith("index_entries")
        rows = attributes(node)["row_format"]
        assert node.op_type != "FoldkvCompress" or rows == (index_rows if index else main).encode()


@pytest.mark.parametrize(("layout", "main", "index"), [("dense",) * 3, ("fp8+fp4", "fp8_ds_mla", "index_fp4")])
def test_every_operator_on_compressed_kv_of_a_served_graph_is_given_to_a_plugin(
    served_graph: Path, layout: str, main: str, index: str
) -> None:
    model = flat_model(read_package(served_graph))
    injection = inject_nodes(model, read_manifest(served_graph, kind=KIND)["state"], rope_dim=16, layout=layout, **A100)
    refused = {row.operator for row in injection.rows if row.injected < row.nodes}
    assert refused == {row.operator for row in injection.rows} & set(BODIES) and "FoldkvQuantizeFp8" in refused
    assert {row.operator for row in injection.rows} - refused == EXPORTED - {
        "FoldkvCompress",
        "FoldkvCompressOnline",
    }
    rows = {given.plugin.operator: given.row_formats for given in injection.given}
    assert rows["FoldkvCompressFp8"] == rows["FoldkvCompressOnlineFp8"] == (main,)
    assert rows["FoldkvCompressFp4"] == (index,)
    for node in model.graph.node:
        names = [attribute.name for attribute in node.attribute]
        assert len(set(names)) == len(names), "an attribute is written once"


@pytest.mark.parametrize("profile", PROFILES)
def test_state_that_a_plugin_writes_is_updated_in_place_and_no_other(
    tiny_graph: Path, served_graph: Path, profile: str
) -> None:
    graph = {"hf": tiny_graph, "served": served_graph}[profile]
    state = read_manifest(graph, kind=KIND)["state"]

    def in_place(operators: set[str]) -> set[str]:
        model = flat_model(read_package(graph))
        inject_nodes(model, state, rope_dim=16, **A100, plugins=[PLUGINS[name] for name in operators])
        names = updated_in_place(model, state)
        assert names == [row["name"] for row in state if row["name"] in names], "in the order of the state"
        return set(names)

    assert in_place(EXPORTED) == {row["name"] for row in state}
    assert in_place({"FoldkvSparseAttention"}) == set()
    online = {"hf": "FoldkvCompressOnline", "served": "FoldkvCompressOnlineFp8"}[profile]
    assert in_place({online, "FoldkvIndexScores"}) == {"2.entries", "2.carry"}
    assert in_place({"FoldkvWindowUpdate"}) == {row["name"] for row in state if row["group"] == "window"}
    assert updated_in_place(flat_model(read_package(graph)), state) == []


def test_a_layout_that_does_not_hold_the_values_of_a_served_graph_is_refused(
    served_graph: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        InputError, match=r"FoldkvCompressFp4.*does not read rows in index_fp8; it reads dense, index_fp4"
    ):
        inject(served_graph, tmp_path / "out", **A100, layout="fp8")


@pytest.mark.parametrize("profile", PROFILES)
def test_what_injection_wrote_can_be_taken_back(
    tiny_graph: Path, served_graph: Path, tmp_path: Path, profile: str
) -> None:
    graph = {"hf": tiny_graph, "served": served_graph}[profile]
    inject(graph, tmp_path / "out", **A100)
    model = flat_model(read_package(tmp_path / "out"))
    strip_injection(model)
    before = flat_model(read_package(graph))
    assert list(model.graph.node) == list(before.graph.node)


def test_an_injected_graph_is_whole_and_computes_the_same_in_onnx_runtime(
    tiny_graph: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    inject(tiny_graph, tmp_path / "out", **A100)
    manifest = read_manifest(tmp_path / "out", kind=KIND)
    verify_files(tmp_path / "out", manifest)
    assert manifest["injection"]["target"] == "a100"
    onnx.checker.check_model(flat_model(read_package(tmp_path / "out")))
    report = build_bundles(tmp_path / "out", tmp_path / "bundles", ["cpu"])
    tokens = [[84, 104, 101, *range(40, 120)]]
    with (
        Session(report.results[0].folder, context=128) as injected,
        Session(tiny_bundle, context=128) as plain,
    ):
        np.testing.assert_array_equal(injected.prefill(tokens), plain.prefill(tokens))
    ids = np.array(tokens)
    found = logits(whole_model(tmp_path / "out", tmp_path / "whole"), first_chunk(tmp_path / "out", ids, 128))
    expected = logits(whole_model(tiny_graph, tiny_graph.with_name("graph-whole")), first_chunk(tiny_graph, ids, 128))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("plugin", "miss"),
    [
        (replace(SPARSE, sms=frozenset({90})), "no kernel for sm80; there are sm90"),
        (replace(SPARSE, dtypes=frozenset({"float16"})), "no kernel in bfloat16"),
        (replace(SPARSE, row_formats=frozenset({"fp8_ds_mla"})), "does not read rows in dense"),
        (PluginSpec("FoldkvOther", "1"), "there are plugins for FoldkvOther only"),
    ],
    ids=["sm", "dtype", "layout", "operator"],
)
def test_no_node_taken_is_an_error_that_shows_the_nearest_miss(
    tiny_graph: Path, tmp_path: Path, plugin: PluginSpec, miss: str
) -> None:
    with pytest.raises(InputError, match=r"0 of \d+ nodes can take a plugin on a100") as error:
        inject(tiny_graph, tmp_path / "out", **A100, plugins=[plugin])
    assert miss in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_plugin_with_the_fewest_refusals_is_the_one_that_is_named(tiny_graph: Path, tmp_path: Path) -> None:
    near = replace(SPARSE, dtypes=frozenset({"float16"}))
    far = replace(near, sms=frozenset({90}))
    with pytest.raises(InputError) as error:
        inject(tiny_graph, tmp_path / "out", **A100, plugins=[far, near])
    assert "sm90" not in str(error.value)


def test_injecting_twice_or_onto_itself_is_refused_and_keeps_the_graph(tiny_graph: Path, tmp_path: Path) -> None:
    inject(tiny_graph, tmp_path / "out", **A100, plugins=[SPARSE])
    with pytest.raises(InputError, match="already injected for a100"):
        inject(tmp_path / "out", tmp_path / "again", **A100, plugins=[SPARSE])
    with pytest.raises(InputError, match="is the graph itself"):
        inject(tiny_graph, tiny_graph, **A100, plugins=[SPARSE])
    verify_files(tiny_graph, read_manifest(tiny_graph, kind=KIND))


def test_a_damaged_graph_is_refused(tiny_graph: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_graph, broken)
    segment = broken / "segments" / "csa-moe.onnx"
    content = bytearray(segment.read_bytes())
    content[1000] ^= 1
    segment.write_bytes(content)
    with pytest.raises(ArtifactError, match="changed after it was made"):
        inject(broken, tmp_path / "out", **A100, plugins=[SPARSE])


def test_sizes_that_the_kernels_cannot_take_are_a_reason(tiny_graph: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(tiny_graph, odd)
    model = flat_model(read_package(odd))
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_value == 64:
                dim.dim_value = 40
    for row in inject_nodes(
        model,
        read_manifest(odd, kind=KIND)["state"],
        rope_dim=16,
        plugins=[SPARSE, PLUGINS["FoldkvIndexSelect"]],
        **A100,
    ).rows:
        if row.operator == "FoldkvSparseAttention":
            assert row.injected == 0 and "40 wide; expected a multiple of 16" in next(iter(row.refusals))


def test_the_command_prints_counts_and_reasons(tiny_graph: Path, tmp_path: Path) -> None:
    arguments = ["inject", str(tiny_graph), "--target", "l40s", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "FoldkvSparseAttention" in result.output and BODIES["FoldkvRope"] in result.output
    result = CliRunner().invoke(main, [*arguments, "--json"])
    facts = json.loads(result.stdout)
    assert facts["layout"] == "dense" and facts["injected"] == sum(row["injected"] for row in facts["operators"])
    result = CliRunner().invoke(main, [*arguments, "--layout", "nvfp4+fp4"])
    assert result.exit_code == 2 and "nvfp4" in result.output
    result = CliRunner().invoke(main, ["inject", str(tiny_graph), "--target", "cpu", "-o", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "is not a GPU" in result.output


def test_a_graph_that_was_injected_is_built_for_its_target_only(tiny_graph: Path, tmp_path: Path) -> None:
    inject(tiny_graph, tmp_path / "out", **A100)
    with pytest.raises(InputError, match="injected for a100; l40s cannot be built"):
        build_bundles(tmp_path / "out", tmp_path / "bundles", ["a100", "l40s", "cpu"])
    assert not (tmp_path / "bundles").exists()
