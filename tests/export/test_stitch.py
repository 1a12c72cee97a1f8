"""The stitched graph in ONNX Runtime against transformers, and the names that tools find in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import DeepseekV4ForCausalLM
from whole import opened, whole_model

from foldkv.export.contract.operators import expected_operators
from foldkv.export.package import export_checkpoint, read_package
from foldkv.export.stitch import flat_model

pytestmark = pytest.mark.slow  # an export per kind of model
CONTEXT = 80


@pytest.fixture(scope="module")
def graph(
    traced_checkpoint: tuple[DeepseekV4ForCausalLM, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[DeepseekV4ForCausalLM, Path]:
    model, folder = traced_checkpoint
    return model, export_checkpoint(folder, tmp_path_factory.mktemp("graph") / "graph")


def run(graph: Path, ids: np.ndarray, splits: list[int], active: int | None = None) -> np.ndarray:
    ort = opened(whole_model(graph, graph.with_name("whole")))
    batch, rows = ids.shape[0], read_package(graph).state
    state = {row.input: np.full((batch, row.capacity(CONTEXT), row.width), np.nan, np.float32) for row in rows}
    start, out = 0, []
    for size in splits:
        feeds = {
            "input_ids": ids[:, start : start + size],
            "positions": np.full(batch, start, np.int32),
            "num_tokens": np.full(batch, size, np.int32),
            "active_context": np.array([active or start + size]),
            "logit_indices": np.tile(np.arange(size), (batch, 1)),
        }
        logits, *after = ort.run(["logits", *(row.output for row in rows)], feeds | state)
        state = {row.input: value for row, value in zip(rows, after, strict=True)}
        out.append(logits)
        start += size
    return np.concatenate(out, axis=1)


@pytest.mark.parametrize("splits", [[53], [1] * 20 + [33], [3, 8, 1, 17, 24]], ids=["whole", "decode", "chunks"])
def test_onnx_gives_the_logits_of_transformers(graph: tuple[DeepseekV4ForCausalLM, Path], splits: list[int]) -> None:
    reference, path = graph
    ids = torch.randint(0, 61, (2, 53), generator=torch.Generator().manual_seed(5))
    expected = reference(ids, use_cache=False).logits.numpy()
    np.testing.assert_allclose(run(path, ids.numpy(), splits), expected, atol=1e-4, rtol=0)


def test_looking_at_more_rows_than_needed_changes_nothing(graph: tuple[DeepseekV4ForCausalLM, Path]) -> None:
    _, path = graph
    ids = np.random.default_rng(0).integers(0, 61, (1, 30))
    np.testing.assert_allclose(run(path, ids, [30], active=CONTEXT), run(path, ids, [30]), atol=1e-5, rtol=0)


def test_the_graph_names_every_input_output_and_operator(graph: tuple[DeepseekV4ForCausalLM, Path]) -> None:
    _, path = graph
    package = read_package(path)
    model = flat_model(package)
    onnx.checker.check_model(model)
    names = ["input_ids", "positions", "num_tokens", "active_context", "logit_indices"]
    state = package.state
    found = [i.name for i in model.graph.input]
    assert found[: len(names) + len(state)] == names + [row.input for row in state]
    assert [o.name for o in model.graph.output] == ["logits"] + [row.output for row in state]
    weights = {f"{owner}.{role}" if owner.startswith("layers.") else role for owner, role, _ in package.lock}
    assert set(found[len(names) + len(state) :]) == weights
    assert {"embed.weight", "head.weight", "layers.0.ffn.experts.w2", "layers.0.ffn.experts.w13"} <= weights
    assert package.manifest.operators == expected_operators(package.spec)
    used = {node.op_type for node in model.graph.node if node.domain == "foldkv"}
    assert used <= {function.name for function in model.functions}
    made = {name for node in model.graph.node for name in node.output}
    assert {f"tap.layers.{layer}.hidden" for layer in range(package.spec.num_layers)} <= made
    sparse = [i for i, kind in enumerate(package.spec.layer_types) if kind == "compressed_sparse_attention"]
    assert {f"tap.layers.{layer}.chosen" for layer in sparse} <= made
