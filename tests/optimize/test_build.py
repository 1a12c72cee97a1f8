"""Builds: keys, plan headers, real engines without a GPU, and failures that stay with their target."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import struct
import threading
import time
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from engine import library
from gpus import HostDriver
from lowered import lowered
from onnx_ir.passes.common import InlinePass
from onnxscript import FLOAT, script

from foldkv.artifact import read_manifest, verify_files
from foldkv.errors import ArtifactError, BuildError, InputError, MissingDependencyError
from foldkv.export.checkpoint.config_reader import spec_from_file
from foldkv.export.contract.chain import VERSION as CHAIN_VERSION
from foldkv.export.contract.engine_set import VERSION as ENGINES_VERSION
from foldkv.export.contract.state import StateTensor, total_bytes
from foldkv.export.memory import plan_memory
from foldkv.export.operators.quantize import FoldkvQuantizeFp4, FoldkvQuantizeFp8
from foldkv.export.roles import DTYPE_NAMES
from foldkv.manifests import BundleManifest, read
from foldkv.optimize.build import build_bundles, reasons_to_build
from foldkv.optimize.engine_build import Ranges, build_plan, profiles
from foldkv.optimize.fit import plan_target
from foldkv.optimize.plan_file import check_plan, read_plan_header
from foldkv.optimize.recipe import BuildSpec, Shapes
from foldkv.optimize.targets import load_targets
from foldkv.plugins import cuda as cuda_module
from foldkv.plugins.cuda import KernelImage
from foldkv.plugins.declarations import PLUGINS
from foldkv.plugins.inject import inject
from foldkv.records import to_json
from foldkv.runtime import bundle as bundle_module
from foldkv.runtime import engine_model as engine_module
from foldkv.runtime import engine_part
from foldkv.runtime.buffers import StateSpec, plan_bytes
from foldkv.runtime.bundle import load_bundle
from foldkv.runtime.session import Session

SPEC = BuildSpec("g", "w", {"name": "a100", "sm": 80}, "tensorrt-rtx", "1.7", "bfloat16", False)
OTHERS: dict[str, Any] = {
    "graph_sha256": "h", "weights_sha256": "x", "target": {"name": "a100", "sm": 86}, "backend": "tensorrt",
    "backend_version": "1.8", "precision": "float32", "plugins": True, "kernel_compiler": "triton 4", "layout": "fp8",
    "shapes": Shapes(batch=(1, 1, 8)), "recipe": 99, "place": False,
}  # fmt: skip


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(BuildSpec)])
def test_every_field_changes_the_key(field: str) -> None:
    changed = dataclasses.replace(SPEC, **{field: OTHERS[field]})
    assert changed.cache_key() != SPEC.cache_key() == dataclasses.replace(SPEC).cache_key()


def test_tables_of_another_version_are_written_by_another_recipe() -> None:
    """The runtime refuses tables of older versions, and `build` must not call their bundles unchanged: raise the recipe with a version."""
    assert (SPEC.recipe, CHAIN_VERSION, ENGINES_VERSION) == (13, 5, 1)


@pytest.mark.parametrize("sizes", [{"batch": (2, 1, 4)}, {"chunk": (0, 1, 4)}, {"context": (64, 128, 256)}])
def test_shapes_that_no_engine_can_have_are_refused(sizes: dict[str, tuple[int, int, int]]) -> None:
    with pytest.raises(InputError):
        Shapes(**sizes)


def plan(sm_mask: int = 2, size: int = 64) -> bytes:
    header = bytearray(64)
    header[0:4] = header[28:32] = b"vtrt"
    struct.pack_into("<Q", header, 16, size)
    struct.pack_into("<I", header, 32, sm_mask)
    return bytes(header)


def test_a_plan_for_something_else_or_cut_off_is_refused() -> None:
    assert check_plan(plan(), sm=80)["sm"] == [80]
    with pytest.raises(BuildError, match="for sm"):
        check_plan(plan(), sm=86)
    with pytest.raises(BuildError, match="cut off"):
        check_plan(plan(size=999), sm=80)
    with pytest.raises(BuildError, match="not a TensorRT-RTX plan"):
        read_plan_header(b"ELF" + bytes(100))


def test_lowering_rounds_the_big_products_and_keeps_the_rest(tiny_graph: Path, tmp_path: Path) -> None:
    found = lowered(tiny_graph, tmp_path, "bfloat16")
    rows = {tensor.group: tensor.dtype for segment in found.segments.values() for tensor in segment.state}
    assert rows["window"] == rows["entries"] == "bfloat16"
    assert rows["carry_kv"] == rows["carry_gate"] == rows["carry"] == "float32"
    for name, segment in found.segments.items():
        low = {role for role, taken in segment.weights.items() if taken.dtype == "bfloat16"}
        # Compressors, gates and the indexer are stored in bfloat16, but their products run in float32.
        assert not any(re.search(r"compressor|ffn\.gate|indexer\.w|norm|sink|hc_", role) for role in low)
        assert segment.counts["weights"] == len(low) and not segment.widened
        assert (len(low) > 8 and any("experts" in role for role in low)) == (name in found.package.layers)
        weights = {value.name: value.dtype for value in found.model(name).graph.inputs if value.name in segment.weights}
        assert {role: DTYPE_NAMES[dtype] for role, dtype in weights.items() if dtype is not None and role} == {
            role: taken.dtype for role, taken in segment.weights.items()
        }


@pytest.mark.parametrize(("room", "rounds"), [(1 << 30, False), (3 * 2 * 2 * 64 * 32, True)])
def test_the_experts_of_a_chunk_are_gathered_at_once_only_where_they_fit(
    tiny_graph: Path, tmp_path: Path, room: int, rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foldkv.export.memory.EXPERT_ROOM", room)
    found = lowered(tiny_graph, tmp_path, "bfloat16", tokens=64)
    nodes = [node for name in found.package.layers for node in ir.to_proto(found.model(name)).graph.node]
    loops = [attribute.g for node in nodes if node.op_type == "Loop" for attribute in node.attribute]
    products = [sum(node.op_type == "MatMul" for node in body.node) for body in loops]  # Sinkhorn's loops have none
    assert sorted(filter(None, products)) == ([2] * 4 if rounds else [])


#: Of tiny-v4: eight in a sliding layer, fourteen in each of two CSA layers, ten in an HCA layer, and the head's.
PRODUCTS = {"FoldkvBlockLinear": 8 + 2 * 14 + 10 + 1}
SMALL = Shapes(batch=(1, 1, 2), chunk=(1, 1, 16), context=(64, 256, 1024))


@pytest.fixture(scope="module")
def engines(tiny_graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engines")
    with pytest.raises(MissingDependencyError) as refused:
        build_bundles(tiny_graph, out, ["a100", "h200"], plugins=False, shapes=SMALL)
    reason = str(refused.value)
    assert "TensorRT 11" in reason and "pip install 'foldkv[tensorrt]'" in reason and "capability 9.0" in reason
    assert "foldkv build GRAPH --target h200 -o OUT" in reason and not any(out.iterdir())
    report = build_bundles(tiny_graph, out, ["a100"], plugins=False, shapes=SMALL)
    assert [result.status for result in report.results] == ["built"] and report.exit_code == 0
    return out


@pytest.fixture(scope="module")
def plugin_engines(tiny_graph: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bundle with plugins per cache layout."""
    folders = {}
    for layout in ("dense", "fp8+fp4"):
        out = tmp_path_factory.mktemp("plugin-engines")
        report = build_bundles(tiny_graph, out, ["l40s"], layout=layout, shapes=SMALL)
        assert [result.reason for result in report.results] == [""]
        folders[layout] = out / "l40s"
    return folders


