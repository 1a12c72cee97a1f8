"""Products with transposed matrices as one node: the same values, and no copy of a matrix in a step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from foldkv.export.contract.chain import CHAIN, ChainTable
from foldkv.optimize.passes.transposes import fuse_transposes

#: x, w and the statements, and how many products are fused.
CASES = {
    "linear": ((2, 3, 16), (12, 16), "t = Transpose <perm = [1, 0]> (w) y = MatMul (x, t)", 1),
    "groups": ((3, 4, 16), (3, 5, 16), "t = Transpose <perm = [0, 2, 1]> (w) y = MatMul (x, t)", 1),
    "two uses": (
        (4, 16), (16, 16), "t = Transpose <perm = [1, 0]> (w) a = MatMul (x, t) b = MatMul (a, t) y = Add (a, b)", 2,
    ),
    "used otherwise, too": (
        (16, 16), (16, 16), "t = Transpose <perm = [1, 0]> (w) a = MatMul (x, t) y = Add (a, t)", 1,
    ),
    "another order": ((3, 12, 16), (3, 16, 5), "t = Transpose <perm = [0, 1, 2]> (w) y = MatMul (x, t)", 0),
    "on the left": ((16, 4), (16, 5), "t = Transpose <perm = [1, 0]> (x) y = MatMul (t, w)", 0),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_values_stay_the_same(case: str) -> None:
    x_shape, w_shape, body, expected = CASES[case]
    text = f"""<ir_version: 10, opset_import: ["": 23]>
    product (float{list(x_shape)} x, float{list(w_shape)} w) => (float y) {{ {body} }}"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    random = np.random.default_rng(5)
    given = {name: random.standard_normal(shape).astype(np.float32) for name, shape in (("x", x_shape), ("w", w_shape))}
    before = _run(model, given)
    assert fuse_transposes(model) == expected
    left = [node.op_type for node in model.graph]
    assert left.count("FusedMatMul") == expected
    assert ("Transpose" in left) is (expected == 0 or case == "used otherwise, too")
    np.testing.assert_allclose(_run(model, given), before, rtol=1e-5, atol=1e-6)


def test_no_step_of_a_bundle_copies_a_weight_transposed(tiny_bundle: Path) -> None:
    table, products = ChainTable.read(tiny_bundle / CHAIN), 0
    for file in table.segments.values():
        graph = onnx.load(tiny_bundle / file).graph
        weights = {value.name for value in graph.input}
        weights |= {node.output[0] for node in graph.node if node.op_type == "Reshape" and node.input[0] in weights}
        assert not [node.name for node in graph.node if node.op_type == "Transpose" and node.input[0] in weights]
        products += sum(node.op_type == "FusedMatMul" and node.input[1] in weights for node in graph.node)
    assert products > 20


def _run(model: ir.Model, given: dict[str, np.ndarray]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    found: np.ndarray = session.run(None, given)[0]
    return found
