"""Caches read in blocks: the entries and values of the operators' definitions, whatever the size of a block."""

# ruff: noqa: UP037 - names of dimensions are strings, which onnxscript reads
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxscript import FLOAT, INT32, INT64, script

from foldkv.errors import FoldkvError
from foldkv.export.operators.attention import FoldkvDenseAttention, dense_attention
from foldkv.export.operators.index import FoldkvIndexScores, FoldkvIndexSelect, index_scores, index_select
from foldkv.optimize.passes.blocks import read_in_blocks

HEADS, WIDTH, TOPK, RATIO, WINDOW = 3, 8, 4, 4, 8


@script()
def select(
    q: FLOAT["B", "S", HEADS, WIDTH], weights: FLOAT["B", "S", HEADS], index_entries: FLOAT["B", "E", WIDTH],  # noqa: F821
    positions: INT32["B"], active_context: INT64[1],  # noqa: F821
) -> INT32["B", "S", TOPK]:  # noqa: F821  # fmt: skip
    scores = FoldkvIndexScores(q, weights, index_entries, positions, active_context, ratio=RATIO)
    return FoldkvIndexSelect(scores, positions, ratio=RATIO, topk=TOPK)


@script()
def attend(
    q: FLOAT["B", "S", HEADS, WIDTH], rows: FLOAT["B", "R", WIDTH], entries: FLOAT["B", "E", WIDTH],  # noqa: F821
    sinks: FLOAT[HEADS], inv_freq: FLOAT[2], positions: INT32["B"], num_tokens: INT32["B"],  # noqa: F821
    active_context: INT64[1],
) -> FLOAT["B", "S", HEADS, WIDTH]:  # noqa: F821  # fmt: skip
    return FoldkvDenseAttention(q, rows, entries, sinks, inv_freq, positions, num_tokens, active_context, ratio=RATIO)


@pytest.fixture(scope="module")
def sessions() -> dict[tuple[str, int], onnxruntime.InferenceSession]:
    """Both functions with blocks of the smallest size, of a few, and of all entries."""
    found = {}
    for name, function in (("select", select), ("attend", attend)):
        for least in (1, 5, 1000):
            model = ir.from_proto(function.to_model_proto())
            assert read_in_blocks(model, room=1) == 1
            for node in model.graph:
                if "least" in node.attributes:
                    node.attributes["least"] = ir.AttrInt64("least", least)
            found[name, least] = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    return found


def numbers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    # Halves, so that scores are exact and ties are many.
    return (rng.integers(-4, 5, shape) / 2).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30), least=st.sampled_from([1, 5, 1000]), chunk=st.integers(1, 9),
    positions=st.lists(st.integers(0, 70), min_size=1, max_size=3), spare=st.integers(0, 9),
)  # fmt: skip
def test_the_same_entries_are_chosen_ties_included(
    sessions: dict, seed: int, least: int, chunk: int, positions: list[int], spare: int
) -> None:
    rng, batch = np.random.default_rng(seed), len(positions)
    context = max(positions) + chunk
    entries = numbers(rng, batch, -(-context // RATIO) + spare, WIDTH)
    for row, position in zip(entries, positions, strict=True):
        row[(position + chunk) // RATIO :] = np.nan  # never written
    feeds = {
        "q": numbers(rng, batch, chunk, HEADS, WIDTH), "weights": numbers(rng, batch, chunk, HEADS),
        "index_entries": entries, "positions": np.array(positions, np.int32), "active_context": np.array([context]),
    }  # fmt: skip
    [found] = sessions["select", least].run(None, feeds)
    tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
    scores = index_scores(*tensors.values(), RATIO)
    expected = index_select(scores, tensors["positions"], RATIO, TOPK).numpy()
    np.testing.assert_array_equal(np.sort(found, axis=-1), np.sort(expected, axis=-1))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30), least=st.sampled_from([1, 5, 1000]), chunk=st.integers(1, 9),
    sequences=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 9)), min_size=1, max_size=3), spare=st.integers(0, 9),
)  # fmt: skip
def test_attention_is_that_of_the_definition(
    sessions: dict, seed: int, least: int, chunk: int, sequences: list[tuple[int, int]], spare: int
) -> None:
    rng, batch = np.random.default_rng(seed), len(sequences)
    sequences = [(position, min(valid, chunk)) for position, valid in sequences]
    context = max(position + valid for position, valid in sequences)
    entries = rng.standard_normal((batch, -(-context // RATIO) + spare, WIDTH), np.float32)
    for row, (position, valid) in zip(entries, sequences, strict=True):
        row[(position + valid) // RATIO :] = np.nan
    feeds = {
        "q": rng.standard_normal((batch, chunk, HEADS, WIDTH), np.float32) * 3,
        "rows": rng.standard_normal((batch, WINDOW + chunk, WIDTH), np.float32), "entries": entries,
        "sinks": rng.standard_normal(HEADS, np.float32), "inv_freq": np.array([1.0, 0.1], np.float32),
        "positions": np.array([position for position, _ in sequences], np.int32),
        "num_tokens": np.array([valid for _, valid in sequences], np.int32), "active_context": np.array([context]),
    }  # fmt: skip
    [found] = sessions["attend", least].run(None, feeds)
    tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
    expected = dense_attention(*tensors.values(), RATIO).numpy()
    for sequence, (_, valid) in enumerate(sequences):  # what comes out for padding is not used
        np.testing.assert_allclose(found[sequence, :valid], expected[sequence, :valid], rtol=2e-5, atol=2e-6)


def test_scores_that_something_else_reads_are_not_dropped() -> None:
    model = ir.from_proto(select.to_model_proto())
    scores = next(node for node in model.graph if node.op_type == "FoldkvIndexScores")
    other = ir.node("Neg", [scores.outputs[0]], name="other")
    model.graph.append(other)
    with pytest.raises(FoldkvError, match="fault of foldkv"):
        read_in_blocks(model)


def test_what_a_chunk_needs_does_not_grow_with_the_context(tiny_bundle: Path) -> None:
    """Peak memory of a chunk over the state, at 4 thousand and at a million tokens. Without blocks it was 4.5 GiB there."""
    peaks = [chunk_peak(tiny_bundle, position) for position in (4096, 1_000_000)]
    assert peaks[1] < 1.3 * peaks[0] and peaks[1] < 512 << 20


def chunk_peak(bundle: Path, position: int) -> int:
    """Bytes that ONNX Runtime's arena holds after a chunk of 256 tokens at that position, in a process of its own."""
    code = f"""
import pathlib, foldkv.runtime.backend as backend
from foldkv.runtime.session import Session
def peak():
    [line] = [l for l in pathlib.Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM")]
    return int(line.split()[1]) * 1024
with Session(pathlib.Path({str(bundle)!r}), context={position + 256}, chunk=256) as session:
    session._positions[:] = {position}
    for rows in session._buffers.arrays.values():
        rows[:] = 1
    session.prefill([[65] * 256])
    print(peak() - session.state_bytes)
"""
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
