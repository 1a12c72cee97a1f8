"""The ONNX graph in ONNX Runtime against the decoder it was traced from, and against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import DeepseekV4ForCausalLM

from foldkv.artifact import read_manifest
from foldkv.export.checkpoint.reader import Checkpoint, decoder_from_checkpoint
from foldkv.export.contract.state import StateTensor
from foldkv.export.graph import KIND, export_checkpoint
from foldkv.export.trace import expected_counts

pytestmark = pytest.mark.slow

CONTEXT = 80


@pytest.fixture(scope="module")
def graph(
    reference_checkpoint: tuple[DeepseekV4ForCausalLM, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[DeepseekV4ForCausalLM, Path, Path]:
    model, folder = reference_checkpoint
    return model, folder, export_checkpoint(folder, tmp_path_factory.mktemp("graph") / "graph")


def session(path: Path) -> tuple[onnxruntime.InferenceSession, dict[str, Any]]:
    return onnxruntime.InferenceSession(str(path / "model.onnx")), read_manifest(path, kind=KIND)


def run(path: Path, ids: np.ndarray, splits: list[int], active: int | None = None) -> np.ndarray:
    ort, manifest = session(path)
    batch = ids.shape[0]
    rows = [StateTensor(**row) for row in manifest["state"]]
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
def test_onnx_gives_the_logits_of_transformers(
    graph: tuple[DeepseekV4ForCausalLM, Path, Path], splits: list[int]
) -> None:
    reference, _, path = graph
    ids = torch.randint(0, 61, (2, 53), generator=torch.Generator().manual_seed(5))
    expected = reference(ids, use_cache=False).logits.numpy()
    np.testing.assert_allclose(run(path, ids.numpy(), splits), expected, atol=1e-4, rtol=0)


def test_looking_at_more_rows_than_needed_changes_nothing(graph: tuple[DeepseekV4ForCausalLM, Path, Path]) -> None:
    _, _, path = graph
    ids = np.random.default_rng(0).integers(0, 61, (1, 30))
    np.testing.assert_allclose(run(path, ids, [30], active=CONTEXT), run(path, ids, [30]), atol=1e-5, rtol=0)


def test_the_graph_names_every_input_output_and_operator(graph: tuple[DeepseekV4ForCausalLM, Path, Path]) -> None:
    _, checkpoint, path = graph
    model = onnx.load(path / "model.onnx", load_external_data=False)
    manifest = read_manifest(path, kind=KIND)
    state = manifest["state"]
    names = ["input_ids", "positions", "num_tokens", "active_context", "logit_indices"]
    assert [i.name for i in model.graph.input] == names + [row["input"] for row in state]
    assert [o.name for o in model.graph.output] == ["logits"] + [row["output"] for row in state]
    assert manifest["operators"] == expected_counts(decoder_from_checkpoint(Checkpoint(checkpoint)))
    used = {node.op_type for node in model.graph.node if node.domain == "foldkv"}
    assert used <= {function.name for function in model.functions}
    taps = {f"tap.layers.{layer}.hidden" for layer in range(manifest["model"]["num_layers"])}
    assert taps <= {name for node in model.graph.node for name in node.output}


def test_weights_have_the_released_names_and_lie_outside_the_graph(
    graph: tuple[DeepseekV4ForCausalLM, Path, Path],
) -> None:
    _, _, path = graph
    model = onnx.load(path / "model.onnx", load_external_data=False)
    external = {t.name for t in model.graph.initializer if t.external_data}
    assert {"embed.weight", "head.weight", "layers.0.ffn.experts.w2", "layers.1.ffn.experts.w13"} <= external
    assert {entry.value for t in model.graph.initializer for entry in t.external_data if entry.key == "location"} == {
        "weights.bin"
    }


def test_an_export_is_reproducible_and_its_manifest_says_what_made_it(make_reference: Any, tmp_path: Path) -> None:
    one_layer = {"layer_types": ["heavily_compressed_attention"]}
    make_reference(3, **one_layer).save_pretrained(tmp_path / "checkpoint")
    first = read_manifest(export_checkpoint(tmp_path / "checkpoint", tmp_path / "a"), kind=KIND)
    second = read_manifest(export_checkpoint(tmp_path / "checkpoint", tmp_path / "b"), kind=KIND)
    assert first["files"] == second["files"]
    assert first["inputs"]["checkpoint"]["sha256"] == second["inputs"]["checkpoint"]["sha256"]
    assert json.loads((tmp_path / "a" / "config.json").read_text())["model_type"] == "deepseek_v4"
    make_reference(4, **one_layer).save_pretrained(tmp_path / "checkpoint")
    # That a package holds the weights of its checkpoint is what its logits show.
    assert Checkpoint(tmp_path / "checkpoint").digest() != first["inputs"]["checkpoint"]["sha256"]
