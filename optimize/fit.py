"""Whether a model fits a target, and how many GPUs it takes if not.

Engines share a model among the GPUs of one machine as the runtime does: layers in a row, each with its weights and its caches. Every
GPU has its own activations. Nothing is reserved for the driver. Bundles for ONNX Runtime use one device.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..backends import FLOAT32, FP4, FP8
from ..errors import InputError, listing
from ..export.checkpoint.config_reader import read_config
from ..export.contract.call_weights import call_weights
from ..export.contract.dealing import deal
from ..export.contract.geometry import ModelSpec
from ..export.contract.layouts import DENSE, LAYOUTS
from ..export.contract.profiles import HF, check_profile
from ..export.contract.state import state_tensors
from ..export.contract.weights import E2M1, E4M3
from ..export.memory import BLOCK_ROOM, Activations, MemoryPlan, activations, check_sizes, plan_memory
from .choices import Choice, choose, kept_layouts, missing_for
from .floor import state_floor, weight_floor, weights_moved_without_plugins
from .history import BUILD, EXPORT, Estimate, Run, estimate
from .kept_weights import built_in, cpu_weight_bytes, stacked_bytes, stored_format, weight_bytes_in
from .targets import Target

_LOG = logging.getLogger(__name__)

# The formats of experts in call_weights; the others are plain.
_CODES = {FP4: E2M1, FP8: E4M3}
# The planner's names for rows that `build` calls dense.
_DENSE_ROWS = {"float32": "float32", "bfloat16": "bf16"}
# Bytes of artifacts besides weights, negligible beside released ones. Measured: a segment of plain and of quantised weights as ONNX,
# what manifest and lock say of a layer and of a tensor (examples/tiny-v4, and headers of V4-Flash and V4-Pro); a plan per kind of
# layer without and with plugins, and the plans of the other segments together (examples/tiny-v4, sm80, TensorRT-RTX 1.7).
_SEGMENT, _QUANTISED_SEGMENT, _LAYER, _TENSOR = 56_000, 125_000, 2_500, 11.5
_ENGINE, _ENGINE_WITH_PLUGINS, _ENDS = 14_000_000, 3_100_000, 2_300_000


def stored_in(checkpoint: Path, *, allow_unknown_keys: Sequence[str] = ()) -> str:
    """The format of the experts of a checkpoint, a folder or a bare config.json.

    It is in the headers of its weights; if these are not there, in config.json.
    """
    if not checkpoint.is_dir() or not any(checkpoint.glob("*.safetensors")):
        return stored_format(read_config(checkpoint))
    from ..export.checkpoint.reader import Checkpoint

    source = Checkpoint(checkpoint, allow_unknown_keys=allow_unknown_keys)
    return stored_format(source.config, {name: stored.dtype for name, stored in source.headers.items()})


@dataclass(frozen=True)
class Share:
    """What one of several GPUs holds. Bytes.

    Attributes:
        calls: the first and the last of its calls: 0 is the embedding, then come the layers, then the head.
        weights: of these calls, each at an aligned address.
        state: caches of its layers, with all copies.
    """

    calls: tuple[int, int]
    weights: int
    state: int

    @property
    def held(self) -> int:
        """Weights and state."""
        return self.weights + self.state


@dataclass(frozen=True)
class TargetPlan:
    """One target with one row layout. All sizes in bytes.

    Attributes:
        target: the machine.
        capacity: memory of one GPU, or of this machine for the cpu target.
        layout: of cache rows, as ``build`` names it.
        memory: the caches.
        copies: of the caches: two in engines without plugins, because function bodies do not write in place (runtime/engine.py).
        activations: of a chunk, at their peaks.
        plugins: whether plugins compute what touches compressed KV.
        weights: for each format that the target keeps, from wide to narrow.
        built_in: the format of these that ``foldkv build`` writes.
        bundle: size of the bundle on disk, in that format.
        floor: bytes that a decode step of one sequence must move in that format: weights and rows (optimize/floor.py).
        placed: of the bundle, weights that are converted once, because the target does not compute with them as they are stored.
        stacked: of the weights, experts and matrices that the first run copies once, for all bundles of the checkpoint (runtime/stacks.py).
        build: how long a build may take here, or None if no earlier run tells.
        missing: why this machine cannot build it, "" if it can.
        max_context: per format the most tokens per sequence that fit on one device, 0 if none do; empty unless asked for.
        call_weights: of engines, for each format the bytes of the weights of every call.
        call_state: of engines, the bytes of the state of every call, with all copies.
    """

    target: Target
    capacity: int
    layout: str
    memory: MemoryPlan
    copies: int
    activations: Activations
    plugins: bool
    weights: dict[str, int]
    built_in: str
    bundle: int
    floor: int
    placed: int
    stacked: int
    build: Estimate | None
    missing: str = ""
    max_context: dict[str, int] = field(default_factory=dict)
    call_weights: dict[str, tuple[int, ...]] = field(default_factory=dict)
    call_state: tuple[int, ...] = ()

    @property
    def activation_bytes(self) -> int:
        """Size of the activations: engines reuse their memory, ONNX Runtime's arena does not."""
        return self.activations.total(reuse=self.target.backend.engine)

    @property
    def caches(self) -> int:
        """Size of the caches, with all copies."""
        return self.memory.total * self.copies

    @property
    def best_tokens(self) -> float | None:
        """The most tokens in a second that memory allows for one sequence, or None if the bandwidth is not known.

        Several GPUs that share the layers take turns, so there are no more with them.
        """
        bandwidth = self.target.bandwidth_gb_s
        return bandwidth * 1e9 / self.floor if bandwidth else None

    def over(self, format_: str) -> int:
        """Bytes that one device lacks; 0 if the model fits on it."""
        return max(0, self.caches + self.activation_bytes + self.weights[format_] - self.capacity)

    def shares(self, format_: str, count: int) -> tuple[Share, ...]:
        """What each of ``count`` GPUs of one machine holds, dealt out as the runtime does it (export/contract/dealing.py).

        Raises:
            InputError: the target's backend uses one GPU, or there are more GPUs than calls.
        """
        if not self.call_weights:
            raise InputError(f"{self.target.backend.library} uses one device; only engines share a model among GPUs.")
        weights = self.call_weights[format_]
        owners = deal(
            [one + other for one, other in zip(weights, self.call_state, strict=True)], [self.capacity] * count
        )
        found = []
        for number in range(count):
            own = [call for call, owner in enumerate(owners) if owner == number]
            part = slice(own[0], own[-1] + 1)
            found.append(Share((own[0], own[-1]), sum(weights[part]), sum(self.call_state[part])))
        return tuple(found)

    def devices(self, format_: str) -> int | None:
        """Number of GPUs of one machine that hold the model; None if no number is enough, or the backend uses one only."""
        if not self.over(format_):
            return 1
        room = self.capacity - self.activation_bytes
        count, held = 1, 0
        # As many calls as fit on each GPU: no way to cut the chain takes fewer.
        for weights, state in zip(self.call_weights.get(format_, ()), self.call_state, strict=True):
            if weights + state > room:
                return None
            held += weights + state
            if held > room:
                count, held = count + 1, weights + state
        return count if self.call_state else None

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {
            "target": self.target.name, "backend": self.target.backend.name, "sm": self.target.sm, "capacity": self.capacity, "layout": self.layout,
            "caches": {"groups": self.memory.groups, "copies": self.copies, "total": self.caches},
            "activations": {**asdict(self.activations), "total": self.activation_bytes, "estimate": True},
            "plugins": self.plugins, "weights": self.weights, "built_in": self.built_in,
            "over": {name: self.over(name) for name in self.weights},
            "fits": {name: self.over(name) == 0 for name in self.weights},
            "gpus": {name: self.devices(name) for name in self.weights} if self.target.backend.gpu else None,
            "floor": self.floor, "best_tokens_per_second": self.best_tokens, "bundle": self.bundle, "placed": self.placed, "stacked": self.stacked,
            "build_seconds": self.build.to_dict() if self.build else None,
            "builds_here": not self.missing, "missing": self.missing,
        } | ({"max_context": self.max_context} if self.max_context else {})  # fmt: skip


