"""Weights that stay as they are stored: in place or repacked, the same logits; layers share functions."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from checkpoints import small_checkpoint, sparse_checkpoint

from foldkv.artifact import read_manifest, verify_files
from foldkv.errors import ArtifactError, CheckpointError, InputError
from foldkv.export.checkpoint import Checkpoint
from foldkv.export.graph import KIND, WEIGHT_MODES, export_checkpoint, link_files
from foldkv.export.repack import repack
from foldkv.export.state import state_tensors
from foldkv.export.weights import Packed, referenced, repacked
from foldkv.optimize.build import build_bundles
from foldkv.plugins.inject import inject

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module", params=["instruct", "base"])
def checkpoint(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tiny_checkpoint, tmp_path_factory.mktemp("released") / request.param, request.param)


def logits(graph: Path, checkpoint: Path) -> np.ndarray:
    ids = np.random.default_rng(1).integers(0, 256, (1, 70))
    feeds = {
        "input_ids": ids, "positions": np.zeros(1, np.int32), "num_tokens": np.full(1, 70, np.int32),
        "active_context": np.array([70]), "logit_indices": np.arange(70)[None],
    }  # fmt: skip
    for row in state_tensors(Checkpoint(checkpoint).spec):
        feeds[row.input] = np.full((1, row.capacity(96), row.width), np.nan, np.float32)
    result: np.ndarray = onnxruntime.InferenceSession(str(graph / "model.onnx")).run(["logits"], feeds)[0]
    return result


@pytest.fixture(scope="module")
def graphs(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The package of every mode; making them leaves the checkpoint as it was."""
    before = {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint.iterdir()}
    folder = tmp_path_factory.mktemp("graphs")
    made = {mode: export_checkpoint(checkpoint, folder / mode, weights=mode) for mode in WEIGHT_MODES}
    assert before == {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint.iterdir()}
    return made


def test_in_place_repacked_and_float32_weights_give_the_same_logits(
    checkpoint: Path, graphs: dict[str, Path], tmp_path: Path
) -> None:
    expected = logits(graphs["float32"], checkpoint)
    for mode in ("reference", "repack"):
        graph = graphs[mode]
        np.testing.assert_allclose(logits(graph, checkpoint), expected, atol=2e-4, rtol=0)
        manifest = read_manifest(graph, kind=KIND)
        verify_files(graph, manifest)
        assert sum(manifest["layers"].values()) == manifest["model"]["num_layers"]
        model = onnx.load(graph / "model.onnx", load_external_data=False)
        assert [node.op_type for node in model.graph.node if node.name.startswith("layers.")] == [
            "FoldkvLayerSlidingHash", "FoldkvLayerCsaMoe", "FoldkvLayerHcaMoe", "FoldkvLayerCsaMoe",
        ]  # fmt: skip
        locations = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
        assert all(not Path(name).is_absolute() and ".." not in Path(name).parts for name in locations)
        if mode == "reference":
            assert all((graph / name).samefile(checkpoint / Path(name).name) for name in locations)
            assert manifest["linked"].keys() == locations
        else:
            assert "linked" not in manifest and locations <= manifest["files"].keys()
            onnx.checker.check_model(str(graph / "model.onnx"))
        # A copy somewhere else is whole.
        np.testing.assert_array_equal(
            logits(shutil.copytree(graph, tmp_path / mode), checkpoint), logits(graph, checkpoint)
        )


def test_engines_and_plugins_are_not_made_from_layers_that_are_functions(
    graphs: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="Export it with --weights float32"):
        inject(graphs["reference"], tmp_path / "out", target="a100", sm=80, dtype="bfloat16")
    [result] = build_bundles(graphs["repack"], tmp_path, ["a100"]).results
    assert result.status == "failed" and result.exit_code == 2 and "--weights float32" in result.reason


