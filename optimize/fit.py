"""Whether a model fits a target, and how many GPUs it takes if not: the figures that one decides with.

Weights are shared out over the GPUs. Caches and activations are counted in full on every GPU: one KV head serves all query
heads, so that splitting a layer over GPUs does not split its cache. Nothing is set aside for the driver. foldkv's runtime
drives one GPU; the number is what a runtime that shards would take.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from foldkv.errors import InputError, listing
from foldkv.export.layouts import DENSE, LAYOUTS
from foldkv.export.plan import BLOCK_ROOM, Activations, MemoryPlan, activations, plan_memory
from foldkv.export.profiles import HF
from foldkv.export.spec import ModelSpec
from foldkv.optimize.formats import kept_formats, weight_bytes_in
from foldkv.optimize.history import BUILD, Estimate, Run, estimate
from foldkv.optimize.targets import Target
from foldkv.plugins.coverage import coverage

# What the planner calls rows that `build` calls dense.
_DENSE_ROWS = {"float32": "float32", "bfloat16": "bf16"}
# Bytes per layer of an artifact besides its weights, measured on examples/tiny-v4: graph and cpu graph as ONNX; an engine's
# code without and with plugins (sm80, TensorRT-RTX 1.7). Next to released weights they are nothing.
_GRAPH, _CPU_GRAPH, _ENGINE, _ENGINE_WITH_PLUGINS = 48_000, 96_000, 6_800_000, 5_000_000


@dataclass(frozen=True)
class TargetPlan:
    """One target with one row layout. All sizes in bytes.

    Attributes:
        target: the machine.
        capacity: memory of one GPU, or of this machine for the cpu target.
        layout: of cache rows, as ``build`` names it.
        memory: the caches.
        copies: of the caches: two in engines without plugins, whose function bodies do not write in place (runtime/engine.py).
        activations: of a chunk, at their largest moments.
        weights: by format that the target keeps, from wide to narrow. ``foldkv build`` writes the first from a package with
            weights in float32, the format of the checkpoint from one with weights as stored.
        bundle: what the bundle takes on disk, in the first format.
        build: how long a build may take here, or None without a run to tell from.
    """

    target: Target
    capacity: int
    layout: str
    memory: MemoryPlan
    copies: int
    activations: Activations
    weights: dict[str, int]
    bundle: int
    build: Estimate | None

    @property
    def activation_bytes(self) -> int:
        """What the activations take: engines lay them over each other, ONNX Runtime's arena does not."""
        return self.activations.total(reuse=self.target.sm is not None)

    @property
    def caches(self) -> int:
        """What the caches take, in all copies."""
        return self.memory.total * self.copies

    @property
    def replicated(self) -> int:
        """What every GPU holds in full."""
        return self.caches + self.activation_bytes

    def over(self, format_: str) -> int:
        """Bytes by which one device is too small; 0 if the model fits on it."""
        return max(0, self.replicated + self.weights[format_] - self.capacity)

    def devices(self, format_: str) -> int | None:
        """GPUs that hold the weights beside caches and activations; None if no number does."""
        room = self.capacity - self.replicated
        return -(-self.weights[format_] // room) if room > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        gpu = self.target.sm is not None
        return {
            "target": self.target.name, "sm": self.target.sm, "capacity": self.capacity, "layout": self.layout,
            "caches": {"groups": self.memory.groups, "copies": self.copies, "total": self.caches},
            "activations": {**asdict(self.activations), "total": self.activation_bytes, "estimate": True},
            "weights": self.weights, "built_in": next(iter(self.weights)),
            "over": {name: self.over(name) for name in self.weights},
            "fits": {name: self.over(name) == 0 for name in self.weights},
            "gpus": {name: self.devices(name) for name in self.weights} if gpu else None,
            "bundle": self.bundle, "build_seconds": self.build.to_dict() if self.build else None,
        }  # fmt: skip


def plan_target(
    spec: ModelSpec,
    target: Target,
    *,
    context: int,
    layout: str = DENSE,
    batch: int = 1,
    chunk: int = 256,
    plugins: bool = True,
    runs: Sequence[Run] = (),
) -> TargetPlan:
    """The figures of a model on one target.

    Args:
        spec: the model.
        target: the machine; the cpu target keeps dense rows and has no plugins.
        context: tokens per sequence.
        layout: of the rows of GPU targets, as ``build`` names it.
        batch: sequences.
        chunk: tokens of a sequence that go through the model at once.
        plugins: whether plugins compute what touches compressed KV.
        runs: earlier runs on this machine, for the time.

    Raises:
        InputError: a context or batch out of range, or a layout that the target does not keep.
    """
    gpu = target.sm is not None
    layout, plugins = (layout, plugins) if gpu else (DENSE, False)
    gap = layout_gaps(spec, target, plugins=plugins).get(layout, "is not known")
    if gap:
        raise InputError(f"{target.name}: layout {layout} {gap}.")
    rows = _DENSE_ROWS[target.precision] if layout == DENSE else layout
    weights = {name: weight_bytes_in(spec, name, target.sm) for name in kept_formats(target.sm)}
    written = next(iter(weights.values()))
    code = (_ENGINE_WITH_PLUGINS if plugins else _ENGINE) if gpu else _CPU_GRAPH
    return TargetPlan(
        target=target,
        capacity=target.memory_gib << 30 if target.memory_gib else _machine_memory(),
        layout=layout,
        memory=plan_memory(spec, context=context, batch=batch, layout=rows),
        copies=2 if gpu and not plugins else 1,
        # Of a package with weights in float32, whose experts take most.
        activations=activations(
            spec, context=context, batch=batch, chunk=chunk, plugins=plugins, weight_item=2 if gpu else 4,
            room=None if gpu else BLOCK_ROOM,
        ),
        weights=weights,
        bundle=written + code * spec.num_layers,
        build=estimate(
            list(runs), BUILD, weight_bytes=weight_bytes_in(spec, "float32"), layers=spec.num_layers,
            backend=target.backend, plugins=plugins,
        ),
    )  # fmt: skip


def graph_bytes(spec: ModelSpec) -> int:
    """What the graph package takes on disk: every weight in float32."""
    return weight_bytes_in(spec, "float32") + _GRAPH * spec.num_layers


def layout_gaps(spec: ModelSpec, target: Target, *, plugins: bool) -> dict[str, str]:
    """Per row layout why a target's engines do not keep it, "" where they do; asks the rules of injection.

    Dense rows are always kept: function bodies read them where a plugin does not.
    """
    gaps = dict.fromkeys(LAYOUTS, "")
    for name in gaps:
        if name == DENSE:
            continue
        if target.sm is None or not plugins:
            gaps[name] = "needs plugins, which alone read packed rows"
            continue
        layout = LAYOUTS[name]
        rows = [row for row in coverage(spec, [target.sm], (HF,)) if row.rows == layout.format_of(row.group)]
        reasons = [f"{row.operator} {row.gaps[target.sm]}" for row in rows if row.gaps[target.sm]]
        gaps[name] = f"is not kept ({reasons[0]})" if reasons else ""
    return gaps


def plan_targets(
    spec: ModelSpec, targets: Sequence[Target], *, layout: str | None = None, plugins: bool = True, **sizes: Any
) -> list[TargetPlan]:
    """The figures per target and layout: the layout given, or every one that the target keeps.

    Raises:
        InputError: as :func:`plan_target`; all targets that refuse are listed.
    """
    if layout is not None and layout not in LAYOUTS:
        raise InputError(f"layout {layout!r} is not known to targets; expected one of {', '.join(LAYOUTS)}.")
    plans, findings = [], []
    for target in targets:
        kept = [name for name, gap in layout_gaps(spec, target, plugins=plugins).items() if not gap]
        for name in kept if layout is None else [layout]:
            try:
                plans.append(plan_target(spec, target, layout=name, plugins=plugins, **sizes))
            except InputError as error:
                findings.append(str(error))
    findings = list(dict.fromkeys(findings))  # a context out of range is the same for all
    if len(findings) == 1:
        raise InputError(findings[0])
    if findings:
        raise InputError(listing("this cannot be planned", findings, "Choose another layout or other targets."))
    return plans


def _machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
