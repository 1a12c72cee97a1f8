"""Weights that stay as they are stored: in place or repacked, the same logits; layers share functions."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from checkpoints import random_checkpoint, small_checkpoint, sparse_checkpoint
from disks import hub_cache
from lowered import lowered_logits

from foldkv.artifact import read_manifest, sha256_json, verify_files, write_manifest
from foldkv.config import PipelineConfig
from foldkv.errors import ArtifactError, CheckpointError, InputError
from foldkv.export.checkpoint.reader import Checkpoint
from foldkv.export.contract.state import state_tensors
from foldkv.export.graph import KIND, WEIGHT_MODES, export_checkpoint, flat_model, link_files
from foldkv.export.memory import parameter_groups
from foldkv.export.repack import repack
from foldkv.export.weights import Packed, referenced, repacked
from foldkv.manifests import GraphManifest, read
from foldkv.optimize.build import build_bundles, reasons_to_build
from foldkv.optimize.fit import plan_target
from foldkv.optimize.kept_weights import Package, stored_format
from foldkv.optimize.targets import load_targets
from foldkv.pipeline import export_changes
from foldkv.plugins.inject import inject
from foldkv.progress import BYTES, Progress
from foldkv.runtime.session import Session

pytestmark = pytest.mark.slow

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module", params=["instruct", "base"])
def checkpoint(
    request: pytest.FixtureRequest, released_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A copy of its own, because packages that link it change the number of its files' links."""
    copy = tmp_path_factory.mktemp("released") / request.param
    return Path(shutil.copytree(released_checkpoint(request.param), copy))


def inputs(checkpoint: Path) -> dict[str, np.ndarray]:
    """A chunk of 70 tokens, and caches that hold nothing yet."""
    ids = np.random.default_rng(1).integers(0, 256, (1, 70))
    feeds = {
        "input_ids": ids, "positions": np.zeros(1, np.int32), "num_tokens": np.full(1, 70, np.int32),
        "active_context": np.array([70]), "logit_indices": np.arange(70)[None],
    }  # fmt: skip
    for row in state_tensors(Checkpoint(checkpoint).spec):
        feeds[row.input] = np.full((1, row.capacity(96), row.width), np.nan, np.float32)
    return feeds


def logits(graph: Path, checkpoint: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(graph / "model.onnx"))
    result: np.ndarray = session.run(["logits"], inputs(checkpoint))[0]
    return result


#: For tests that need the package that links; what the experts' format is makes no difference to links.
linked = pytest.mark.parametrize("checkpoint", ["instruct"], indirect=True)


