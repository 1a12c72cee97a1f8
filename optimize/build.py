"""From a graph package to one bundle per target. A target that fails does not stop the others."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import foldkv
from foldkv.artifact import read_manifest, sha256_file, staged, verify_files, write_manifest
from foldkv.errors import EXIT_BAD_INPUT, EXIT_OK, ArtifactError, BuildError, FoldkvError, MissingDependencyError
from foldkv.export.graph import KIND as GRAPH_KIND
from foldkv.export.graph import MODEL, TOKENIZER
from foldkv.export.state import StateTensor
from foldkv.optimize.spec import BuildSpec, Shapes
from foldkv.optimize.targets import Target, resolve_targets

KIND = "foldkv.bundle"
PLAN = "engine.plan"
# Peak memory of a TensorRT-RTX build over the bytes of its weights, with a floor for the library itself.
_MEMORY_FACTOR, _MEMORY_FLOOR = 5, 3 << 30


@dataclass(frozen=True)
class TargetResult:
    """What became of one target: "built", "unchanged" or "failed" with a reason."""

    target: str
    status: str
    folder: Path
    seconds: float
    reason: str = ""
    exit_code: int = EXIT_OK


@dataclass(frozen=True)
class BuildReport:
    """The results in the order of the targets."""

    results: list[TargetResult] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 if every target was built or unchanged, else the code of the first failure."""
        codes: list[int] = [result.exit_code for result in self.results if result.status == "failed"]
        return codes[0] if codes else EXIT_OK


