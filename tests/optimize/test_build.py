"""Builds: keys, plan headers, real engines without a GPU, and failures that stay with their target."""

from __future__ import annotations

import dataclasses
import os
import signal
import struct
import threading
import time
from pathlib import Path
from typing import Any

import onnx
import pytest

from foldkv.artifact import read_manifest, verify_files
from foldkv.errors import BuildError, InputError, MissingDependencyError
from foldkv.export.state import StateTensor
from foldkv.optimize.build import build_bundles
from foldkv.optimize.engine import build_plan
from foldkv.optimize.passes.lower import lowered_graph
from foldkv.optimize.plan import check_plan, read_plan_header
from foldkv.optimize.spec import BuildSpec, Shapes
from foldkv.optimize.targets import load_targets

SPEC = BuildSpec("g", "w", {"name": "a100", "sm": 80}, "tensorrt-rtx", "1.7", "bfloat16", False)
OTHERS: dict[str, Any] = {
    "graph_sha256": "h", "weights_sha256": "x", "target": {"name": "a100", "sm": 86}, "backend": "tensorrt",
    "backend_version": "1.8", "precision": "float16", "plugins": True, "shapes": Shapes(batch=(1, 1, 8)), "recipe": 99,
}  # fmt: skip


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(BuildSpec)])
def test_every_field_changes_the_key(field: str) -> None:
    changed = dataclasses.replace(SPEC, **{field: OTHERS[field]})
    assert changed.cache_key() != SPEC.cache_key() == dataclasses.replace(SPEC).cache_key()


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
    with pytest.raises(BuildError, match="no TensorRT-RTX plan"):
        read_plan_header(b"ELF" + bytes(100))


def test_lowering_rounds_the_big_products_and_keeps_the_rest(tiny_graph: Path, tmp_path: Path) -> None:
    manifest = read_manifest(tiny_graph, kind="foldkv.graph")
    state = [StateTensor(**row) for row in manifest["state"]]
    lowered, counts = lowered_graph(tiny_graph, tmp_path, state, "bfloat16")
    rows = {tensor.group: tensor.dtype for tensor in lowered}
    assert rows["window"] == rows["entries"] == "bfloat16"
    assert rows["carry_kv"] == rows["carry_gate"] == "float32"
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    low = [t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.BFLOAT16]
    assert counts["weights"] == len(low) > 20
    assert any("experts" in name for name in low)
    assert not any("norm" in name or "sink" in name or "compressor" in name or "hc_" in name for name in low)


@pytest.fixture(scope="module")
def engines(tiny_graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engines")
    small = Shapes(batch=(1, 1, 2), chunk=(1, 1, 16), context=(64, 256, 1024))
    report = build_bundles(tiny_graph, out, ["a100", "h200"], shapes=small)
    results = {result.target: result for result in report.results}
    assert results["h200"].status == "failed" and "TensorRT 11" in results["h200"].reason
    assert results["a100"].status == "built" and report.exit_code == 3
    return out


def test_a_real_engine_is_built_without_a_gpu(engines: Path) -> None:
    manifest = read_manifest(engines / "a100", kind="foldkv.bundle")
    verify_files(engines / "a100", manifest)
    header = check_plan((engines / "a100" / "engine.plan").read_bytes(), sm=load_targets()["a100"].sm or 0)
    assert manifest["engine"]["header"] == header and manifest["engine"]["layers"] > 50
    assert manifest["precision"] == "bfloat16" and manifest["build"]["peak_rss_bytes"] > 1e8
    assert {row["dtype"] for row in manifest["state"] if row["group"] == "entries"} == {"bfloat16"}
    assert not (engines / "h200").exists()


def test_a_build_is_skipped_until_something_changes(engines: Path, tiny_graph: Path) -> None:
    small = Shapes(batch=(1, 1, 2), chunk=(1, 1, 16), context=(64, 256, 1024))
    before = (engines / "a100" / "manifest.json").stat().st_mtime_ns
    report = build_bundles(tiny_graph, engines, ["a100"], shapes=small)
    assert [result.status for result in report.results] == ["unchanged"]
    assert (engines / "a100" / "manifest.json").stat().st_mtime_ns == before


def test_an_engine_is_refused_where_it_cannot_run(engines: Path) -> None:
    from foldkv.runtime.session import Session

    with pytest.raises(MissingDependencyError, match="Use the bundle of the target 'cpu'"):
        Session(engines / "a100", context=64)


def test_a_build_process_that_is_killed_is_an_error_and_leaves_nothing(tiny_graph: Path, tmp_path: Path) -> None:
    manifest = read_manifest(tiny_graph, kind="foldkv.graph")
    state = [StateTensor(**row) for row in manifest["state"]]

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
        build_plan(tiny_graph / "model.onnx", tmp_path / "engine.plan", sm=80, state=state, shapes=Shapes())
    killer.join()
    assert not (tmp_path / "engine.plan").exists()


def test_a_graph_that_the_parser_refuses_is_an_error_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"this is no graph")
    with pytest.raises(BuildError):
        build_plan(tmp_path / "model.onnx", tmp_path / "engine.plan", sm=80, state=[], shapes=Shapes())
