"""Injection: rules, reasons, counts, and a graph that still computes the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner

from foldkv.artifact import read_manifest, verify_files
from foldkv.cli import main
from foldkv.errors import ArtifactError, InputError, MissingDependencyError
from foldkv.export.graph import KIND
from foldkv.optimize.build import build_bundles
from foldkv.plugins.inject import inject
from foldkv.plugins.spec import PluginSpec
from foldkv.runtime.session import Session

SPARSE = PluginSpec("FoldkvSparseAttention", "1", frozenset({80, 89}), frozenset({"bfloat16"}))
UPDATE = PluginSpec("FoldkvWindowUpdate", "2", frozenset({80}), frozenset({"bfloat16"}))
A100 = {"target": "a100", "sm": 80, "dtype": "bfloat16"}


def marked(graph: Path) -> list[onnx.NodeProto]:
    model = onnx.load(graph / "model.onnx", load_external_data=False)
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
    assert rows["FoldkvRope"].refusals == {"no plugin for this operator": counts["FoldkvRope"]}
    found = {(node.op_type, attributes(node)["plugin_version"]) for node in marked(tmp_path / "out")}
    assert found == {("FoldkvSparseAttention", b"1"), ("FoldkvWindowUpdate", b"2")}
    assert {attributes(node)["plugin_namespace"] for node in marked(tmp_path / "out")} == {b"foldkv"}
    assert marked(tiny_graph) == []


def test_an_injected_graph_is_whole_and_computes_the_same_in_onnx_runtime(
    tiny_graph: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    inject(tiny_graph, tmp_path / "out", **A100, plugins=[SPARSE, UPDATE])
    manifest = read_manifest(tmp_path / "out", kind=KIND)
    verify_files(tmp_path / "out", manifest)
    assert manifest["injection"]["target"] == "a100"
    onnx.checker.check_model(str(tmp_path / "out" / "model.onnx"))
    report = build_bundles(tmp_path / "out", tmp_path / "bundles", ["cpu"])
    tokens = [[84, 104, 101, *range(40, 120)]]
    with (
        Session(report.results[0].folder, context=128) as injected,
        Session(tiny_bundle, context=128) as plain,
    ):
        np.testing.assert_array_equal(injected.prefill(tokens), plain.prefill(tokens))
    assert onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx")).get_outputs()[0].name == "logits"


@pytest.mark.parametrize(
    ("plugin", "miss"),
    [
        (PluginSpec("FoldkvSparseAttention", "1", frozenset({90}), frozenset({"bfloat16"})), "no kernel for sm80; there are sm90"),
        (PluginSpec("FoldkvSparseAttention", "1", frozenset({80}), frozenset({"float16"})), "no kernel in bfloat16"),
        (PluginSpec("FoldkvSparseAttention", "1", frozenset({80}), frozenset({"bfloat16"}), frozenset({"fp8_ds_mla"})), "does not read rows in dense"),
        (PluginSpec("FoldkvSparseAttention", "1", frozenset({80}), frozenset({"bfloat16"}), widths=frozenset({512})), "not compiled for width"),
        (PluginSpec("FoldkvOther", "1", frozenset({80}), frozenset({"bfloat16"})), "there are plugins for FoldkvOther only"),
    ],
    ids=["sm", "dtype", "layout", "width", "operator"],
)  # fmt: skip
def test_no_node_taken_is_an_error_that_shows_the_nearest_miss(
    tiny_graph: Path, tmp_path: Path, plugin: PluginSpec, miss: str
) -> None:
    with pytest.raises(InputError, match=r"0 of \d+ nodes can take a plugin on a100") as error:
        inject(tiny_graph, tmp_path / "out", **A100, plugins=[plugin])
    assert miss in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_plugin_with_the_fewest_refusals_is_the_one_that_is_named(tiny_graph: Path, tmp_path: Path) -> None:
    far = PluginSpec("FoldkvSparseAttention", "1", frozenset({90}), frozenset({"float16"}))
    near = PluginSpec("FoldkvSparseAttention", "1", frozenset({80}), frozenset({"float16"}))
    with pytest.raises(InputError) as error:
        inject(tiny_graph, tmp_path / "out", **A100, plugins=[far, near])
    assert "sm90" not in str(error.value)


def test_injecting_twice_or_onto_itself_is_refused_and_keeps_the_graph(tiny_graph: Path, tmp_path: Path) -> None:
    inject(tiny_graph, tmp_path / "out", **A100, plugins=[SPARSE])
    with pytest.raises(InputError, match="injected for a100 already"):
        inject(tmp_path / "out", tmp_path / "again", **A100, plugins=[SPARSE])
    with pytest.raises(InputError, match="is the graph itself"):
        inject(tiny_graph, tiny_graph, **A100, plugins=[SPARSE])
    verify_files(tiny_graph, read_manifest(tiny_graph, kind=KIND))


def test_a_damaged_graph_is_refused(tiny_graph: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in tiny_graph.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    content = bytearray((broken / "weights.bin").read_bytes())
    content[1000] ^= 1
    (broken / "weights.bin").write_bytes(content)
    with pytest.raises(ArtifactError, match="changed after it was made"):
        inject(broken, tmp_path / "out", **A100, plugins=[SPARSE])


def test_without_any_plugin_the_command_says_what_to_do(tiny_graph: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError):
        inject(tiny_graph, tmp_path / "out", **A100)
    result = CliRunner().invoke(main, ["inject", str(tiny_graph), "--target", "a100", "-o", str(tmp_path / "out")])
    assert result.exit_code == 3
    assert "--plugins off" in result.output
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(main, ["inject", str(tiny_graph), "--target", "cpu", "-o", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "no GPU" in result.output
