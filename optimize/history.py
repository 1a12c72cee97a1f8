"""How long exports and builds took on this machine, to estimate the time for another model.

Every run adds one JSON line to ``history.jsonl`` in FOLDKV_CACHE (or ~/.cache/foldkv) if it can: a run never fails or waits
because of it. Estimates are always marked as estimates.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import FoldkvError
from ..inputs import cache_folder
from ..manifests import BundleManifest, GraphManifest, read
from .outcome import TargetResult

EXPORT, BUILD = "export", "build"
_FILE = "history.jsonl"
_READ = 500  # the last runs are read: the machine and its tools change
_NEAREST = 5  # and this many of the nearest sizes give an estimate
_COMPARABLE = 64  # weights that many times larger or smaller say nothing: the bounds would be days apart


@dataclass(frozen=True)
class Run:
    """One completed stage: "export" or "build", the backend of a build, whether it had plugins, the bytes of the weights, the
    number of layers, and the seconds it took."""

    stage: str
    backend: str
    plugins: bool
    weight_bytes: int
    layers: int
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """Seconds, between ``low`` and ``high``: one bound scales with the layers only, the other with the weights only."""

    low: float
    high: float
    runs: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, marked as an estimate."""
        return {"estimate": True, **asdict(self)}


def history_file() -> Path:
    """Where runs are recorded."""
    return cache_folder() / _FILE


def record_export(graph: Path, seconds: float) -> None:
    """Record the export that made the package ``graph``."""
    _record(graph, EXPORT, "", False, seconds)


def record_builds(graph: Path, results: Iterable[TargetResult]) -> None:
    """Record the bundles that were built from the package ``graph``, without unchanged and failed ones."""
    for result in results:
        if result.status == "built":
            with contextlib.suppress(OSError, FoldkvError):
                bundle = read(BundleManifest, result.folder)
                _record(graph, BUILD, bundle.backend, bool(bundle.plugins), result.seconds)


def _record(graph: Path, stage: str, backend: str, plugins: bool, seconds: float) -> None:
    with contextlib.suppress(OSError, FoldkvError):
        manifest = read(GraphManifest, graph)
        layers = len(manifest.model.layer_types)
        run = Run(stage, backend, plugins, weight_bytes(manifest), layers, round(seconds, 3))
        path = history_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:  # one short write: lines of two processes do not mix
            file.write(json.dumps({"when": int(time.time()), **asdict(run)}) + "\n")


def expected_build(manifest: GraphManifest, backend: str, plugins: bool) -> Estimate | None:
    """How long a build from the graph package with this manifest takes; None without a comparable run."""
    return estimate(
        read_runs(), BUILD, weight_bytes=weight_bytes(manifest), layers=len(manifest.model.layer_types),
        backend=backend, plugins=plugins,
    )  # fmt: skip


def weight_bytes(manifest: GraphManifest) -> int:
    """Bytes of the weights that a graph package's lock names."""
    return manifest.weights.bytes


def read_runs() -> list[Run]:
    """The recorded runs, oldest first; lines that are not a run are skipped."""
    try:
        lines = history_file().read_text(encoding="utf-8", errors="replace").splitlines()[-_READ:]
    except OSError:
        return []
    return [run for run in map(_run, lines) if run is not None]


def _run(line: str) -> Run | None:
    try:
        row = json.loads(line)
        run = Run(**{name: row[name] for name in Run.__dataclass_fields__})
        sound = all(math.isfinite(size) and size > 0 for size in (run.weight_bytes, run.layers, run.seconds))
    except (ValueError, KeyError, TypeError):
        return None
    return run if sound else None


def estimate(
    runs: list[Run],
    stage: str,
    *,
    weight_bytes: int,
    layers: int,
    backend: str = "",
    plugins: bool = False,
) -> Estimate | None:
    """How long a stage may take, from the runs of that kind with the nearest weights; None without a comparable run.

    A model without weights has none: sizes of zero compare with nothing.

    Part of the time grows with the layers (tracing, parsing) and part with the weights (reading, writing). One run does not
    tell the parts apart, so the medians of both scalings bound the estimate.
    """
    if weight_bytes <= 0 or layers <= 0:
        return None
    alike = [
        run
        for run in runs
        if (run.stage, run.backend, run.plugins) == (stage, backend, plugins)
        and 1 / _COMPARABLE <= run.weight_bytes / weight_bytes <= _COMPARABLE
    ]
    if not alike:
        return None
    alike.reverse()  # for equal sizes the latest runs count
    nearest = sorted(alike, key=lambda run: abs(math.log(run.weight_bytes / weight_bytes)))[:_NEAREST]
    by_layers = statistics.median(run.seconds * layers / run.layers for run in nearest)
    by_bytes = statistics.median(run.seconds * weight_bytes / run.weight_bytes for run in nearest)
    return Estimate(min(by_layers, by_bytes), max(by_layers, by_bytes), len(nearest))
