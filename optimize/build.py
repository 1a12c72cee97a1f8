"""From a graph package to one bundle per target. A target that fails does not stop the others."""

from __future__ import annotations

import os
import resource
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .. import __version__
from ..artifact import MANIFEST, check_destination, only_writer, sha256_file, sha256_json, staged
from ..cluster import Cluster
from ..errors import EXIT_OK, BuildError, InputError
from ..export.checkpoint.texts import TOKENIZER
from ..export.contract.chain import CHAIN
from ..export.contract.chat import CHAT
from ..export.contract.engine_set import ENGINES
from ..export.contract.layouts import DENSE
from ..export.contract.lock import LOCK
from ..export.contract.stacks import reads_stacks
from ..export.contract.state import StateTensor
from ..export.package import FOLDER, Package, read_package
from ..manifests import (
    BuildCost,
    BuildFacts,
    BundleInputs,
    BundleManifest,
    EngineFacts,
    GraphIdentity,
    GraphManifest,
    InjectionFacts,
    Kernels,
    PluginUse,
    reason_to_replace,
    write,
)
from ..packages import as_user_error, require
from ..progress import Progress, Say, silent
from ..records import to_json
from ..units import size_text
from .choices import Choice, backend_version, check_here, choose
from .cluster_build import ClusterBuilder
from .engine_build import Builder, build_plan, end_children
from .floor import weight_floor, weights_moved_without_plugins
from .history import expected_build
from .kept_weights import built_in, locked_format
from .outcome import BuildReport, TargetResult
from .plan_cache import PlanCache
from .recipe import BuildSpec, Shapes, default_shapes
from .targets import Target, resolve_targets


def build_bundles(
    graph: Path,
    out: Path,
    targets: Sequence[str | Target],
    *,
    plugins: bool | None = None,
    layout: str | None = None,
    shapes: Shapes | None = None,
    jobs: int | None = None,
    force: bool = False,
    weights_from: Path | None = None,
    place: bool = True,
    cache: Path | None = None,
    ray: str | None = None,
    progress: Say = silent,
) -> BuildReport:
    """Build ``out/<target>/`` for every target.

    Anything that cannot succeed is refused before the first build. A build that fails later does not stop the others.

    Args:
        graph: a graph package; its hashes are verified before use.
        out: folder that gets one bundle per target.
        targets: names from the table, or your own targets; ``resolve_targets`` gives them with another backend than their first.
        plugins: give the foldkv operators of GPU targets to plugins; their kernels are compiled into the bundle. None is the
            default (optimize/choices.py). An injected graph is built with plugins, for its target and for the cpu.
        layout: name of the cache layout. Layouts other than "dense" need plugins on GPU targets, and a graph of the profile
            "served" on the cpu target. If GPU targets are built too, the cpu target of another graph keeps dense rows.
            None is "dense", or the layout of an injected graph.
        shapes: sizes that engines are built for.
        jobs: parallel builds; the default is what memory and processors allow.
        force: also build bundles that are unchanged.
        weights_from: folder with the checkpoint's weight files, for bundles of ONNX Runtime; engines are built without them.
            Without it they are looked for where ``FOLDKV_WEIGHTS`` says, in ``weights/`` of the package, and where they were
            exported from.
        place: let bundles for ONNX Runtime have weights in float32 that the checkpoint stores in another type; else every step
            converts them.
        cache: folder with the plans of engines; machines can share it. The default is FOLDKV_CACHE or ~/.cache/foldkv.
        ray: address of a Ray cluster whose workers build the plans of engines, or "local" for one of this machine's processors; for
            engines that are built without a GPU. Bundles without engines are written here.
        progress: called with one line per step; a :class:`~foldkv.progress.Progress` learns more.

    Raises:
        ArtifactError: the graph package is damaged.
        InputError: unknown targets or layout, a layout that a target does not support, weights are missing or others, a cluster
            cannot build for a target, or ``out`` cannot be written.
        MissingDependencyError: this machine cannot build for some of the targets; all are named. Or there is no such cluster.
    """
    package = read_package(graph, verify=True)
    planned = _jobs(package, targets, plugins, layout, shapes, place, cache)
    graphs = any(not job.target.backend.engine for job in planned)
    files = package.find_weights(weights_from) if graphs else {}
    if ray is not None:
        check_ray([job.target for job in planned])
    check_here([job.choice for job in planned])
    for job in planned:
        check_destination(Path(out) / job.target.name, kind=BundleManifest.KIND)

    report, counting, done = Progress.of(progress), threading.Lock(), list[Target]()

    def one(job: _Job) -> TargetResult:
        result = _build_target(job, files, Path(out) / job.target.name, force, builder, report)
        with counting:
            done.append(job.target)
            report.steps(len(done), len(planned), "targets")
        return result

    if len(planned) > 1:
        report.steps(0, len(planned), "targets")
    processors, cluster = len(os.sched_getaffinity(0)), None
    builder: Builder = build_plan
    with ExitStack() as stack:
        if ray is not None and any(job.target.backend.engine for job in planned):
            cluster = stack.enter_context(Cluster(ray, "build with Ray", processors=processors))
            builder = ClusterBuilder(cluster)
        pool = ThreadPoolExecutor(jobs or processors)
        try:
            return BuildReport(list(pool.map(one, planned)))
        except BaseException:  # an interrupt: do not wait for the others, which may take minutes
            pool.shutdown(wait=False, cancel_futures=True)
            end_children()
            if cluster is not None:
                cluster.end()
            raise
        finally:
            pool.shutdown(wait=False)