@pytest.mark.parametrize("layout", ["dense", "fp8+fp4"])
def test_an_engine_has_the_caches_and_the_weight_that_the_plan_says(
    plugin_engines: dict[str, Path], tiny_checkpoint: Path, layout: str
) -> None:
    plan = plan_target(spec_from_file(tiny_checkpoint), load_targets()["l40s"], context=5000, batch=3, layout=layout)
    manifest = read_manifest(plugin_engines[layout], kind="foldkv.bundle")
    state = [StateTensor(**row) for row in manifest["state"]]
    groups: dict[str, int] = {}
    for tensor in state:
        groups[tensor.group] = groups.get(tensor.group, 0) + tensor.bytes(5000, 3)
    assert groups == plan.memory.groups and total_bytes(state, 5000, 3) == plan.memory.total
    # An engine is mostly code at this size, and code differs between GPUs.
    weight = sum(facts["bytes"] for facts in manifest["files"].values())
    assert plan.bundle / 1.5 < weight < plan.bundle * 1.5


@pytest.mark.parametrize("layout", ["dense", "fp8+fp4"])
def test_a_real_engine_with_plugins_is_built_without_a_gpu(
    plugin_engines: dict[str, Path], tiny_graph: Path, layout: str
) -> None:
    folder = plugin_engines[layout]
    manifest = read_manifest(folder, kind="foldkv.bundle")
    verify_files(folder, manifest)
    counts = read_manifest(tiny_graph, kind="foldkv.graph")["operators"]
    expected = {name: counts[name] for name in PLUGINS if name in counts} | PRODUCTS
    assert {row["name"]: row["nodes"] for row in manifest["plugins"]} == expected
    assert manifest["engine"]["plugin_layers"] == sum(expected.values()) == 41 + 47
    assert all(one["capture"] for one in manifest["engine"]["segments"].values()), (
        "no loop is left, so graphs can capture"
    )
    assert manifest["layout"] == layout
    assert load_bundle(folder).in_place == tuple(row["name"] for row in manifest["state"]), "plugins write all of it"
    plans = {name: (folder / "engines" / f"{name}.plan").read_bytes() for name in manifest["engine"]["segments"]}
    assert all(check_plan(plan, sm=89)["sm"] == [89] for plan in plans.values())
    assert [name for name, plan in plans.items() if b"FoldkvSparseAttention" in plan] == ["csa-moe"]
    for row in manifest["kernels"]["files"]:
        cubin = (folder / row["file"]).read_bytes()
        assert cubin[:4] == b"\x7fELF" and row["sm"] == 89
        assert hashlib.sha256(cubin).hexdigest() == row["sha256"] == manifest["files"][row["file"]]["sha256"]
    listed = {name for row in manifest["plugins"] for name in row["kernels"]}
    assert listed == {row["name"] for row in manifest["kernels"]["files"]}
    # The fields are in the plan, whole: they are what the engine will launch by.
    for text in (
        load_bundle(folder).manifest.kernels.library,
        *{"fp8+fp4": ("fp8_ds_mla", "index_fp4")}.get(layout, ()),
    ):
        layers = sum(manifest["engine"]["segments"]["csa-moe"]["plugins"].values())
        assert plans["csa-moe"].count(text.encode()) >= (layers if text == manifest["kernels"]["library"] else 1)


