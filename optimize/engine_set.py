"""The engines of a package for one target: a plan per segment, which holds no weight, and how each takes its weights.

Segments are small, so a plan takes seconds and a few hundred megabytes, whatever the size of the model. The checkpoint's files
are not needed, only the package.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from ..artifact import sha256_json
from ..errors import BuildError
from ..export.contract.chain import Call
from ..export.contract.engine_set import ENGINES, STORED, WORDS, EngineTable
from ..export.contract.layouts import DENSE
from ..export.contract.lock import Weight
from ..export.contract.state import StateTensor
from ..export.operators.registry import DOMAIN
from ..export.package import Package
from ..manifests import OperatorCoverage, SegmentEngine
from ..plugins.inject import Given, Injection, inject_nodes, set_library, updated_in_place
from ..progress import Progress, Say, silent
from .bundled_kernels import Bundled, bundle_kernels
from .engine_build import Builder, profiles
from .passes.linears import read_stored
from .passes.lower import CONSTANTS, MODEL, Lowered, lowered_segment
from .plan_cache import PlanCache
from .plan_file import named_capability
from .recipe import Shapes
from .targets import Target

#: Folder of the plans in a bundle.
PLANS = "engines"


@dataclass(frozen=True)
class EngineSet:
    """What was written, for the manifest.

    Attributes:
        state: of the whole model, as the engines keep it.
        bundled: plugins and kernels.
        in_place: names of the state tensors that plugins update in the buffer that they read.
        counts: what was lowered, in all layers.
        weights: bytes on a device by type, and which are taken wider than stored.
        segments: of every plan: layers, plugins, header, whether steps can be captured, whether it was reused.
        peak_rss_bytes: the largest of the builds, those of reused plans too.
        warnings: of the builder.
    """

    state: list[StateTensor]
    bundled: Bundled
    in_place: tuple[str, ...]
    counts: dict[str, int]
    weights: dict[str, Any]
    segments: dict[str, SegmentEngine]
    peak_rss_bytes: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Segment:
    """A lowered segment: its folder, its plugin layers by operator, the state groups that they update in place, and whether a loop
    or a branch is in it."""

    folder: Path
    lowered: Lowered
    plugins: dict[str, int]
    in_place: tuple[str, ...]
    control_flow: bool

    @property
    def captures(self) -> bool:
        """Whether steps of its engine can be captured in CUDA graphs."""
        return not self.control_flow and len(self.in_place) == len(self.lowered.state)


def write_engines(
    package: Package,
    work: Path,
    scratch: Path,
    *,
    target: Target,
    shapes: Shapes,
    plugins: bool,
    backend_version: str,
    build: Builder,
    layout: str = DENSE,
    cache: PlanCache | None = None,
    progress: Say = silent,
) -> EngineSet:
    """Write the plans, the kernels and the table of engines of a bundle.

    Args:
        package: the graph package; an injected one is injected anew.
        work: folder of the bundle.
        scratch: folder for lowered graphs.
        target: the GPU.
        shapes: sizes that the engines are built for.
        plugins: give foldkv's operators to plugins.
        backend_version: of the library that builds.
        build: builds a plan.
        layout: name of the cache layout.
        cache: where plans are kept.
        progress: called with one line per step; a :class:`~foldkv.progress.Progress` learns more.

    Raises:
        BuildError: a segment cannot be lowered or built; the message names it.
        InputError: no node can take a plugin, or a layout needs plugins that there are not.
    """
    report, cache = Progress.of(progress), cache or PlanCache()
    names, calls = list(package.manifest.segments), Counter(name for _, name in package.calls())
    models = {name: package.segment(name).model for name in names}
    if plugins:
        assert target.sm is not None
        for name in names:
            read_stored(models[name], package.spec, sm=target.sm)
    graphs = {name: ir.to_proto(model) for name, model in models.items()}
    bundled = Bundled()
    injections: dict[str, Injection] = {}
    if plugins:
        injections = {
            name: _inject(graphs[name], package, name, target, layout)
            for name in names
            if any(node.domain == DOMAIN for node in graphs[name].graph.node)
        }
        whole = _together(injections, calls)
        report(f"{whole.injected} of {whole.nodes} foldkv nodes go to plugins")
        bundled = bundle_kernels(whole, work, progress=progress)
        assert bundled.kernels is not None
        for name in injections:
            set_library(graphs[name], bundled.kernels.library)
    report(f"lowering {len(names)} segments to {target.precision}")
    counts = {
        name: {row.operator: row.injected for row in injections[name].rows if row.injected}
        if name in injections
        else {}
        for name in names
    }
    segments = {
        name: _lower(graphs.pop(name), package, name, scratch / name, target, shapes, layout, counts[name])
        for name in names
    }
    (work / PLANS).mkdir()
    done: list[str] = []
    report.steps(0, len(names), "engines")

    def one(name: str) -> dict[str, Any]:
        facts = _plan(
            segments[name], work / PLANS / f"{name}.plan", name, target, shapes, backend_version, cache, build, report
        )
        done.append(name)
        report.steps(len(done), len(names), "engines")
        return facts

    with ThreadPoolExecutor(len(names)) as pool:  # engine_build.py, or the cluster, bounds how many run at once
        built = dict(zip(names, pool.map(one, names), strict=True))
    launched = {kernel for facts in built.values() for kernel in facts["kernels"]}
    if launched - bundled.names:
        raise BuildError(
            f"the engines can launch kernels that were not compiled: {', '.join(sorted(launched - bundled.names))}."
        )
    table = EngineTable(
        {name: f"{PLANS}/{name}.plan" for name in names},
        tuple(Call(owner, name) for owner, name in package.calls()),
        {name: segment.lowered.weights for name, segment in segments.items()},
    )
    table.write(work / ENGINES)
    return EngineSet(
        state=_state(package, segments),
        bundled=bundled,
        in_place=_in_place(package, segments),
        counts={
            key: sum(segments[name].lowered.counts[key] for _, name in package.calls())
            for key in ("stored", "weights", "products", "state")
        },
        weights=_weights(package, table, segments),
        segments={name: _facts(built[name], segments[name]) for name in names},
        peak_rss_bytes=max(facts["peak_rss_bytes"] for facts in built.values()),
        warnings=tuple(dict.fromkeys(text for facts in built.values() for text in facts["warnings"])),
    )


def _inject(graph: onnx.ModelProto, package: Package, name: str, target: Target, layout: str) -> Injection:
    assert target.sm is not None
    return inject_nodes(
        graph, [tensor.to_dict() for tensor in package.own_state(name)], rope_dim=package.spec.rope_dim,
        target=target.name, sm=target.sm, dtype=target.precision, layout=layout,
    )  # fmt: skip


def _together(injections: dict[str, Injection], calls: Counter[str]) -> Injection:
    """The injection of a whole model, from that of each segment and how often it is called."""
    rows: dict[str, OperatorCoverage] = {}
    given: dict[str, Given] = {}
    for name, one in injections.items():
        for row in one.rows:
            old = rows.get(row.operator, OperatorCoverage(row.operator, 0, 0, {}))
            refusals = Counter(old.refusals) + Counter({r: n * calls[name] for r, n in row.refusals.items()})
            rows[row.operator] = OperatorCoverage(
                row.operator,
                old.nodes + row.nodes * calls[name],
                old.injected + row.injected * calls[name],
                dict(refusals),
            )
        for entry in one.given:
            known = given.get(entry.plugin.operator, Given(entry.plugin, (), ()))
            given[entry.plugin.operator] = Given(
                entry.plugin, tuple(dict.fromkeys((*known.row_formats, *entry.row_formats))),
                tuple(dict.fromkeys((*known.kernels, *entry.kernels))),
            )  # fmt: skip
    first = next(iter(injections.values()))
    return replace(
        first, rows=tuple(rows[name] for name in sorted(rows)), given=tuple(given[name] for name in sorted(given))
    )


def _lower(
    graph: onnx.ModelProto,
    package: Package,
    name: str,
    folder: Path,
    target: Target,
    shapes: Shapes,
    layout: str,
    plugins: dict[str, int],
) -> _Segment:
    folder.mkdir(parents=True)
    state = package.own_state(name)
    in_place = updated_in_place(graph, [tensor.to_dict() for tensor in state]) if plugins else []
    try:
        lowered = lowered_segment(
            ir.from_proto(graph), _roles(package, name), package.spec, folder, state, target.precision, layout=layout,
            rope_dim=package.spec.rope_dim, tokens=max(shapes.batch[2], shapes.chunk[2]),
        )  # fmt: skip
    except BuildError as error:
        raise BuildError(f"segment {name}: {error}") from None
    control = any(node.op_type in ("Loop", "If", "Scan") for node in ir.load(folder / MODEL).graph)
    groups = {tensor.name: tensor.group for tensor in state}
    return _Segment(folder, lowered, plugins, tuple(groups[tensor] for tensor in in_place), control)


def _roles(package: Package, name: str) -> dict[str, Weight]:
    """The weights of a segment as its first call has them; those of the others have the same types and shapes."""
    owner = next((owner for owner, segment in package.calls() if segment == name), None)
    return package.lock.weights[owner] if owner is not None else {}


def _plan(
    segment: _Segment, plan: Path, name: str, target: Target, shapes: Shapes, backend_version: str, cache: PlanCache,
    build: Builder, report: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Build one plan, or take it from the cache; returns what is known of it."""
    backend, sm = target.backend, target.sm
    assert sm is not None
    named = named_capability(sm) if backend.builds_without_gpu else sm
    ranges = profiles(ir.load(segment.folder / MODEL), segment.lowered.state, shapes)
    digests = [
        hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""
        for path in (segment.folder / MODEL, segment.folder / CONSTANTS)
    ]
    key = sha256_json(
        [digests, sm, ranges, list(shapes.context), backend.name, backend_version, segment.captures, _RECIPE]
    )
    with cache.alone(key), report.part(name) as progress:
        facts = cache.take(key, plan)
        if facts is not None:
            return facts | {"reused": True}
        try:
            facts = build(
                segment.folder / MODEL, plan, sm=named, ranges=ranges, context=shapes.context, backend=backend,
                plugins=sum(segment.plugins.values()), capture=segment.captures, progress=progress,
            )  # fmt: skip
        except BuildError as error:
            raise BuildError(f"segment {name}: {error}") from None
        cache.keep(key, plan, facts)
    return facts | {"reused": False}


