"""Operators on bytes by others that have kernels on GPUs: the same values."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from foldkv.optimize.cuda_kernels import kernel_gaps
from foldkv.optimize.passes.byte_kernels import use_byte_kernels

RANDOM = np.random.default_rng(0)
BYTES = RANDOM.integers(-128, 128, (3, 7, 5)).astype(np.int8)
GRAPHS = {
    "rows": (
        "(int8[B, N, D] x, int64[B, K, 1] i) => (int8[B, K, D] y) { y = GatherND <batch_dims = 1> (x, i) }",
        {"x": BYTES, "i": RANDOM.integers(0, 7, (3, 4, 1))},
    ),
    "rows of several queries": (
        "(int8[B, N, D] x, int64[B, S, K, 1] i) => (int8[B, S, K, D] y) { y = GatherND <batch_dims = 1> (x, i) }",
        {"x": BYTES, "i": RANDOM.integers(0, 7, (3, 2, 4, 1))},
    ),
    "a choice": (
        "(bool[B, N, 1] c, int8[B, N, D] x, int8[B, N, D] z) => (int8[B, N, D] y) { y = Where (c, x, z) }",
        {"c": RANDOM.random((3, 7, 1)) < 0.5, "x": BYTES, "z": BYTES[::-1].copy()},
    ),
    "a pad": (
        """(int64[B, N] x) => (int64[B, M] y) <int64[2] p = {0, 3}, int64 f = {0}, int64[1] a = {-1}> { y = Pad (x, p, f, a) }""",
        {"x": RANDOM.integers(0, 256, (3, 7))},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_the_values_are_the_same_and_every_node_has_a_kernel(name: str) -> None:
    text, values = GRAPHS[name]
    proto = onnx.shape_inference.infer_shapes(
        onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> g {text}')
    )
    model = ir.serde.deserialize_model(proto)
    expected = run(model, values)
    assert kernel_gaps(model)
    assert use_byte_kernels(model) == 1
    assert not kernel_gaps(model)
    np.testing.assert_array_equal(run(model, values), expected)
    assert use_byte_kernels(model) == 0


def run(model: ir.Model, values: dict[str, np.ndarray]) -> np.ndarray:
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, values)[0]
    return result


def test_what_has_a_kernel_is_left_alone() -> None:
    text = "(float[B, N, D] x, int64[B, K, 1] i) => (float[B, K, D] y) { y = GatherND <batch_dims = 1> (x, i) }"
    proto = onnx.shape_inference.infer_shapes(
        onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> g {text}')
    )
    assert use_byte_kernels(ir.serde.deserialize_model(proto)) == 0
