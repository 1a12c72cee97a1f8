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
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import foldkv
from foldkv.artifact import read_manifest, sha256_file, staged, verify_files, write_manifest
from foldkv.errors import EXIT_BAD_INPUT, EXIT_OK, ArtifactError, BuildError, FoldkvError, InputError
from foldkv.export.graph import KIND as GRAPH_KIND
from foldkv.export.graph import MODEL, flat_model
from foldkv.export.layouts import DENSE, cache_layout
from foldkv.export.profiles import SERVED
from foldkv.export.state import StateTensor
from foldkv.export.tokenizer import TOKENIZER
from foldkv.optimize.kernels import Bundled
from foldkv.optimize.passes.pack import PACKED, check_layout, pack_state
from foldkv.optimize.plan import named_capability
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
    targets: Sequence[str | Target],
    *,
    plugins: bool = False,
    layout: str = DENSE,
    shapes: Shapes | None = None,
    jobs: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> BuildReport:
    """Build ``out/<target>/`` for every target.

    Args:
        graph: a graph package, verified by hash before it is used.
        targets: names of the table, or targets of your own.
        plugins: give the foldkv operators of GPU targets to plugins; their kernels are compiled into the bundle. A graph
            that was injected is built with plugins, for its target and for the cpu.
        layout: name of the cache layout: of GPU targets other than "dense" only with plugins, of the cpu target only for a
            graph of the profile "served". With plugins, the cpu target of another graph keeps dense rows.
        shapes: sizes that engines are built for.
        jobs: builds at once; the default is what memory and processors allow.
        progress: called with one line per step.

    Raises:
        ArtifactError: the graph package is damaged.
        InputError: unknown targets or layout, a layout without plugins, or ``out`` cannot be written.
    """
    chosen = resolve_targets(targets)
    cache_layout(layout)
    manifest = read_manifest(graph, kind=GRAPH_KIND)
    verify_files(graph, manifest)
    shapes = shapes or Shapes()
    if "injection" in manifest:
        plugins, layout = True, manifest["injection"]["layout"]
        others = [target.name for target in chosen if target.sm and target.name != manifest["injection"]["target"]]
        if others:
            raise InputError(
                f"{graph} was injected for {manifest['injection']['target']}; {', '.join(others)} cannot be built from it. "
                "Give the graph that export wrote."
            )
    if layout != DENSE and not plugins:
        gpus = [target.name for target in chosen if target.sm is not None]
        if gpus:
            raise InputError(
                f"layout {layout} needs plugins on {', '.join(gpus)}, which alone read packed rows there. Build with --plugins on."
            )
        check_layout(layout, manifest["profile"])

    def one(target: Target) -> TargetResult:
        gpu = target.sm is not None
        packs = gpu or (layout in PACKED and manifest["profile"] == SERVED)
        job = _Job(Path(graph), manifest, target, shapes, plugins and gpu, layout if packs else DENSE)
        return _build_target(job, Path(out) / target.name, progress)

    with ThreadPoolExecutor(jobs or _parallel_builds(manifest)) as pool:
        return BuildReport(list(pool.map(one, chosen)))


def _parallel_builds(manifest: dict[str, Any]) -> int:
    files = [*manifest["files"].values(), *manifest.get("linked", {}).values()]
    need: int = max(_MEMORY_FLOOR, _MEMORY_FACTOR * sum(facts["bytes"] for facts in files))
    memory: int = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // need))


