"""The optimized graph computes what the function bodies compute, with far fewer nodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnxscript import FLOAT, script

from foldkv.export.operators.registry import DOMAIN
from foldkv.export.operators.sinkhorn import FoldkvSinkhorn, sinkhorn
from foldkv.optimize.passes.cpu import cpu_graph


@script()
def balanced_matrix(matrix: FLOAT[2, 50, 4, 4]) -> FLOAT[2, 50, 4, 4]:
    return FoldkvSinkhorn(matrix, iterations=20, eps=1e-6)


def run(model: bytes | str, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    known = {value.name for value in session.get_inputs()}
    return session.run(None, {name: value for name, value in feeds.items() if name in known})


@pytest.mark.parametrize(("chunk", "position"), [(1, 0), (1, 77), (5, 30), (40, 3)])
def test_every_output_equals_that_of_the_function_bodies(
    tiny_graph: Path, tiny_bundle: Path, chunk: int, position: int
) -> None:
    rng = np.random.default_rng(chunk * 1000 + position)
    batch, context = 3, 128
    feeds: dict[str, np.ndarray] = {
        "input_ids": rng.integers(0, 255, (batch, chunk)),
        "positions": np.array([position, 0, position // 2], np.int32),
        "num_tokens": np.array([chunk, max(chunk - 2, 0), chunk], np.int32),
        "active_context": np.array([position + chunk]),
        "logit_indices": np.tile(np.arange(chunk), (batch, 1)),
    }
    model = onnx.load(tiny_graph / "model.onnx", load_external_data=False)
    for value in model.graph.input:
        if value.name.startswith("past."):
            _, rows, width = value.type.tensor_type.shape.dim
            # "entries_4": one row for 4 tokens of the context
            count = context // int(rows.dim_param.removeprefix("entries_")) if rows.dim_param else rows.dim_value
            feeds[value.name] = rng.standard_normal((batch, count, width.dim_value), np.float32)
    expected = run(str(tiny_graph / "model.onnx"), feeds)
    actual = run(str(tiny_bundle / "model.onnx"), feeds)
    assert len(actual) == len(expected)
    for want, have in zip(expected, actual, strict=True):
        np.testing.assert_allclose(have, want, rtol=2e-4, atol=2e-4)


def test_nothing_of_the_domain_is_left_and_most_nodes_are_gone(
    tiny_graph: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    model = ir.load(tiny_bundle / "model.onnx")
    assert not model.functions and not any(node.domain == DOMAIN for node in model.graph)
    counts = cpu_graph(tiny_graph, tmp_path)
    assert counts["optimized"] < counts["inlined"] / 2


@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_unrolled_sinkhorn_stays_within_rounding_of_its_definition(spread: float, tmp_path: Path) -> None:
    """Also for matrices as lopsided as a softmax makes them, where the eps of every sum could matter."""
    source = tmp_path / "graph"
    source.mkdir()
    size, iterations, eps = 4, 20, 1e-6
    logits = np.random.default_rng(0).standard_normal((2, 50, size, size)).astype(np.float32) * spread
    matrix = torch.softmax(torch.from_numpy(logits), -1) + eps
    onnx.save(balanced_matrix.to_model_proto(), source / "model.onnx")
    cpu_graph(source, tmp_path)
    (actual,) = run(str(tmp_path / "model.onnx"), {"matrix": matrix.numpy()})
    assert not any(node.op_type == "Loop" for node in onnx.load(tmp_path / "model.onnx").graph.node)
    expected = sinkhorn(matrix.double(), iterations, eps).numpy()
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-6)
