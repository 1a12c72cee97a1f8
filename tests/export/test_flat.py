"""The flat view: one ONNX model that plain ONNX Runtime opens, from links where it can, with equal logits."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from checkpoints import small_checkpoint
from whole import first_chunk, logits, whole_model

from foldkv.artifact import SCHEMA_VERSION
from foldkv.export import files
from foldkv.export.flat import export_flat
from foldkv.export.package import export_checkpoint
from foldkv.manifests import FlatManifest, read_any
from foldkv.records import to_json

pytestmark = pytest.mark.slow
IDS = np.random.default_rng(1).integers(0, 256, (1, 70))


@pytest.mark.parametrize("form", ["plain", "instruct"])
def test_plain_onnx_runtime_computes_what_the_segments_do(tiny_checkpoint: Path, tmp_path: Path, form: str) -> None:
    checkpoint = tiny_checkpoint
    if form == "instruct":
        checkpoint = small_checkpoint(tiny_checkpoint, tmp_path / "checkpoint", form)
    graph = export_checkpoint(checkpoint, tmp_path / "graph")
    feeds = first_chunk(graph, IDS, 96)
    expected = logits(whole_model(graph, tmp_path / "whole"), feeds)
    model = export_flat(checkpoint, tmp_path / "flat")
    assert model == tmp_path / "flat" / "model.onnx"
    manifest = read_any(tmp_path / "flat", verify=True)
    assert isinstance(manifest, FlatManifest)
    table = json.loads((tmp_path / "flat" / "manifest.json").read_text())
    assert {"schema_version": SCHEMA_VERSION, "kind": FlatManifest.KIND, **to_json(manifest)} == table
    np.testing.assert_allclose(logits(model, feeds), expected, atol=1e-5, rtol=0)
    proto = onnx.load(model, load_external_data=False)
    calls = [node.op_type for node in proto.graph.node if node.name.startswith("layers.")]
    assert calls == ["FoldkvLayerSlidingHash", "FoldkvLayerCsaMoe", "FoldkvLayerHcaMoe", "FoldkvLayerCsaMoe"]
    assert not [value.name for value in proto.graph.input if "weight" in value.name]
    # Experts as released are rows of the checkpoint's own files; plain ones, three tensors each, are joined.
    assert (tmp_path / "flat" / "weights" / "joined.bin").exists() == (form == "plain")
    for name in manifest.linked_files:
        assert (tmp_path / "flat" / name).read_bytes() == (checkpoint / Path(name).name).read_bytes()
    copy = shutil.copytree(tmp_path / "flat", tmp_path / "copy")
    np.testing.assert_array_equal(logits(copy / "model.onnx", feeds), logits(model, feeds))


def test_where_no_link_is_possible_weights_are_copied(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(files, "_reflink", refuse)
    lines: list[str] = []
    export_flat(tiny_checkpoint, tmp_path / "flat", progress=lines.append)
    assert "weights: 1 files (copy)" in lines
    held = tmp_path / "flat" / "weights" / "model.safetensors"
    assert held.read_bytes() == (tiny_checkpoint / "model.safetensors").read_bytes() and held.stat().st_nlink == 1