@dataclass(frozen=True)
class _Job:
    """One target's build: the graph package and its manifest, and everything else that decides the bundle."""

    graph: Path
    manifest: dict[str, Any]
    target: Target
    shapes: Shapes
    plugins: bool
    layout: str

    def spec(self) -> BuildSpec:
        """The values that decide the bundle.

        Raises:
            MissingDependencyError: the backend, or the compiler of the plugins' kernels, cannot be used here.
        """
        version = _backend_version(self.target)
        compiler = ""
        if self.plugins:
            from foldkv.plugins.compile import compiler_identity

            compiler = compiler_identity()
        return BuildSpec(
            graph_sha256=self.manifest["files"][MODEL]["sha256"],
            weights_sha256=_other_files_digest(self.manifest),
            target=self.target.to_dict(),
            backend=self.target.backend,
            backend_version=version,
            precision=self.target.precision,
            plugins=self.plugins,
            kernel_compiler=compiler,
            layout=self.layout,
            shapes=self.shapes,
        )


def _build_target(job: _Job, folder: Path, progress: Callable[[str], None]) -> TargetResult:
    start = time.monotonic()
    target = job.target

    def done(status: str, reason: str = "", exit_code: int = EXIT_OK) -> TargetResult:
        return TargetResult(target.name, status, folder, time.monotonic() - start, reason, exit_code)

    try:
        spec = job.spec()
        with _only_builder(folder):
            if _is_current(folder, spec.cache_key()):
                progress(f"{target.name}: unchanged")
                return done("unchanged")
            with staged(folder, kind=KIND) as work:
                build = _write_cpu if target.backend == "onnxruntime" else _write_engine
                content = build(job, work, lambda line: progress(f"{target.name}: {line}"))
                content["build"]["seconds"] = round(time.monotonic() - start, 3)
                write_manifest(work, kind=KIND, content=_common(job, spec) | content)
        layers = content["engine"].get("plugin_layers")
        progress(
            f"{target.name}: built in {time.monotonic() - start:.1f} s{f' with {layers} plugin layers' if layers else ''}"
        )
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


def _other_files_digest(manifest: dict[str, Any]) -> str:
    known = {name: facts["sha256"] for name, facts in manifest["files"].items() if name != MODEL}
    known |= {name: f"{facts['head_sha256']}:{facts['bytes']}" for name, facts in manifest.get("linked", {}).items()}
    return hashlib.sha256("".join(f"{name}:{known[name]}\n" for name in sorted(known)).encode()).hexdigest()


def _backend_version(target: Target) -> str:
    if target.backend == "onnxruntime":
        return version("onnxruntime")
    from foldkv.optimize.engine import engine_version

    assert target.sm is not None
    return engine_version(target.backend, target=target.name, sm=target.sm)


def _is_current(folder: Path, key: str) -> bool:
    try:
        manifest = read_manifest(folder, kind=KIND)
        verify_files(folder, manifest)
    except ArtifactError:
        return False
    return manifest.get("cache_key") == key and manifest.get("foldkv_version") == foldkv.__version__


def _common(job: _Job, spec: BuildSpec) -> dict[str, Any]:
    manifest = job.manifest
    return {
        "foldkv_version": foldkv.__version__,
        "tool_versions": {spec.backend: spec.backend_version},
        "target": spec.target,
        "backend": spec.backend,
        "profile": manifest["profile"],
        "precision": spec.precision,
        "layout": spec.layout,
        "shapes": asdict(spec.shapes),
        "inputs": {
            "graph": {"manifest_sha256": sha256_file(job.graph / "manifest.json")},
            "checkpoint": manifest["inputs"]["checkpoint"],
        },
        "cache_key": spec.cache_key(),
        "model": manifest["model"],
        "io": manifest["io"],
        "plugins": [],
        "kernels": None,
    }


def _copy(graph: Path, work: Path, names: Sequence[str]) -> None:
    for name in names:
        if (graph / name).is_file():
            shutil.copyfile(graph / name, work / name)


