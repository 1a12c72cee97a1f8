"""Products that plugins compute: which nodes they become, that they compute the same, and that engines read weights as stored."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from safetensors.torch import load_file, save_file
from whole import first_chunk, opened, read_external

from foldkv.artifact import read_manifest
from foldkv.errors import BuildError
from foldkv.export.contract.engine_set import ENGINES, STORED, EngineTable
from foldkv.export.contract.products import EXACT, ROUNDED, layer_products
from foldkv.export.package import Package, export_checkpoint, read_package
from foldkv.export.stitch import bind_weights, flat_model
from foldkv.optimize.build import build_bundles
from foldkv.optimize.passes import linears
from foldkv.optimize.passes.linears import UNIT, read_stored
from foldkv.optimize.recipe import Shapes

pytestmark = pytest.mark.slow  # an export
SHAPES = Shapes(batch=(1, 1, 2), chunk=(1, 1, 8), context=(64, 64, 256))


@pytest.fixture(scope="module")
def package(released_graph: Callable[[str], Path]) -> Package:
    return read_package(released_graph("instruct"))


def linear_nodes(graph: ir.Graph) -> dict[str, ir.Node]:
    """By the name of the weight."""
    return {node.inputs[1].name: node for node in graph if node.op_type == "FoldkvBlockLinear"}


def test_every_product_of_a_layer_is_a_node_with_its_stored_weight(package: Package) -> None:
    for name in dict.fromkeys(package.layers):
        before, after = package.segment(name).model, package.segment(name).model
        kind = package.spec.layer_types[package.layers.index(name)]
        expected = {product.role: product for product in layer_products(package.spec, kind)}
        assert read_stored(after, package.spec, sm=80) == len(expected)
        onnx.checker.check_model(ir.to_proto(after))
        nodes = linear_nodes(after.graph)
        assert nodes.keys() == expected.keys()
        inputs = {value.name: value for value in after.graph.inputs}
        assert list(inputs) == [value.name for value in before.graph.inputs]
        for role, product in expected.items():
            node, weight = nodes[role], inputs[role]
            assert (node.attributes["terms"].as_int(), node.attributes["groups"].as_int()) == (
                product.terms,
                product.groups,
            )
            assert tuple(weight.shape) == (product.rows, product.columns) and len(list(weight.uses())) == 1
            stored = next(value.dtype for value in before.graph.inputs if value.name == role)
            assert weight.dtype == (ir.DataType.INT8 if stored == ir.DataType.FLOAT8E4M3FN else stored)
            scale = UNIT if stored == ir.DataType.BFLOAT16 else role.replace("weight", "scale")
            assert node.inputs[2].name == scale
        # Nothing that decoded a weight is left, and nothing has the weights' values.
        left = Counter(node.op_type for node in after.graph)
        assert not {"FoldkvBlockScale", "FoldkvPartialBlockScale", "FoldkvExponents", "DequantizeLinear"} & left.keys()
        assert not any(re.fullmatch(r".*\.value", value.name or "") and "norm" not in value.name for node in after.graph for value in node.outputs)  # fmt: skip


def test_only_large_projections_round_their_activations(package: Package) -> None:
    kinds = dict.fromkeys(package.spec.layer_types)
    terms = {product.role: product.terms for kind in kinds for product in layer_products(package.spec, kind)}
    exact = {role for role, count in terms.items() if count == EXACT}
    assert exact == {role for role in terms if re.search(r"compressor|indexer", role)} and len(exact) == 6
    assert {terms[role] for role in terms.keys() - exact} == {ROUNDED}


def bound(package: Package, change: Callable[[ir.Model], object]) -> ir.Model:
    """The flat graph with its weights, changed."""
    model = bind_weights(ir.from_proto(flat_model(package)), package.lock, package.find_weights())
    change(model)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.Tensor(read_external(value.const_value), dtype=value.dtype, name=value.name)
    return model


def logits(model: ir.Model, out: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    out.mkdir()
    ir.save(model, out / "model.onnx", external_data="weights.bin")
    result: np.ndarray = opened(out / "model.onnx").run(["logits"], feeds)[0]
    return result


def test_a_flat_graph_with_weights_as_initializers_computes_the_same(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feeds = first_chunk(package.folder, np.random.default_rng(1).integers(0, 61, (1, 23)), 64)
    expected = logits(bound(package, lambda model: None), tmp_path / "plain", feeds)
    made = []
    rounded = bound(package, lambda model: made.append(read_stored(model, package.spec, sm=80)))
    found = logits(rounded, tmp_path / "rounded", feeds)
    assert made == [sum(len(layer_products(package.spec, kind)) for kind in package.spec.layer_types) + 1], (
        "and the head"
    )
    scale = float(np.abs(expected).max())
    assert 1e-5 * scale < np.abs(found - expected).max() < 0.05 * scale, "activations are rounded to bfloat16"
    # With every activation exact, nothing but the order of sums differs.
    exact = linears.all_products
    monkeypatch.setattr(linears, "all_products", lambda spec: tuple(replace(one, terms=EXACT) for one in exact(spec)))
    same = logits(bound(package, lambda model: read_stored(model, package.spec, sm=80)), tmp_path / "exact", feeds)
    np.testing.assert_allclose(same, expected, rtol=0, atol=1e-4 * scale)


def test_weights_in_other_types_stay_as_they_are(quick_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in quick_checkpoint.iterdir():
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            wide = {name: value.float() if name.endswith("wq_a.weight") else value for name, value in tensors.items()}
            save_file(wide, folder / file.name)
        elif file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    package = read_package(export_checkpoint(folder, tmp_path / "graph"))
    model = package.segment(package.layers[0]).model
    expected = len(layer_products(package.spec, package.spec.layer_types[0])) - 1
    assert read_stored(model, package.spec, sm=80) == expected
    assert "attn.wq_a.weight" not in linear_nodes(model.graph)


def test_a_weight_that_is_used_otherwise_is_an_error(package: Package) -> None:
    model = package.segment(package.layers[0]).model
    value = next(v for node in model.graph for v in node.outputs if v.name == "attn.wo_b.weight.value")
    [use] = value.uses()
    graph = use.node.graph
    assert graph is not None
    graph.insert_before(use.node, ir.node("Neg", [value], name="other"))
    with pytest.raises(BuildError, match=r"weight attn.wo_b.weight is used by Gemm, Neg; expected one product"):
        read_stored(model, package.spec, sm=80)


def test_an_engine_reads_stored_weights_in_plugins_and_copies_none(package: Package, tmp_path: Path) -> None:
    """For a GPU without FP8."""
    [result] = build_bundles(
        package.folder, tmp_path / "out", ["a100"], layout="fp8+fp4", shapes=SHAPES, cache=tmp_path
    ).results
    assert result.reason == ""
    manifest = read_manifest(result.folder, kind="foldkv.bundle")
    count = sum(len(layer_products(package.spec, kind)) for kind in package.spec.layer_types) + 1  # and the head
    assert {row["name"]: row["nodes"] for row in manifest["plugins"]}["FoldkvBlockLinear"] == count
    stored = count + 3 * len(package.layers)  # and each layer's gate, and its experts' codes and scales
    assert manifest["precision_islands"]["stored"] == stored and manifest["weights"]["widened"] == []
    table = EngineTable.read(result.folder / ENGINES)
    for layer, name in enumerate(package.layers):
        plan = (result.folder / table.plans[name]).read_bytes().decode("latin-1")
        for product in layer_products(package.spec, package.spec.layer_types[layer]):
            taken, weight = table.weights[name][product.role], package.lock.weights[f"layers.{layer}"][product.role]
            assert taken.form == STORED and taken.bytes == weight.bytes
            # In the plan's text, the input itself is what one custom layer reads, and nothing else does.
            readers = [line for line in plan.splitlines() if f'"{product.role}.1"' in line and " input={" in line]
            assert readers and all(re.match(rf'\s*custom_layer={{ name="{re.escape(product.role)}\.linear', line) for line in readers)  # fmt: skip