@pytest.fixture(scope="module")
def graphs(
    checkpoint: Path, released_graph: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The package of every mode; making them leaves the checkpoint as it was."""
    modes = WEIGHT_MODES if checkpoint.name == "instruct" else ("float32", "repack")
    before = {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint.iterdir()}
    folder = tmp_path_factory.mktemp("graphs")
    made = {mode: export_checkpoint(checkpoint, folder / mode, weights=mode) for mode in modes if mode != "float32"}
    assert before == {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint.iterdir()}
    return {"float32": released_graph(checkpoint.name)} | made


def test_in_place_repacked_and_float32_weights_give_the_same_logits(
    checkpoint: Path, graphs: dict[str, Path], tmp_path: Path
) -> None:
    expected = logits(graphs["float32"], checkpoint)
    for mode, graph in graphs.items():
        if mode == "float32":
            continue
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


@linked
def test_a_served_graph_with_weights_in_place_computes_what_the_float32_export_does(
    checkpoint: Path, tmp_path: Path
) -> None:
    """As ONNX Runtime runs the packages themselves, and packed rows of a bundle are those of dense ones, to the bit."""
    made = {
        mode: export_checkpoint(checkpoint, tmp_path / mode, profile="served", weights=mode)
        for mode in ("float32", "reference")
    }
    have, want = (logits(made[mode], checkpoint) for mode in ("reference", "float32"))
    np.testing.assert_allclose(have, want, atol=2e-4, rtol=0)
    whole, stitched = (read_manifest(made[mode], kind=KIND)["operators"] for mode in ("float32", "reference"))
    experts = whole.pop("FoldkvRoutedExperts")
    assert whole.items() <= stitched.items() and stitched["FoldkvRoutedExpertsFp4"] == experts
    tokens = inputs(checkpoint)["input_ids"][0].tolist()
    found = []
    for layout in ("dense", "fp8+fp4"):
        build_bundles(made["reference"], tmp_path / layout, ["cpu"], layout=layout)
        with Session(tmp_path / layout / "cpu", context=96) as session:
            found.append(session.prefill([tokens])[0])
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_allclose(found[0], want[0, -1], atol=1e-3, rtol=0)


@pytest.mark.parametrize(("sm", "kept"), [(80, "float32"), (89, "fp8")])
def test_a_graph_lowered_for_a_gpu_computes_what_the_float32_export_does(
    checkpoint: Path, graphs: dict[str, Path], tmp_path: Path, sm: int, kept: str
) -> None:
    expected = logits(graphs["float32"], checkpoint)
    have, weights = lowered_logits(graphs["repack"], tmp_path / "out", inputs(checkpoint), sm=sm, precision="float32")
    np.testing.assert_allclose(have, expected, atol=2e-4, rtol=0)
    spec = Checkpoint(checkpoint).spec
    counts = parameter_groups(spec)
    # Experts weigh what they weigh in the file, whatever the GPU; matrices where its engines keep them.
    experts = "fp4" if checkpoint.name == "instruct" else "fp8"
    matrices = sum(
        row.bytes
        for name, row in Checkpoint(checkpoint).headers.items()
        if row.dtype == "F8_E4M3" and ".experts." not in name
    )
    expected_bytes = {experts: counts["experts"] * (4.25 if experts == "fp4" else 8) / 8}
    expected_bytes[kept] = expected_bytes.get(kept, 0) + matrices * (4 if kept == "float32" else 1)
    for name, size in expected_bytes.items():
        assert size <= weights["kept"][name]["bytes"] < size + (1 << 19) * (name == "float32") + 4096
    assert [row["weights"] for row in weights["widened"]] == ([34] if sm == 80 else [])


@linked
def test_rounded_to_bfloat16_all_forms_of_a_weight_give_the_same_bits(
    checkpoint: Path, graphs: dict[str, Path], tmp_path: Path
) -> None:
    # A power of two changes no digit: decoded in bfloat16, or decoded in float32 and rounded, or kept as e4m3.
    feeds = {name: np.nan_to_num(value) for name, value in inputs(checkpoint).items()}
    forms = {"float32": 80, "reference": 80, "repack": 89}
    found = [
        lowered_logits(graphs[mode], tmp_path / mode, feeds, sm=sm, precision="bfloat16")[0]
        for mode, sm in forms.items()
    ]
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])
    exact = logits(graphs["float32"], checkpoint)
    assert 0 < np.abs(found[0] - exact).max() < 0.02 * np.abs(exact).max()


@linked
def test_an_injected_package_links_what_its_graph_linked_and_gives_the_same_nodes_to_plugins(
    checkpoint: Path, graphs: dict[str, Path], tmp_path: Path
) -> None:
    target: dict[str, Any] = {"target": "a100", "sm": 80, "dtype": "bfloat16"}
    before = read_manifest(graphs["reference"], kind=KIND)
    whole = {row.operator: row.injected for row in inject(graphs["float32"], tmp_path / "whole", **target).rows}
    injection = inject(graphs["reference"], tmp_path / "out", **target)
    assert {row.operator: row.injected for row in injection.rows if row.injected} == {
        name: count for name, count in whole.items() if count
    }
    assert all(row.injected + sum(row.refusals.values()) == row.nodes for row in injection.rows)
    assert not any("no plugin for this operator" in row.refusals for row in injection.rows)
    manifest = read_manifest(tmp_path / "out", kind=KIND)
    verify_files(tmp_path / "out", manifest)
    assert manifest["linked"] == before["linked"] and "layers" not in manifest
    assert {row.operator: row.nodes for row in injection.rows} == manifest["operators"]
    for name in manifest["linked"]:
        assert (tmp_path / "out" / name).samefile(checkpoint / Path(name).name)
    # The flat graph has the names of one that was traced whole, and computes the same.
    names = {value for node in flat_model(graphs["float32"]).graph.node for value in node.output if "tap." in value}
    assert names == {
        value for node in flat_model(tmp_path / "out").graph.node for value in node.output if "tap." in value
    }
    np.testing.assert_array_equal(logits(tmp_path / "out", checkpoint), logits(graphs["reference"], checkpoint))


@linked
def test_a_file_system_that_takes_no_links_is_refused_by_inject_with_the_way_out(
    graphs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(InputError, match=r"Invalid cross-device link.*let build inject"):
        inject(graphs["reference"], tmp_path / "out", target="a100", sm=80, dtype="bfloat16")
    assert not (tmp_path / "out").exists()


@linked
@pytest.mark.parametrize("location", ["../secret.bin", "/etc/hostname", "weights/other.bin"])
def test_a_graph_whose_weights_lie_elsewhere_is_refused(graphs: dict[str, Path], tmp_path: Path, location: str) -> None:
    graph = tmp_path / "graph"
    shutil.copytree(graphs["repack"], graph)
    (tmp_path / "secret.bin").write_bytes(bytes(1 << 20))
    (graph / "weights" / "other.bin").symlink_to(tmp_path / "secret.bin")
    model = onnx.load(graph / "model.onnx", load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(entry for entry in tensor.external_data if entry.key == "location").value = location
    content = read_manifest(graph, kind=KIND)
    onnx.save(model, graph / "model.onnx")
    (graph / "weights" / "other.bin").unlink()
    kept = {key: value for key, value in content.items() if key not in ("files", "kind", "schema_version")}
    write_manifest(graph, kind=KIND, content=kept)  # as whoever changed the graph would
    with pytest.raises(ArtifactError, match=r"names files for its weights that the manifest does not list"):
        inject(graph, tmp_path / "out", target="a100", sm=80, dtype="bfloat16")
    for target in ("a100", "cpu"):
        with pytest.raises(ArtifactError, match=r"names files for its weights that the manifest does not list"):
            build_bundles(graph, tmp_path / "bundles", [target], plugins=False)


@linked
def test_a_cpu_bundle_is_made_of_files_that_are_linked(
    checkpoint: Path, graphs: dict[str, Path], tmp_path: Path
) -> None:
    [result] = build_bundles(graphs["reference"], tmp_path, ["cpu"]).results
    assert result.status == "built", result.reason
    # Weights stay as they are stored, which is what plan says of the disk.
    source = Checkpoint(checkpoint)
    package = Package("reference", stored_format(source.config, {n: s.dtype for n, s in source.headers.items()}))
    assert package.stored == "fp4"
    planned = plan_target(source.spec, load_targets()["cpu"], context=64, package=package)
    held = (result.folder / "weights.bin").stat().st_size
    assert held == pytest.approx(planned.weights["fp4"], rel=0.2), (held, planned.weights)
    np.testing.assert_allclose(
        logits(result.folder, checkpoint), logits(graphs["float32"], checkpoint), atol=2e-4, rtol=0
    )


@linked
def test_a_pipeline_exports_again_when_what_it_would_export_has_changed(
    checkpoint: Path, graphs: dict[str, Path], tmp_path: Path
) -> None:
    graph = graphs["reference"]
    settings = {"version": 1, "checkpoint": str(checkpoint), "output": "out"}
    made = read(GraphManifest, graph)
    for weights, reason in (("reference", ""), ("repack", "was reference, is repack"), ("float32", "is float32")):
        config = PipelineConfig.model_validate(settings | {"export": {"weights": weights}})
        found = export_changes(config, Checkpoint(checkpoint), graph, made)
        assert reason in found and bool(reason) == bool(found)
    # Another package that links the same files, and a copy of this one, change nothing.
    config = PipelineConfig.model_validate(settings | {"export": {"weights": "reference"}})
    link_files(Checkpoint(checkpoint), tmp_path / "another")
    assert not export_changes(config, Checkpoint(checkpoint), graph, made)
    copied = shutil.copytree(graph, tmp_path / "graph")
    verify_files(copied, read_manifest(copied, kind=KIND))
    # Files that were replaced, with the same headers, are other files.
    moved = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    config = PipelineConfig.model_validate(settings | {"checkpoint": str(moved), "export": {"weights": "reference"}})
    assert "were written again or replaced" in export_changes(config, Checkpoint(moved), graph, made)


@pytest.fixture(scope="module")
def one_layer(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantised model of one layer, which is exported in seconds."""
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "layer_types": ["sliding_attention"], "mlp_layer_types": ["moe"]}
    return random_checkpoint(config, tmp_path_factory.mktemp("one") / "checkpoint")


