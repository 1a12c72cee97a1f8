"""The trained model of this repository as checkpoint, graph package and CPU bundle, made once per run.

Processes that run tests at once share them: the first one makes an artifact while the others wait.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

# Before anything imports Triton: tests run its kernels in the interpreter, on the CPU.
os.environ["TRITON_INTERPRET"] = "1"

import pytest

from foldkv.export.package import export_checkpoint
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
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run, the same in all of its processes."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each has a folder below that of the run
        folder = folder.parent
    (folder / "shared").mkdir(exist_ok=True)
    return folder / "shared"


def exported(checkpoint: Path, out: Path, profile: str) -> Path:
    """The graph package, exported by whichever process comes first; what is there is whole."""
    with out.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return out if out.exists() else export_checkpoint(checkpoint, out, profile=profile)


@pytest.fixture(scope="session")
def tiny_graph(tiny_checkpoint: Path, shared_folder: Path) -> Path:
    return exported(tiny_checkpoint, shared_folder / "graph", "hf")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_graph: Path, shared_folder: Path) -> Path:
    report = build_bundles(tiny_graph, shared_folder / "bundles", ["cpu"])
    assert report.exit_code == 0
    return report.results[0].folder


@pytest.fixture(scope="session")
def served_graph(tiny_checkpoint: Path, shared_folder: Path) -> Path:
    return exported(tiny_checkpoint, shared_folder / "served-graph", "served")


@pytest.fixture(scope="session")
def served_bundles(served_graph: Path, shared_folder: Path) -> dict[str, Path]:
    """Bundles of the served graph for the cpu, by layout."""
    folder, bundles = shared_folder / "served-bundles", {}
    for layout in ("dense", "fp8+fp4"):
        report = build_bundles(served_graph, folder / layout, ["cpu"], layout=layout)
        assert report.exit_code == 0
        bundles[layout] = report.results[0].folder
    return bundles
