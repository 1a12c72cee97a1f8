"""Engines built on a Ray cluster: the bundle is that of a run without, also if a worker is killed in the middle. Needs the extra ``ray``."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoints import random_checkpoint
from command import start

from foldkv.artifact import MANIFEST
from foldkv.backends import TENSORRT, TENSORRT_RTX
from foldkv.cluster import LOCAL, Cluster
from foldkv.errors import BuildError, InputError, MissingDependencyError
from foldkv.export.package import export_checkpoint
from foldkv.optimize import cluster_build
from foldkv.optimize.build import build_bundles, check_ray
from foldkv.optimize.engine_build import build_plan
from foldkv.optimize.recipe import Shapes
from foldkv.optimize.targets import resolve_targets

# Ray leaves files and sockets of its own to the interpreter.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("ray", reason="the extra ray is 250 MB and not part of `make test`")
SMALL = Shapes(batch=(1, 1, 2), chunk=(1, 1, 16), context=(64, 256, 1024))


@pytest.fixture(scope="module")
def graph(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sliding layer: four plans that are built in seconds."""
    folder = tmp_path_factory.mktemp("sliding")
    config = json.loads((tiny_checkpoint / "config.json").read_text()) | {
        "num_hidden_layers": 1, "layer_types": ["sliding_attention"], "mlp_layer_types": ["moe"],
    }  # fmt: skip
    return export_checkpoint(random_checkpoint(config, folder / "checkpoint", "plain"), folder / "graph")


def processes(words: bytes) -> dict[int, int]:
    """Parents of processes, by the number of each whose command line has these words."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if words in path.read_bytes():
                found[int(path.parent.name)] = int(path.with_name("stat").read_text().rpartition(")")[2].split()[1])
    return found


def content(folder: Path) -> dict[str, Any]:
    """A bundle without what differs from build to build: the bytes of plans, when it was made, and what that cost."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["build"]["seconds"], manifest["build"]["peak_rss_bytes"]
    for name in [name for name in manifest["files"] if name.endswith(".plan")]:
        manifest["files"][name] = "built"
    for engine in manifest["engine"]["segments"].values():
        del engine["header"]["bytes"]
    others = [path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST]
    return manifest | {path.name: path.read_bytes() for path in others}


def test_the_bundle_is_that_of_a_build_without_even_if_a_worker_is_killed(graph: Path, tmp_path: Path) -> None:
    def kill_one() -> None:
        while not over.wait(0.01):
            builders = processes(b"ray::_build")
            if found := sorted(
                parent for parent in processes(b"foldkv.optimize.engine_worker").values() if parent in builders
            ):
                killed.append(found[0])
                os.kill(found[0], signal.SIGKILL)
                return

    [alone] = build_bundles(
        graph, tmp_path / "alone", ["a100"], plugins=False, shapes=SMALL, cache=tmp_path / "cache-alone"
    ).results
    killed, over, cache = list[int](), threading.Event(), tmp_path / "cache"
    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        [spread] = build_bundles(
            graph, tmp_path / "spread", ["a100"], plugins=False, shapes=SMALL, cache=cache, ray=LOCAL
        ).results
    finally:
        over.set()
        killer.join()
    assert len(killed) == 1, "a worker was killed while it built"
    assert spread.reason == "" and content(spread.folder) == content(alone.folder)
    # Its plans are in the cache as those of any build.
    [again] = build_bundles(graph, tmp_path / "again", ["a100"], plugins=False, shapes=SMALL, cache=cache).results
    plans = sorted((spread.folder / "engines").iterdir())
    assert len(plans) == 4 and all(
        plan.read_bytes() == (again.folder / "engines" / plan.name).read_bytes() for plan in plans
    )


def test_a_plan_that_cannot_be_built_is_the_error_of_a_build_without(tmp_path: Path) -> None:
    (tmp_path / "graph").mkdir()
    (tmp_path / "graph" / "model.onnx").write_bytes(b"no graph")
    plan, options = tmp_path / "some.plan", {"ranges": [], "context": (1, 1, 1), "plugins": 0, "capture": False}
    options |= {"sm": 80, "backend": TENSORRT_RTX}
    with pytest.raises(BuildError) as alone:
        build_plan(tmp_path / "graph" / "model.onnx", plan, **options)
    with (
        Cluster(LOCAL, "build with Ray", processors=1) as cluster,
        pytest.raises(BuildError, match=re.escape(str(alone.value))),
    ):
        cluster_build.ClusterBuilder(cluster)(tmp_path / "graph" / "model.onnx", plan, **options)
    assert not plan.exists()


def test_a_worker_with_other_packages_is_refused() -> None:
    order = cluster_build._Order({}, "model.onnx", TENSORRT_RTX.name, {"foldkv": "0.0.1", "tensorrt-rtx": "9"}, {})
    with pytest.raises(InputError, match=r"(?s)foldkv .* expected 0\.0\.1.*tensorrt-rtx .* expected 9"):
        cluster_build._build(order)


def test_a_cluster_that_cannot_build_is_refused_before_anything_is_written(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match="there is no Ray cluster at"):
        build_bundles(graph, tmp_path / "out", ["a100"], plugins=False, shapes=SMALL, ray="127.0.0.1:1")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"a100.* built on a GPU"):
        check_ray(resolve_targets(["cpu", "a100"], TENSORRT.name))


def test_a_signal_ends_the_build_and_leaves_neither_processes_nor_files(graph: Path, tmp_path: Path) -> None:
    options = ("--target", "a100", "--plugins", "off", "--cache", tmp_path / "cache", "--ray", LOCAL)
    with start("build", graph, "-o", tmp_path / "out", *options) as process:
        while not (children := processes(b"foldkv.optimize.engine_worker")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, said
    deadline = time.monotonic() + 5
    while children.keys() & processes(b"foldkv.optimize.engine_worker"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".a100.lock"]