def save_again(folder: Path) -> None:
    """Other weights under the same names, shapes and sizes, written in place as a trainer does."""
    for file in folder.glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-64:] = bytes(byte ^ 1 for byte in content[-64:])
        file.write_bytes(content)


@pytest.mark.parametrize("weights", ["reference", "repack"])
def test_weights_that_were_saved_again_are_noticed_by_every_stage(
    one_layer: Path, tmp_path: Path, weights: str
) -> None:
    folder = shutil.copytree(one_layer, tmp_path / "checkpoint")
    graph = export_checkpoint(folder, tmp_path / "graph", weights=weights)
    settings = {"version": 1, "checkpoint": str(folder), "output": "out", "export": {"weights": weights}}
    config = PipelineConfig.model_validate(settings)
    assert not export_changes(config, Checkpoint(folder), graph, read_manifest(graph, kind=KIND))
    before = Checkpoint(folder).identity()
    save_again(folder)
    assert Checkpoint(folder).identity() == before, "the headers do not show it"
    reason = export_changes(config, Checkpoint(folder), graph, read_manifest(graph, kind=KIND))
    assert reason == f"weight files of the checkpoint {folder} were written again or replaced"
    if weights == "repack":
        return
    # The package has these very files, so it is not what it says any more.
    with pytest.raises(ArtifactError, match=r"weights/model.*\.safetensors was written again after the artifact"):
        build_bundles(graph, tmp_path / "bundles", ["cpu"])
    export_checkpoint(folder, graph, weights=weights)
    assert build_bundles(graph, tmp_path / "bundles", ["cpu"]).exit_code == 0
    assert reasons_to_build(graph, tmp_path / "bundles", ["cpu"]) == {"cpu": ""}
    manifest = json.loads((graph / "manifest.json").read_text())
    for facts in manifest["linked"].values():
        facts["file"]["modified_ns"] += 1  # what an export of weights of another time records
    (graph / "manifest.json").write_text(json.dumps(manifest))
    assert "the weights" in reasons_to_build(graph, tmp_path / "bundles", ["cpu"])["cpu"]