#: Raised when the way changes in which a plan is built from a graph.
_RECIPE = 1


def _facts(built: dict[str, Any], segment: _Segment) -> SegmentEngine:
    return SegmentEngine(built["layers"], segment.plugins, built["header"], segment.captures, built["reused"])


def _state(package: Package, segments: dict[str, _Segment]) -> list[StateTensor]:
    """The state of the whole model as the engines keep it, under the names of the package."""
    found = []
    for layer, name in enumerate(package.layers):
        for row, kept in zip(package.state_of(layer), segments[name].lowered.state, strict=True):
            found.append(StateTensor(**row.to_dict() | {"width": kept.width, "dtype": kept.dtype, "fill": kept.fill}))
    return found


def _in_place(package: Package, segments: dict[str, _Segment]) -> tuple[str, ...]:
    return tuple(
        tensor.name
        for layer, name in enumerate(package.layers)
        for tensor in package.state_of(layer)
        if tensor.group in segments[name].in_place
    )


def _weights(package: Package, table: EngineTable, segments: dict[str, _Segment]) -> dict[str, Any]:
    """Tensors and bytes on a device by type, those as stored apart, and what is taken wider than stored."""
    taken: dict[str, dict[str, int]] = {}
    widened: Counter[tuple[str, str]] = Counter()
    for call in table.calls:
        for one in table.weights[call.segment].values():
            row = taken.setdefault(one.dtype, {"tensors": 0, "bytes": 0, "as_stored": 0})
            row["tensors"] += 1
            row["bytes"] += one.bytes
            row["as_stored"] += one.bytes if one.form in (STORED, WORDS) else 0
        widened += segments[call.segment].lowered.widened
    rows = [{"stored": key[0], "weights": count, "reason": key[1]} for key, count in sorted(widened.items())]
    return {"taken": dict(sorted(taken.items())), "widened": rows}