def test_a_session_over_an_engine_takes_what_build_wrote(
    plugin_engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the engine itself, which the stand-in of the library refuses."""
    folder = next(iter(plugin_engines.values()))
    manifest, driver = read(BundleManifest, folder), HostDriver()
    on_disk = {**read_manifest(folder, kind="foldkv.bundle")}
    assert {key: on_disk[key] for key in manifest.content()} == manifest.content()
    assert on_disk.keys() == {*to_json(manifest), "schema_version", "kind"}
    version = manifest.tool_versions["tensorrt-rtx"]
    monkeypatch.setattr(bundle_module, "device_capability", lambda: manifest.target.sm)
    monkeypatch.setattr(cuda_module, "cuda_driver", lambda: driver)
    monkeypatch.setattr(engine_module.importlib.metadata, "version", lambda name: version)
    monkeypatch.setattr(engine_module.importlib, "import_module", lambda name: library(driver))
    kernels: list[KernelImage] = []
    monkeypatch.setattr(engine_part, "provide_kernels", lambda name, images, driver: kernels.extend(images))
    monkeypatch.setattr(engine_part, "release_kernels", lambda name: None)
    monkeypatch.setattr(engine_part, "register_plugins", lambda trt: None)
    with pytest.raises(ArtifactError, match="cannot be deserialised here"):
        Session(folder)
    assert manifest.kernels is not None and len(kernels) == len(manifest.kernels.files) > 0
    assert {"0.window", "1.entries"} <= set(manifest.in_place)


def test_an_engine_of_a_served_graph_has_its_compression_in_plugins(served_graph: Path, tmp_path: Path) -> None:
    report = build_bundles(served_graph, tmp_path, ["l40s"], plugins=True, layout="fp8+fp4", shapes=SMALL)
    assert [result.reason for result in report.results] == [""]
    manifest = read_manifest(tmp_path / "l40s", kind="foldkv.bundle")
    counts = read_manifest(served_graph, kind="foldkv.graph")["operators"]
    found = {row["name"]: row for row in manifest["plugins"]}
    expected = {name: counts[name] for name in PLUGINS if name in counts} | PRODUCTS
    assert {name: row["nodes"] for name, row in found.items()} == expected
    assert manifest["engine"]["plugin_layers"] == sum(row["nodes"] for row in found.values()) == 41 + 47
    assert found["FoldkvCompressFp8"]["row_formats"] == ["fp8_ds_mla"] and found["FoldkvCompressFp4"][
        "row_formats"
    ] == ["index_fp4"]
    assert (manifest["profile"], manifest["layout"]) == ("served", "fp8+fp4")
    assert load_bundle(tmp_path / "l40s").manifest.kernels.library


@script()
def rounded_rows(window: FLOAT[...]) -> FLOAT[...]:
    # Tiles of 64 do not fill 80 channels, so that a tile is padded.
    return FoldkvQuantizeFp4(FoldkvQuantizeFp8(window, rope_dim=16))


def test_the_rounding_of_served_graphs_is_what_an_engine_takes_without_plugins(tmp_path: Path) -> None:
    """Rounding stays a function body in every engine; a whole served graph without plugins takes a minute to build."""
    onnx.save(rounded_rows.to_model_proto(), tmp_path / "bodies.onnx")
    model = ir.load(tmp_path / "bodies.onnx")
    model.graph.inputs[0].shape = ir.Shape(["batch", 16, 96])
    InlinePass()(model)
    ir.save(model, tmp_path / "model.onnx")
    for sm in (80, 89):
        ranges = [{"window": [[size, 16, 96] for size in SMALL.batch]}]
        result = build_plan(tmp_path / "model.onnx", tmp_path / "plan", sm=sm, ranges=ranges)
        assert result["header"]["sm"] == [sm] and result["layers"] > 30


def test_packed_rows_take_what_the_planner_says(plugin_engines: dict[str, Path], tiny_graph: Path) -> None:
    manifest = read_manifest(plugin_engines["fp8+fp4"], kind="foldkv.bundle")
    planned = plan_memory(spec_from_file(tiny_graph / "config.json"), context=1000, batch=3, layout="fp8+fp4")
    assert plan_bytes(StateSpec.from_manifest(manifest["state"]), 1000, 3) == planned.groups
    assert {row["dtype"] for row in manifest["state"] if row["group"] == "window"} == {"int8"}


def test_a_graph_injected_by_hand_gives_the_same_bundle(
    plugin_engines: dict[str, Path], tiny_graph: Path, tmp_path: Path
) -> None:
    inject(tiny_graph, tmp_path / "injected", target="l40s", sm=89, dtype="bfloat16")
    [result] = build_bundles(tmp_path / "injected", tmp_path / "out", ["l40s"], shapes=SMALL).results
    one, other = (read_manifest(f, kind="foldkv.bundle") for f in (result.folder, plugin_engines["dense"]))
    for key in ("plugins", "kernels", "state", "layout"):
        assert one[key] == other[key]


def test_packed_rows_without_plugins_are_refused(tiny_graph: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"needs plugins.* --plugins on"):
        build_bundles(tiny_graph, tmp_path, ["a100"], plugins=False, layout="fp8")
    with pytest.raises(InputError, match="expected one of dense"):
        build_bundles(tiny_graph, tmp_path, ["a100"], plugins=True, layout="fp7")
    assert not list(tmp_path.iterdir())


def test_lowering_packed_rows_that_a_body_would_read_is_refused(tiny_graph: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"is packed, but .* is not a plugin"):
        lowered(tiny_graph, tmp_path, "bfloat16", layout="fp8", rope_dim=16)


def segment_ranges(graph: Path, folder: Path) -> tuple[Path, list[Ranges]]:
    """The lowered segment of a sliding layer, and the shapes of its profiles."""
    found = lowered(graph, folder, "bfloat16")
    name = next(name for name in found.package.layers if name.startswith("sliding"))
    return folder / name / "model.onnx", profiles(found.model(name), found.segments[name].state, SMALL)


def test_a_network_without_the_injected_plugins_is_refused(tiny_graph: Path, tmp_path: Path) -> None:
    graph, ranges = segment_ranges(tiny_graph, tmp_path)
    with pytest.raises(BuildError, match="0 plugin layers; 17 nodes were injected"):
        build_plan(graph, tmp_path / "plan", sm=80, ranges=ranges, plugins=17)
    assert not (tmp_path / "plan").exists()


def test_a_real_engine_is_built_without_a_gpu(engines: Path) -> None:
    manifest = read_manifest(engines / "a100", kind="foldkv.bundle")
    verify_files(engines / "a100", manifest)
    for name, facts in manifest["engine"]["segments"].items():
        plan = (engines / "a100" / "engines" / f"{name}.plan").read_bytes()
        assert facts["header"] == check_plan(plan, sm=load_targets()["a100"].sm or 0)
        assert facts["layers"] > (50 if "-" in name else 1)
    assert manifest["precision"] == "bfloat16" and manifest["build"]["peak_rss_bytes"] > 1e8
    assert {row["dtype"] for row in manifest["state"] if row["group"] == "entries"} == {"bfloat16"}
    assert not (engines / "h200").exists()


def test_a_build_is_skipped_until_something_changes(engines: Path, tiny_graph: Path) -> None:
    before = (engines / "a100" / "manifest.json").stat().st_mtime_ns
    report = build_bundles(tiny_graph, engines, ["a100"], plugins=False, shapes=SMALL)
    assert [result.status for result in report.results] == ["unchanged"]
    assert (engines / "a100" / "manifest.json").stat().st_mtime_ns == before


def test_an_engine_is_refused_where_it_cannot_run(engines: Path) -> None:
    from foldkv.runtime.session import Session

    with pytest.raises(MissingDependencyError, match="Use the bundle of the target 'cpu'"):
        Session(engines / "a100", context=64)


def test_a_build_process_that_is_killed_is_an_error_and_leaves_nothing(tiny_graph: Path, tmp_path: Path) -> None:
    graph, ranges = segment_ranges(tiny_graph, tmp_path)

    def kill() -> None:
        for _ in range(600):
            time.sleep(0.05)
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    command = path.read_bytes()
                    parent = int((path.parent / "stat").read_text().rsplit(")", 1)[1].split()[1])
                except OSError:
                    continue
                if b"foldkv.optimize.engine_worker" in command and parent == os.getpid():
                    os.kill(int(path.parent.name), signal.SIGKILL)
                    return

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(BuildError, match="SIGKILL"):
        build_plan(graph, tmp_path / "engine.plan", sm=80, ranges=ranges)
    killer.join()
    assert not (tmp_path / "engine.plan").exists()


def test_a_graph_that_the_parser_refuses_is_an_error_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"this is no graph")
    with pytest.raises(BuildError):
        build_plan(tmp_path / "model.onnx", tmp_path / "engine.plan", sm=80, ranges=[])


def test_other_tokens_that_end_a_text_are_another_bundle(tiny_graph: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """generation_config.json is in no file of the package; only the manifest has its tokens."""
    graph = shutil.copytree(tiny_graph, tmp_path / "graph")
    assert reasons_to_build(graph, tiny_bundle.parent, ["cpu"]) == {"cpu": ""}
    manifest = json.loads((graph / "manifest.json").read_text())
    manifest["model"]["eos_token_ids"] = [7]
    (graph / "manifest.json").write_text(json.dumps(manifest))
    assert "special tokens" in reasons_to_build(graph, tiny_bundle.parent, ["cpu"])["cpu"]