def test_a_linked_file_that_was_replaced_is_found(graphs: dict[str, Path], tmp_path: Path) -> None:
    graph = shutil.copytree(graphs["reference"], tmp_path / "graph")
    name, facts = next(iter(read_manifest(graph, kind=KIND)["linked"].items()))
    content = bytearray((graph / name).read_bytes())
    (graph / name).unlink()
    content[20] ^= 1
    (graph / name).write_bytes(content)
    with pytest.raises(ArtifactError, match="is not the file that the artifact was made with"):
        verify_files(graph, read_manifest(graph, kind=KIND))
    (graph / name).write_bytes(content[: facts["bytes"] - 1])
    with pytest.raises(ArtifactError, match="the manifest says"):
        read_manifest(graph, kind=KIND)


def test_experts_in_several_files_are_refused_in_place_and_repacked(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = small_checkpoint(tiny_checkpoint, tmp_path / "split", shards=7)
    with pytest.raises(CheckpointError, match="repack") as caught:
        referenced(Checkpoint(folder))
    assert "layers.2.ffn.experts: weights lie in 2 files" in str(caught.value)
    weights, copies = repacked(Checkpoint(folder))
    assert isinstance(weights["layers.2.ffn.experts"], Packed)
    assert len({(copy.location, copy.offset) for copy in copies}) == len(copies)


def test_plain_experts_are_refused_with_the_way_out(tiny_checkpoint: Path) -> None:
    for plan in (referenced, repacked):
        with pytest.raises(CheckpointError, match="float32"):
            plan(Checkpoint(tiny_checkpoint))


def test_repacking_goes_on_where_it_was_interrupted(checkpoint: Path, tmp_path: Path) -> None:
    source = Checkpoint(checkpoint)
    _, copies = repacked(source)
    whole = repack(copies, tmp_path / "whole", identity="x")
    lines: list[str] = []

    def stop(line: str) -> None:
        lines.append(line)
        raise KeyboardInterrupt

    ticks = iter(range(0, 10**6, 1))
    with pytest.raises(KeyboardInterrupt):
        repack(copies, tmp_path / "work", identity="x", progress=stop, clock=lambda: next(ticks) / 200)
    assert "GiB" in lines[0] and "MiB/s" in lines[0] and "s left" in lines[0]
    done = sorted(path.name for path in (tmp_path / "work" / "weights").glob("*.bin"))
    assert 0 < len(done) < len(whole)
    stamps = {name: (tmp_path / "work" / "weights" / name).stat().st_mtime_ns for name in done}
    assert repack(copies, tmp_path / "work", identity="x") == whole
    assert {name: (tmp_path / "work" / "weights" / name).stat().st_mtime_ns for name in done} == stamps
    for name in whole:
        assert (tmp_path / "work" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    repack(copies, tmp_path / "work", identity="another checkpoint")
    assert (tmp_path / "work" / "weights" / done[0]).stat().st_mtime_ns != stamps[done[0]]


def test_a_disk_without_room_is_refused_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, copies = repacked(Checkpoint(checkpoint))
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match="--weights reference, which copies nothing"):
        repack(copies, tmp_path / "work", identity="x")
    assert not list((tmp_path / "work").glob("weights/*"))


def test_another_file_system_is_refused_with_the_way_out(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(InputError, match=r"Invalid cross-device link.*--weights repack"):
        link_files(Checkpoint(checkpoint), tmp_path)


@pytest.mark.parametrize("model", ["flash", "pro"])
def test_full_size_weights_are_planned_in_place_from_their_headers(model: str, tmp_path: Path) -> None:
    folder = sparse_checkpoint(DATA / f"deepseek-v4-{model}.json", tmp_path / model)
    source = Checkpoint(folder)
    source.check()
    experts = referenced(source)["layers.7.ffn.experts"]
    assert isinstance(experts, Packed)
    spec = source.spec
    assert sorted(experts.slots) == list(range(spec.num_experts)) != list(experts.slots)  # names sort 0, 1, 10, 100
    assert experts.codes.shape == (spec.num_experts, 3 * spec.hidden_size * spec.moe_intermediate_size // 2)
    stored = source.headers["layers.7.ffn.experts.11.w3.weight"]
    offset = experts.codes.offset + experts.slots[11] * experts.codes.shape[1] + dict(experts.matrices)["w3"].codes
    assert offset == stored.offset
    assert sum(path.stat().st_blocks for path in folder.glob("*.safetensors")) * 512 < 64 << 20
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == spec.num_layers