def check_ray(targets: Sequence[Target]) -> None:
    """Check that the workers of a cluster can build for these targets.

    Raises:
        InputError: some are built on a GPU; all are named.
        MissingDependencyError: Ray is not installed.
    """
    require("build with Ray")
    others = [target.name for target in targets if target.backend.engine and not target.backend.builds_without_gpu]
    if others:
        raise InputError(
            f"--ray spreads engines that are built on processors; those of {', '.join(others)} are built on a GPU. Build these without it."
        )


def reasons_to_build(
    graph: Path,
    out: Path,
    targets: Sequence[str | Target],
    *,
    plugins: bool | None = None,
    layout: str | None = None,
    shapes: Shapes | None = None,
    place: bool = True,
    only: str | None = None,
) -> dict[str, str]:
    """Why :func:`build_bundles` would build each target; "" if it is unchanged. Arguments and errors are the same.

    With ``only``, the answer is for that target only.
    """
    planned = _jobs(read_package(graph), targets, plugins, layout, shapes, place)
    return {
        job.target.name: _reason_to_build(Path(out) / job.target.name, job.spec())
        for job in planned
        if only in (None, job.target.name)
    }


def _jobs(
    package: Package, targets: Sequence[str | Target], plugins: bool | None, layout: str | None, shapes: Shapes | None,
    place: bool, cache: Path | None = None,
) -> list[_Job]:  # fmt: skip
    chosen, manifest = resolve_targets(targets), package.manifest
    if manifest.injection is not None:
        choices = _injected_choices(package.folder, manifest, manifest.injection, chosen, plugins, layout)
    else:
        choices = choose(package.spec, manifest.profile, chosen, plugins=plugins, layout=layout or DENSE)
    return [_Job(package, choice, shapes or default_shapes(package.spec), place, cache) for choice in choices]


def _injected_choices(
    graph: Path, manifest: GraphManifest, made: InjectionFacts, targets: Sequence[Target], plugins: bool | None,
    layout: str | None,
) -> list[Choice]:  # fmt: skip
    """The choices that injection made."""
    others = [t.name for t in targets if t.backend.takes_plugins and t.name != made.target]
    if others:
        raise InputError(
            f"{graph} was injected for {made.target}; {', '.join(others)} cannot be built from it. "
            "Give the graph that export wrote."
        )
    if plugins is False or layout not in (None, made.layout):
        raise InputError(
            f"{graph} was injected with plugins and the layout {made.layout}, so it is built that way. "
            "Omit --plugins and --layout, or give the graph that export wrote."
        )
    choices = []
    for target in targets:
        # Injection has decided for its target; beside it, rows are dense where they must be.
        gaps = target.backend.refusals(made.layout, profile=manifest.profile, plugins=True, plugin_gaps=list)
        choices.append(Choice(target, target.backend.takes_plugins, DENSE if gaps else made.layout))
    return choices