def plan_target(
    spec: ModelSpec,
    target: Target,
    *,
    context: int,
    layout: str = DENSE,
    batch: int = 1,
    chunk: int = 256,
    plugins: bool | None = None,
    profile: str = HF,
    stored: str = FLOAT32,
    max_context: bool = False,
    runs: Sequence[Run] = (),
) -> TargetPlan:
    """The figures of a model on one target, as ``build`` would build it.

    Args:
        spec: the model.
        target: the machine.
        context: tokens per sequence.
        layout: of the cache rows, as ``build`` names it.
        batch: sequences.
        chunk: tokens of a sequence that go through the model at once.
        plugins: whether GPU targets get plugins; None is the default of ``build``.
        profile: of the graph.
        stored: the format of the checkpoint's experts.
        max_context: also find the largest context that fits.
        runs: earlier runs on this machine, for the time.

    Raises:
        InputError: sizes out of range, a profile that the model does not have, or a layout that the target does not support.
    """
    check_profile(profile, spec)
    check_sizes(batch, chunk)
    [choice] = choose(spec, profile, [target], plugins=plugins, layout=layout)
    written, placed = built_in(stored, target.backend), 0
    if target.backend.engine:
        each = {
            name: tuple(call_weights(spec, _CODES.get(name, name), plugins=choice.plugins))
            for name in target.backend.weights
        }
        sizes = {name: sum(calls) for name, calls in each.items()}
    else:
        each = {}
        gpu = target.backend.gpu
        sizes = {name: cpu_weight_bytes(spec, name, gpu=gpu).total for name in target.backend.weights}
        placed = cpu_weight_bytes(spec, stored, gpu=gpu).placed
    capacity = target.memory_gib << 30 if target.memory_gib else machine_memory()
    memory, copies, live = _resident(spec, choice, context, batch, chunk)
    if target.backend.engine:
        kinds = len(set(zip(spec.layer_types, spec.hash_layers, strict=True)))
        rest = kinds * (_ENGINE_WITH_PLUGINS if choice.plugins else _ENGINE) + _ENDS + graph_bytes(spec, stored)
    else:
        rest = graph_bytes(spec, stored)
    rows = [0, *_state_by_layer(spec, layout, context, batch, target.precision), 0]
    moved = weights_moved_without_plugins if target.backend.engine and not choice.plugins else weight_floor
    return TargetPlan(
        target=target,
        capacity=capacity,
        layout=layout,
        memory=memory,
        copies=copies,
        activations=live,
        plugins=choice.plugins,
        weights=sizes,
        built_in=written,
        bundle=placed + rest,
        floor=moved(spec, written) + state_floor(spec, layout, context, target.precision),
        placed=placed,
        stacked=stacked_bytes(spec, stored, target.backend),
        build=estimate(
            list(runs), BUILD, weight_bytes=weight_bytes_in(spec, stored), layers=spec.num_layers,
            backend=target.backend.name, plugins=choice.plugins,
        ),
        missing=missing_for(choice),
        call_weights=each,
        call_state=tuple(copies * size for size in rows) if each else (),
        max_context={
            name: _largest_context(spec, choice, capacity - size, batch, chunk) for name, size in sizes.items()
        } if max_context else {},
    )  # fmt: skip


