"""The trained model of this repository as checkpoint, graph package and CPU bundle, made once per run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Before anything imports Triton: tests run its kernels in the interpreter, on the CPU.
os.environ["TRITON_INTERPRET"] = "1"

import pytest

from foldkv.export.graph import export_checkpoint
from foldkv.optimize import history
from foldkv.optimize.build import build_bundles

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def own_history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs of tests are none to estimate by: they are recorded elsewhere than those of the machine's user."""
    file = tmp_path_factory.mktemp("history") / "history.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "history_file", lambda: file)
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Path:
    return ROOT / "examples" / "tiny-v4"


@pytest.fixture(scope="session")
def tiny_graph(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_checkpoint(tiny_checkpoint, tmp_path_factory.mktemp("tiny") / "graph")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    report = build_bundles(tiny_graph, tmp_path_factory.mktemp("tiny-bundles"), ["cpu"])
    assert report.exit_code == 0
    return report.results[0].folder


@pytest.fixture(scope="session")
def served_graph(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_checkpoint(tiny_checkpoint, tmp_path_factory.mktemp("served") / "graph", profile="served")


@pytest.fixture(scope="session")
def served_bundles(served_graph: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles of the served graph for the cpu, by layout."""
    folder, bundles = tmp_path_factory.mktemp("served-bundles"), {}
    for layout in ("dense", "fp8+fp4"):
        report = build_bundles(served_graph, folder / layout, ["cpu"], layout=layout)
        assert report.exit_code == 0
        bundles[layout] = report.results[0].folder
    return bundles