@dataclass(frozen=True)
class _Job:
    """One target's build: the graph package, and everything else that the bundle depends on."""

    package: Package
    choice: Choice
    shapes: Shapes
    place: bool
    cache: Path | None

    @property
    def manifest(self) -> GraphManifest:
        """Of the package."""
        return self.package.manifest

    @property
    def target(self) -> Target:
        """The machine that the bundle is for."""
        return self.choice.target

    @property
    def plugins(self) -> bool:
        """Whether plugins compute what touches compressed KV."""
        return self.choice.plugins

    @property
    def layout(self) -> str:
        """Of the cache rows."""
        return self.choice.layout

    def spec(self) -> BuildSpec:
        """The values that the bundle depends on.

        Raises:
            MissingDependencyError: the backend, or the compiler of the plugins' kernels, cannot be used here.
        """
        compiler = ""
        if self.plugins:
            from ..plugins.compile import compiler_identity

            compiler = compiler_identity()
        return BuildSpec(
            graph_sha256=_files_digest(self.manifest, graphs=True),
            weights_sha256=_files_digest(self.manifest, graphs=False),
            target=self.target.to_dict(),
            backend=self.target.backend.name,
            backend_version=backend_version(self.target),
            precision=self.target.precision,
            plugins=self.plugins,
            kernel_compiler=compiler,
            layout=self.layout,
            shapes=self.shapes,
            place=self.place or self.target.backend.engine,
        )


def _build_target(
    job: _Job, files: Mapping[str, Path], folder: Path, force: bool, builder: Builder, report: Progress
) -> TargetResult:  # fmt: skip
    start = time.monotonic()
    target = job.target

    def done(status: str, reason: str = "", exit_code: int = EXIT_OK) -> TargetResult:
        return TargetResult(target.name, status, folder, time.monotonic() - start, reason, exit_code)

    with report.part(target.name) as progress:
        try:
            spec = job.spec()
            with only_writer(folder, progress):
                if not force and not _reason_to_build(folder, spec):
                    progress("unchanged")
                    return done("unchanged")
                expected = expected_build(job.manifest, target.backend.name, job.plugins)
                if expected is not None:
                    progress.expect(expected.low, expected.high)
                with staged(folder, kind=BundleManifest.KIND) as work:
                    made = (
                        _write_engine(job, work, builder, progress)
                        if target.backend.engine
                        else _write_graph(job, files, work, progress)
                    )
                    seconds = round(time.monotonic() - start, 3)
                    write(work, _manifest(job, spec, made, seconds), known=made.known)
            layers, engines = made.engine.plugin_layers, (made.engine.segments or {}).values()
            plugins = f" with {layers} plugin layers" if layers else ""
            reused = sum(one.reused for one in engines)
            reuse = f"; {reused} of {len(engines)} engines reused" if reused else ""
            progress(f"built in {time.monotonic() - start:.1f} s{plugins}{reuse}")
            return done("built")
        except Exception as error:
            failure = as_user_error(error, job.choice.feature)
            if failure is None:
                raise
            progress(f"failed: {failure}")
            return done("failed", str(failure), failure.exit_code)


def _files_digest(manifest: GraphManifest, *, graphs: bool) -> str:
    """sha256 over the graphs of a package, or over everything else that a bundle has of it."""
    known = {name: file.sha256 for name, file in manifest.files.items() if name.endswith(".onnx") == graphs}
    if graphs:
        return sha256_json({"files": known, "layers": manifest.layers})
    # Other weights under the same header are other files. Tokens that end a text are in no file of the package.
    return sha256_json({"files": known, "weights": manifest.inputs.checkpoint.files, "model": to_json(manifest.model)})


def _reason_to_build(folder: Path, spec: BuildSpec) -> str:
    """Why the bundle there differs from what would be built; "" if it does not."""
    reason, manifest = reason_to_replace(BundleManifest, folder)
    if manifest is None:
        return reason
    if manifest.cache_key == spec.cache_key():
        return ""
    wanted, content = to_json(spec), manifest.content()
    made = {
        **{name: content[name] for name in wanted if name in content},
        "backend_version": manifest.tool_versions.get(manifest.backend),
        **content["spec"],
    }
    return "; ".join(_change(name, made.get(name), value) for name, value in wanted.items() if made.get(name) != value)


_CHANGES = {
    "graph_sha256": "the graph changed", "weights_sha256": "the weights, the tokenizer or the special tokens of the graph package changed",
    "kernel_compiler": "the kernels, or what compiles them, changed", "recipe": "this foldkv builds differently",
    "target": "the table of targets changed",
}  # fmt: skip


def _change(name: str, old: Any, new: Any) -> str:
    if name in _CHANGES:
        return _CHANGES[name]
    if name == "shapes" and isinstance(old, dict):
        return "; ".join(_change(f"shapes.{key}", old.get(key), new[key]) for key in new if old.get(key) != new[key])
    if name == "plugins":
        old, new = ("on" if value else "off" for value in (old, new))
    return f"{name} was {old}, is {new}"