def _write_cpu(job: _Job, work: Path, progress: Callable[[str], None]) -> dict[str, Any]:
    import onnxruntime

    from foldkv.optimize.passes.cpu import cpu_graph
    from foldkv.plugins.inject import rotary_channels

    progress("optimizing the graph")
    state = [StateTensor(**row) for row in job.manifest["state"]]

    def pack(model: Any) -> None:
        if job.layout != DENSE:
            state[:] = pack_state(model, state, job.layout, rotary_channels(job.graph))

    nodes = cpu_graph(job.graph, work, prepare=pack)
    _copy(job.graph, work, (TOKENIZER,))
    progress("loading it in ONNX Runtime")
    try:
        session = onnxruntime.InferenceSession(str(work / MODEL), providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - onnxruntime raises classes of its own that share no base
        raise BuildError(f"ONNX Runtime cannot load the graph: {str(error)[:400]}") from None
    names = {value.name for value in (*session.get_inputs(), *session.get_outputs())}
    missing = [name for tensor in state for name in (tensor.input, tensor.output) if name not in names]
    if missing:
        raise BuildError(f"the graph lacks the state tensors {', '.join(missing[:5])}. Export it again.")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "state": [tensor.to_dict() for tensor in state],
        "engine": {"file": MODEL, "nodes": nodes},
        "build": {"peak_rss_bytes": peak},
    }


def _write_engine(job: _Job, work: Path, progress: Callable[[str], None]) -> dict[str, Any]:
    from foldkv.optimize.engine import RTX, build_plan
    from foldkv.optimize.passes.lower import lowered_graph
    from foldkv.plugins.inject import rotary_channels

    target = job.target
    assert target.sm is not None
    injected, bundled = _inject(job, work, progress) if job.plugins else (None, Bundled())
    progress(f"lowering to {target.precision}")
    state = [StateTensor(**row) for row in job.manifest["state"]]
    # The lowered graph lies beside the bundle's staging folder, so that it never becomes part of it.
    scratch = work.with_name(f"{work.name}-graph")
    scratch.mkdir()
    try:
        state, precision, weights = lowered_graph(
            job.graph, scratch, state, target.precision, sm=target.sm, injected=injected, layout=job.layout,
            rotary=rotary_channels(job.graph), tokens=job.shapes.batch[2] * job.shapes.chunk[2],
        )  # fmt: skip
        named = named_capability(target.sm) if target.backend == RTX else target.sm
        result = build_plan(
            scratch / MODEL, work / PLAN, sm=named, state=state, shapes=job.shapes, backend=target.backend,
            plugins=bundled.nodes, progress=progress,
        )  # fmt: skip
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    unbundled = set(result["kernels"]) - bundled.names
    if unbundled:
        raise BuildError(f"the engine can launch kernels that were not compiled: {', '.join(sorted(unbundled))}.")
    _copy(job.graph, work, (TOKENIZER,))
    return {
        "state": [tensor.to_dict() for tensor in state],
        "engine": {
            "file": PLAN, "header": result["header"], "layers": result["layers"], "plugin_layers": result["plugin_layers"],
        },
        "precision_islands": precision,
        "weights": weights,
        "plugins": bundled.plugins,
        "kernels": bundled.kernels,
        "build": {"peak_rss_bytes": result["peak_rss_bytes"], "warnings": result["warnings"]},
    }  # fmt: skip


def _inject(job: _Job, work: Path, progress: Callable[[str], None]) -> tuple[Any, Bundled]:
    """The injected model, and the kernels that it launches, compiled into the bundle."""
    from foldkv.optimize.kernels import bundle_kernels
    from foldkv.plugins.inject import inject_nodes, rotary_channels, set_library, strip_injection

    target = job.target
    assert target.sm is not None
    model = flat_model(job.graph)
    strip_injection(model)  # one that `foldkv inject` wrote is decided again by the same rules
    injection = inject_nodes(
        model, job.manifest["state"], rotary=rotary_channels(job.graph), target=target.name, sm=target.sm,
        dtype=target.precision, layout=job.layout,
    )  # fmt: skip
    progress(f"{injection.injected} of {injection.nodes} foldkv nodes go to plugins")
    bundled = bundle_kernels(injection, work, progress=progress)
    assert bundled.kernels is not None
    set_library(model, bundled.kernels["library"])
    return model, bundled
