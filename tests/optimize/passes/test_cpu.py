"""The optimized graph computes what the function bodies compute, with far fewer nodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnxscript import FLOAT, script
from whole import opened, whole_model

from foldkv.artifact import read_manifest
from foldkv.export.operators.registry import DOMAIN
from foldkv.export.operators.sinkhorn import FoldkvSinkhorn, sinkhorn
from foldkv.export.package import read_package
from foldkv.optimize.passes.cpu import optimize_for_cpu
from foldkv.runtime import Model
from foldkv.runtime.buffers import StateBuffers


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
def test_logits_and_state_equal_those_of_the_function_bodies(
    tiny_graph: Path, tiny_bundle: Path, chunk: int, position: int
) -> None:
    rng = np.random.default_rng(chunk * 1000 + position)
    batch, context = 3, 128
    step: dict[str, np.ndarray] = {
        "input_ids": rng.integers(0, 255, (batch, chunk)),
        "positions": np.array([position, 0, position // 2], np.int32),
        "num_tokens": np.array([chunk, max(chunk - 2, 0), chunk], np.int32),
        "active_context": np.array([position + chunk]),
        "logit_indices": np.tile(np.arange(chunk), (batch, 1)),
    }
    rows = read_package(tiny_graph).state
    past = {row.input: rng.standard_normal((batch, row.capacity(context), row.width), np.float32) for row in rows}
    whole = opened(whole_model(tiny_graph, tiny_graph.with_name("graph-whole")))
    wanted, *after = whole.run(["logits", *(row.output for row in rows)], step | past)
    with Model(tiny_bundle, threads=1) as model:
        buffers, executor = model.open(context, batch)
        assert isinstance(buffers, StateBuffers)
        for row in rows:
            buffers.arrays[row.name][:] = past[row.input]
        found = executor.run(
            step["input_ids"], step["positions"], step["num_tokens"], position + chunk, step["logit_indices"]
        )
        for slot, count in enumerate(step["num_tokens"]):  # behind them is padding, which an executor need not compute
            np.testing.assert_allclose(found[slot, :count], wanted[slot, :count], rtol=2e-4, atol=2e-4)
        for row, want in zip(rows, after, strict=True):
            np.testing.assert_allclose(buffers.arrays[row.name], want, rtol=2e-4, atol=2e-4, err_msg=row.name)


def test_nothing_of_the_domain_is_left_and_most_nodes_are_gone(tiny_bundle: Path) -> None:
    for file in (tiny_bundle / "segments").iterdir():
        model = ir.load(file)
        assert not model.functions and not any(node.domain == DOMAIN for node in model.graph)
    nodes = read_manifest(tiny_bundle, kind="foldkv.bundle")["engine"]["nodes"]
    layers = [counts for name, counts in nodes.items() if "-" in name]
    assert len(layers) == 3 and all(counts["optimized"] < 0.6 * counts["inlined"] for counts in layers)


@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_unrolled_sinkhorn_stays_within_rounding_of_its_definition(spread: float, tmp_path: Path) -> None:
    """Also for matrices as lopsided as a softmax makes them, where the eps of every sum could matter."""
    size, iterations, eps = 4, 20, 1e-6
    logits = np.random.default_rng(0).standard_normal((2, 50, size, size)).astype(np.float32) * spread
    matrix = torch.softmax(torch.from_numpy(logits), -1) + eps
    model = ir.from_proto(balanced_matrix.to_model_proto())
    optimize_for_cpu(model)
    ir.save(model, tmp_path / "model.onnx")
    (actual,) = run(str(tmp_path / "model.onnx"), {"matrix": matrix.numpy()})
    assert not any(node.op_type == "Loop" for node in model.graph)
    expected = sinkhorn(matrix.double(), iterations, eps).numpy()
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-6)