def _resident(
    spec: ModelSpec, choice: Choice, context: int, batch: int, chunk: int
) -> tuple[MemoryPlan, int, Activations]:
    """The caches, their number of copies, and the activations."""
    engine = choice.target.backend.engine
    rows = _DENSE_ROWS[choice.target.precision] if choice.layout == DENSE else choice.layout

    def live(batch: int, chunk: int) -> Activations:
        # For plain experts, which take most.
        return activations(
            spec, context=context, batch=batch, chunk=chunk, plugins=choice.plugins, weight_item=2 if engine else 4,
            room=None if engine else BLOCK_ROOM,
        )  # fmt: skip

    # Engines take chunks of one sequence at a time, and decode steps of all.
    steps = [live(1, chunk), live(batch, 1)] if engine else [live(batch, chunk)]
    return (
        plan_memory(spec, context=context, batch=batch, layout=rows),
        2 if engine and not choice.plugins else 1,
        max(steps, key=lambda one: one.total(reuse=engine)),
    )


def _state_by_layer(spec: ModelSpec, layout: str, context: int, batch: int, dtype: str) -> list[int]:
    """Bytes of the caches of every layer."""
    found = [0] * spec.num_layers
    for tensor in state_tensors(spec):
        found[tensor.layer] += LAYOUTS[layout].stored(tensor, spec.rope_dim, dtype).bytes(context, batch)
    return found