def test_a_checkpoint_that_is_written_while_it_is_exported_is_refused(one_layer: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(one_layer, tmp_path / "checkpoint")

    def save_during(text: str) -> None:
        if text.startswith("copying"):
            save_again(folder)

    with pytest.raises(CheckpointError, match=r"(?s)was written while it was read .*model.*\.safetensors"):
        export_checkpoint(folder, tmp_path / "graph", weights="repack", progress=save_during)
    assert not (tmp_path / "graph").exists()


class _StopsInTheMiddle:
    """A sink of progress that is interrupted when half of the bytes are copied."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, part: str, text: str) -> None:
        self.lines.append(text)

    def steps(self, part: str, done: float, total: float, unit: str) -> None:
        assert unit == BYTES
        if done > total / 2:
            raise KeyboardInterrupt

    def expect(self, part: str, low: float, high: float) -> None:
        raise AssertionError

    def end(self, part: str) -> None:
        raise AssertionError


class _StopsAtTheEnd(_StopsInTheMiddle):
    """A sink of progress that is interrupted when all bytes are copied, but the last file is not complete yet."""

    def steps(self, part: str, done: float, total: float, unit: str) -> None:
        if unit == BYTES and done >= total:
            raise KeyboardInterrupt


def test_an_interrupted_copy_is_not_continued_with_other_weights(one_layer: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(one_layer, tmp_path / "checkpoint")
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(folder, tmp_path / "graph", weights="repack", progress=Progress(_StopsAtTheEnd()))
    assert list((tmp_path / "graph.foldkv-repack" / "weights").glob("*.bin"))
    save_again(folder)
    made = read_manifest(export_checkpoint(folder, tmp_path / "graph", weights="repack"), kind=KIND)["files"]
    expected = repack(repacked(Checkpoint(folder))[1], tmp_path / "clean", identity="x")
    assert expected and {name: made[name]["sha256"] for name in expected} == expected
    assert not (tmp_path / "graph.foldkv-repack").exists()


def test_a_checkpoint_of_the_hugging_face_cache_is_the_same_on_every_machine(one_layer: Path, tmp_path: Path) -> None:
    first, second = (hub_cache(one_layer, tmp_path / f"models--x--{name}") for name in "yz")
    assert Checkpoint(first).files_identity() == Checkpoint(second).files_identity()
    assert Checkpoint(first).files_identity() != Checkpoint(one_layer).files_identity()
    Checkpoint(first).check_unchanged()
    save_again(first)
    assert Checkpoint(first).files_identity() != Checkpoint(second).files_identity()


@linked
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
    assert "layers.2.ffn.experts: weights are in 2 files" in str(caught.value)
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
    stop = _StopsInTheMiddle()
    with pytest.raises(KeyboardInterrupt):
        repack(copies, tmp_path / "work", identity="x", progress=Progress(stop))
    assert stop.lines == ["copying 0.0 GiB of weights"]
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


@linked
def test_tables_of_places_are_named_by_their_content(graphs: dict[str, Path]) -> None:
    model = onnx.load(graphs["reference"] / "model.onnx", load_external_data=False)
    tables = {
        t.name: onnx.numpy_helper.to_array(t).tolist() for t in model.graph.initializer if t.name.startswith("slots.")
    }
    assert tables and {name: f"slots.{sha256_json(table)}" for name, table in tables.items()} == {n: n for n in tables}
