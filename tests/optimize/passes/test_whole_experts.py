"""Packed experts whose matrices are decoded whole give the bits of those that are decoded in bands."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from foldkv.export.operators import packed, packed_words
from foldkv.export.operators.packed import Matrix
from foldkv.export.operators.registry import DOMAIN, ONNX_OPSET
from foldkv.optimize.passes.whole_experts import decode_whole_experts

EXPERTS, TOKENS, WIDTH, INNER = 6, 5, 64, 96


def layer(format_: str) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """One node of packed experts in bands, and its inputs."""
    per_byte, block = (2, (1, 32)) if format_ == "fp4" else (1, (32, 32))
    shapes = {"w1": (INNER, WIDTH), "w2": (WIDTH, INNER), "w3": (INNER, WIDTH)}
    matrices, code, scale = {}, 0, 0
    for part in packed.PARTS:
        rows, columns = shapes[part]
        grid = (rows // block[0], columns // block[1])
        matrices[part] = Matrix(code, scale, shapes[part], grid)
        code, scale = code + rows * columns // per_byte, scale + grid[0] * grid[1]
    random = np.random.default_rng(0)
    codes = random.integers(-128, 128, (EXPERTS, code)).astype(np.int8)
    if format_ == "fp8":  # without the two codes of NaN
        codes[(codes == 127) | (codes == -1)] = 0
    values = {
        "x": random.standard_normal((TOKENS, WIDTH), np.float32),
        "chosen": np.array([[5, 0], [0, 3], [5, 3], [1, 0], [3, 5]]),
        "weights": random.random((TOKENS, 2), np.float32),
        "codes": codes,
        "scales": random.integers(118, 126, (EXPERTS, scale)).astype(np.int8),
        "slots": np.array([2, 0, 1, 5, 4, 3]),
    }
    name = packed.EXPERTS[format_]
    node = helper.make_node(name, list(values), ["y"], domain=DOMAIN, limit=7.0, **packed_words.geometry(matrices))
    inputs = [
        helper.make_tensor_value_info(key, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
        for key, v in values.items()
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, (TOKENS, WIDTH))
    opsets = [helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid(DOMAIN, 1)]
    body = packed.routed_experts(format_, matrices, band=128)
    graph = helper.make_graph([node], "experts", inputs, [output])
    return ir.serde.deserialize_model(
        helper.make_model(graph, functions=[body], opset_imports=opsets, ir_version=10)
    ), values


def run(model: ir.Model, values: dict[str, np.ndarray]) -> np.ndarray:
    proto = ir.serde.serialize_model(model).SerializeToString()
    result: np.ndarray = onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"]).run(None, values)[0]
    return result


def rounds(model: ir.Model) -> int:
    """Rounds of the loops over bands: the trip counts of w1, w2 and w3 together."""
    [function] = model.functions.values()
    counts = [
        node for node in function if node.op_type == "Constant" and (node.outputs[0].name or "").endswith("_count")
    ]
    return sum(int(node.attributes["value"].as_tensor().numpy()) for node in counts)


@pytest.mark.parametrize("format_", ["fp4", "fp8"])
def test_whole_matrices_give_what_bands_give(format_: str) -> None:
    model, values = layer(format_)
    expected, before = run(model, values), rounds(model)
    assert decode_whole_experts(model) == 1
    assert before > 3 == rounds(model)
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(run(model, values), expected, rtol=1e-5, atol=1e-6)


def test_other_graphs_are_left_alone() -> None:
    plain = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[N] x) => (float[N] y) { y = Relu (x) }'
    )
    assert decode_whole_experts(ir.serde.deserialize_model(plain)) == 0