def _largest_context(spec: ModelSpec, choice: Choice, room: int, batch: int, chunk: int) -> int:
    """The most tokens per sequence whose caches and activations fit in ``room`` bytes; 0 if not even one does."""
    low, high = 0, spec.max_position_embeddings
    while low < high:
        middle = (low + high + 1) // 2
        memory, copies, live = _resident(spec, choice, middle, batch, chunk)
        if memory.total * copies + live.total(reuse=choice.target.backend.engine) <= room:
            low = middle
        else:
            high = middle - 1
    return low


def graph_bytes(spec: ModelSpec, stored: str = FLOAT32) -> int:
    """Size of the graph package on disk: a segment per kind of layer, and where its weights lie; they stay there.

    Args:
        spec: the model.
        stored: the format of the checkpoint's experts.
    """
    kinds = len(set(zip(spec.layer_types, spec.hash_layers, strict=True)))
    quantised = stored in (FP8, FP4)
    tensors = spec.num_experts * (6 if quantised else 3)
    return (_QUANTISED_SEGMENT if quantised else _SEGMENT) * kinds + int(_LAYER + _TENSOR * tensors) * spec.num_layers


def export_estimate(spec: ModelSpec, runs: Sequence[Run], stored: str = FLOAT32) -> Estimate | None:
    """How long an export may take here, or None if no earlier run tells."""
    return estimate(list(runs), EXPORT, weight_bytes=weight_bytes_in(spec, stored), layers=spec.num_layers)


def within_model(spec: ModelSpec, context: int) -> int:
    """The context; if the model takes fewer tokens, its largest, with a warning."""
    largest = spec.max_position_embeddings
    if context > largest:
        _LOG.warning(
            "this model takes at most %s tokens; the plan is for that many, not for %s.", f"{largest:,}", f"{context:,}"
        )
    return min(context, largest)


def plan_targets(
    spec: ModelSpec,
    targets: Sequence[Target],
    *,
    layout: str | None = None,
    plugins: bool | None = None,
    profile: str = HF,
    **options: Any,
) -> list[TargetPlan]:
    """The figures per target and layout: the given layout, or every layout that the target supports.

    Raises:
        InputError: as :func:`plan_target`; the message lists all targets that refuse.
    """
    check_profile(profile, spec)
    if layout is not None:
        chosen = [(one.target, [one.layout]) for one in choose(spec, profile, targets, plugins=plugins, layout=layout)]
    else:
        chosen = [(target, kept_layouts(spec, profile, target, plugins=plugins)) for target in targets]
    if unbuilt := [target.name for target, names in chosen if not names]:
        raise InputError(
            f"{', '.join(unbuilt)}: no operator of this model has a plugin there. Plan with --plugins off."
        )
    plans, findings = [], []
    for target, names in chosen:
        for name in names:
            try:
                plans.append(plan_target(spec, target, layout=name, plugins=plugins, profile=profile, **options))
            except InputError as error:
                findings.append(str(error))
    findings = list(dict.fromkeys(findings))  # a size out of range is the same for all
    if len(findings) == 1:
        raise InputError(findings[0])
    if findings:
        raise InputError(listing("this cannot be planned", findings, "Choose another layout or other targets."))
    return plans


def machine_memory() -> int:
    """Bytes of this machine's memory, taken or not."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