@dataclass(frozen=True)
class _Made:
    """What a backend put into the bundle's folder, and what it says of it in the manifest."""

    state: list[StateTensor]
    engine: EngineFacts
    cost: BuildCost
    plugins: tuple[PluginUse, ...] = ()
    in_place: tuple[str, ...] = ()
    kernels: Kernels | None = None
    precision_islands: dict[str, Any] | None = None
    weights: dict[str, Any] | None = None
    known: dict[str, str] = field(default_factory=dict)  # sha256 of files that were hashed as they were written


def _manifest(job: _Job, spec: BuildSpec, made: _Made, seconds: float) -> BundleManifest:
    graph = job.manifest
    return BundleManifest(
        foldkv_version=__version__,
        tool_versions={spec.backend: spec.backend_version},
        target=job.target,
        backend=spec.backend,
        profile=graph.profile,
        precision=spec.precision,
        layout=spec.layout,
        shapes=spec.shapes,
        inputs=BundleInputs(GraphIdentity(sha256_file(job.package.folder / MANIFEST)), graph.inputs.checkpoint),
        cache_key=spec.cache_key(),
        spec=BuildFacts(**{fact.name: getattr(spec, fact.name) for fact in fields(BuildFacts)}),
        model=graph.model,
        io=graph.io,
        plugins=made.plugins,
        in_place=made.in_place,
        kernels=made.kernels,
        state=tuple(tensor.to_dict() for tensor in made.state),
        engine=made.engine,
        precision_islands=made.precision_islands,
        weights=made.weights,
        build=replace(made.cost, seconds=seconds),
    )


def _copy(graph: Path, work: Path, names: Sequence[str]) -> None:
    for name in names:
        if (graph / name).is_file():
            shutil.copyfile(graph / name, work / name)


def _write_graph(job: _Job, files: Mapping[str, Path], work: Path, progress: Progress) -> _Made:
    import onnxruntime

    from .chain import write_chain

    package = job.package
    state, nodes, known = write_chain(
        package, files, work, layout=job.layout, rope_dim=package.spec.rope_dim, place=job.place,
        stack=job.place and not job.target.backend.gpu and reads_stacks(onnxruntime.__version__),
        gpu=job.target.backend.gpu, progress=progress,
    )  # fmt: skip
    _copy(package.folder, work, (TOKENIZER, CHAT, LOCK))
    progress("loading it in ONNX Runtime")
    for name in nodes:
        try:
            onnxruntime.InferenceSession(str(work / f"{FOLDER}/{name}.onnx"), providers=["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001 - onnxruntime raises its own classes, which share no base
            raise BuildError(f"ONNX Runtime cannot load the segment {name}: {str(error)[:400]}") from None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return _Made(state, EngineFacts(CHAIN, nodes=nodes), BuildCost(peak), known=known)


def _write_engine(job: _Job, work: Path, builder: Builder, progress: Progress) -> _Made:
    from .engine_set import write_engines

    package = job.package
    if not job.plugins:
        stored = built_in(locked_format(package.lock.weights["layers.0"]), job.target.backend)
        moved, needed = weights_moved_without_plugins(package.spec, stored), weight_floor(package.spec, stored)
        progress(
            f"without plugins, a step of one token moves at least {size_text(moved)} of weights, with them about "
            f"{size_text(needed)}; and no step can be captured in a CUDA graph"
        )
    # Lowered graphs are beside the bundle's staging folder, so they never become part of the bundle.
    scratch = work.with_name(f"{work.name}-graph")
    try:
        made = write_engines(
            package, work, scratch, target=job.target, shapes=job.shapes, plugins=job.plugins,
            backend_version=backend_version(job.target), layout=job.layout, cache=PlanCache(job.cache), build=builder,
            progress=progress,
        )  # fmt: skip
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _copy(package.folder, work, (TOKENIZER, CHAT, LOCK))
    layers = [name for _, name in package.calls()]
    return _Made(
        made.state,
        EngineFacts(
            ENGINES,
            segments=made.segments,
            plugin_layers=sum(sum(made.segments[name].plugins.values()) for name in layers),
        ),
        BuildCost(made.peak_rss_bytes, made.warnings),
        plugins=made.bundled.plugins,
        in_place=made.in_place,
        kernels=made.bundled.kernels,
        precision_islands=made.counts,
        weights=made.weights,
    )