def build_bundles(
    graph: Path,
    out: Path,
    targets: Sequence[str],
    *,
    plugins: bool = False,
    shapes: Shapes | None = None,
    jobs: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> BuildReport:
    """Build ``out/<target>/`` for every target.

    Args:
        graph: a graph package, verified by hash before it is used.
        plugins: inject plugins for the foldkv operators; none exist yet, so this is refused.
        shapes: sizes that engines are built for.
        jobs: builds at once; the default is what memory and processors allow.
        progress: called with one line per step.

    Raises:
        ArtifactError: the graph package is damaged.
        InputError: unknown targets, or ``out`` cannot be written.
        MissingDependencyError: plugins are asked for.
    """
    chosen = resolve_targets(targets)
    if plugins:
        raise MissingDependencyError(
            "no compressed-KV attention plugins exist in this version; build with --plugins off (function bodies)."
        )
    manifest = read_manifest(graph, kind=GRAPH_KIND)
    verify_files(graph, manifest)
    shapes = shapes or Shapes()

    def one(target: Target) -> TargetResult:
        return _build_target(Path(graph), Path(out) / target.name, manifest, target, shapes, progress)

    with ThreadPoolExecutor(jobs or _parallel_builds(manifest)) as pool:
        return BuildReport(list(pool.map(one, chosen)))


def _parallel_builds(manifest: dict[str, Any]) -> int:
    need: int = max(_MEMORY_FLOOR, _MEMORY_FACTOR * sum(facts["bytes"] for facts in manifest["files"].values()))
    memory: int = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // need))


def _build_target(
    graph: Path, folder: Path, manifest: dict[str, Any], target: Target, shapes: Shapes, progress: Callable[[str], None]
) -> TargetResult:
    start = time.monotonic()

    def done(status: str, reason: str = "", exit_code: int = EXIT_OK) -> TargetResult:
        return TargetResult(target.name, status, folder, time.monotonic() - start, reason, exit_code)

    try:
        spec = _spec(manifest, target, shapes)
        with _only_builder(folder):
            if _is_current(folder, spec.cache_key()):
                progress(f"{target.name}: unchanged")
                return done("unchanged")
            with staged(folder, kind=KIND) as work:
                build = _write_cpu if target.backend == "onnxruntime" else _write_engine
                content = build(graph, work, manifest, target, shapes, lambda line: progress(f"{target.name}: {line}"))
                content["build"]["seconds"] = round(time.monotonic() - start, 3)
                write_manifest(work, kind=KIND, content=_common(graph, manifest, spec) | content)
        progress(f"{target.name}: built in {time.monotonic() - start:.1f} s")
        return done("built")
    except FoldkvError as error:
        progress(f"{target.name}: failed: {error}")
        return done("failed", str(error), error.exit_code or EXIT_BAD_INPUT)


@contextlib.contextmanager
def _only_builder(folder: Path) -> Iterator[None]:
    """One builder per folder at a time, across processes; the lock goes with the process that holds it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _spec(manifest: dict[str, Any], target: Target, shapes: Shapes) -> BuildSpec:
    return BuildSpec(
        graph_sha256=manifest["files"][MODEL]["sha256"],
        weights_sha256=_other_files_digest(manifest),
        target=target.to_dict(),
        backend=target.backend,
        backend_version=_backend_version(target),
        precision=target.precision,
        plugins=False,
        shapes=shapes,
    )


def _other_files_digest(manifest: dict[str, Any]) -> str:
    names = sorted(name for name in manifest["files"] if name != MODEL)
    return hashlib.sha256("".join(f"{n}:{manifest['files'][n]['sha256']}\n" for n in names).encode()).hexdigest()


def _backend_version(target: Target) -> str:
    if target.backend == "onnxruntime":
        return version("onnxruntime")
    if target.backend == "tensorrt-rtx":
        from foldkv.optimize.engine import rtx_version

        return rtx_version()
    raise MissingDependencyError(
        f"{target.name} (sm{target.sm}) is a target of TensorRT 11, which is not supported by this version of foldkv "
        "(TensorRT-RTX has no engines for it). Use the cpu bundle, or a target that `foldkv targets` lists with tensorrt-rtx."
    )


def _is_current(folder: Path, key: str) -> bool:
    try:
        manifest = read_manifest(folder, kind=KIND)
        verify_files(folder, manifest)
    except ArtifactError:
        return False
    return manifest.get("cache_key") == key and manifest.get("foldkv_version") == foldkv.__version__


def _common(graph: Path, manifest: dict[str, Any], spec: BuildSpec) -> dict[str, Any]:
    return {
        "foldkv_version": foldkv.__version__,
        "tool_versions": {spec.backend: spec.backend_version},
        "target": spec.target,
        "backend": spec.backend,
        "profile": manifest["profile"],
        "precision": spec.precision,
        "inputs": {
            "graph": {"manifest_sha256": sha256_file(graph / "manifest.json")},
            "checkpoint": manifest["inputs"]["checkpoint"],
        },
        "cache_key": spec.cache_key(),
        "model": manifest["model"],
        "io": manifest["io"],
        "plugins": [],
    }


def _copy(graph: Path, work: Path, names: Sequence[str]) -> None:
    for name in names:
        if (graph / name).is_file():
            shutil.copyfile(graph / name, work / name)


def _write_cpu(
    graph: Path, work: Path, manifest: dict[str, Any], target: Target, shapes: Shapes, progress: Callable[[str], None]
) -> dict[str, Any]:
    import onnxruntime

    from foldkv.optimize.passes.cpu import cpu_graph

    progress("optimizing the graph")
    nodes = cpu_graph(graph, work)
    _copy(graph, work, (TOKENIZER,))
    progress("loading it in ONNX Runtime")
    try:
        session = onnxruntime.InferenceSession(str(work / MODEL), providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - onnxruntime raises classes of its own that share no base
        raise BuildError(f"ONNX Runtime cannot load the graph: {str(error)[:400]}") from None
    names = {value.name for value in (*session.get_inputs(), *session.get_outputs())}
    missing = [row[end] for row in manifest["state"] for end in ("input", "output") if row[end] not in names]
    if missing:
        raise BuildError(f"the graph lacks the state tensors {', '.join(missing[:5])}. Export it again.")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"state": manifest["state"], "engine": {"file": MODEL, "nodes": nodes}, "build": {"peak_rss_bytes": peak}}


def _write_engine(
    graph: Path, work: Path, manifest: dict[str, Any], target: Target, shapes: Shapes, progress: Callable[[str], None]
) -> dict[str, Any]:
    from foldkv.optimize.engine import build_plan
    from foldkv.optimize.passes.lower import lowered_graph

    progress(f"lowering to {target.precision}")
    state = [StateTensor(**row) for row in manifest["state"]]
    # The lowered graph lies beside the bundle's staging folder, so that it never becomes part of it.
    scratch = work.with_name(f"{work.name}-graph")
    scratch.mkdir()
    try:
        state, precision = lowered_graph(graph, scratch, state, target.precision)
        assert target.sm is not None
        result = build_plan(scratch / MODEL, work / PLAN, sm=target.sm, state=state, shapes=shapes, progress=progress)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _copy(graph, work, (TOKENIZER,))
    return {
        "state": [tensor.to_dict() for tensor in state],
        "engine": {"file": PLAN, "header": result["header"], "layers": result["layers"]},
        "precision_islands": precision,
        "build": {"peak_rss_bytes": result["peak_rss_bytes"]},
    }
