"""What `foldkv plan` says: the figures as facts, and the same as text for people."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .errors import InputError
from .export.contract.geometry import ModelSpec
from .export.contract.step_time import BFLOAT16, FLOAT32, STORED, warning
from .export.memory import OFFERED, MemoryPlan, parameter_count, plan_memory, weight_bytes
from .optimize.fit import TargetPlan, export_estimate, graph_bytes, plan_targets
from .optimize.history import Estimate, read_runs
from .optimize.kept_weights import FORMATS, cpu_step, cpu_step_seconds, wide_matrix_bytes
from .optimize.targets import resolve_targets
from .runtime.stacks_made import made_here, stacks_folder
from .tables import table
from .units import count_text, duration_text, size_text


@dataclass(frozen=True)
class Said:
    """What there is to say: facts for `--json`, or lines."""

    facts: dict[str, Any]
    lines: list[str]


@dataclass(frozen=True)
class Sizes:
    """What is planned for: tokens per sequence, sequences, and the context that was asked for."""

    context: int
    batch: int
    asked: int

    def facts(self, **more: int) -> dict[str, int]:
        """As JSON values; the context that was asked for only if it was more than the model takes."""
        asked = {"context_asked": self.asked} if self.asked != self.context else {}
        return {"context": self.context, "batch": self.batch, **more, **asked}


def plan_layouts(spec: ModelSpec, sizes: Sizes, layout: str | None) -> Said:
    """Caches and weights of a model in one row format, or in all that targets keep.

    Raises:
        InputError: the format is unknown, or the model does not have it.
    """
    plans = []
    for name in [layout] if layout else OFFERED:
        try:
            plans.append(plan_memory(spec, context=sizes.context, batch=sizes.batch, layout=name))
        except InputError:
            if layout or name == "bf16":
                raise
    facts = []
    for plan in plans:
        weights = weight_bytes(spec, plan.layout)
        facts.append(plan.to_dict() | {"weights": weights, "total_with_weights": weights + plan.total})
    lines = [f"{count_text(parameter_count(spec))} parameters; {sizes.context:,} tokens x {sizes.batch}"]
    rows = [["layout", "window", "entries", "index", "carry", "caches", "of V3.2", "weights", "total"]]
    lines += table([*rows, *(_layout_row(spec, plan) for plan in plans)], numbers=tuple(range(1, 9)))
    if any(plan.layout not in OFFERED for plan in plans):
        lines.append(f"No target keeps {layout} yet; these are the bytes that it would take.")
    lines.append(
        f"V3.2 in fp8 at this context: {size_text(plans[0].v32)}. The share compares the parts that grow with the context."
    )
    return Said({"parameters": parameter_count(spec), **sizes.facts(), "plans": facts}, lines)


def _layout_row(spec: ModelSpec, plan: MemoryPlan) -> list[str]:
    groups, weights = plan.groups, weight_bytes(spec, plan.layout)
    carry = sum(size for name, size in groups.items() if "carry" in name)
    parts = [groups["window"], groups.get("entries", 0), groups.get("index_entries", 0), carry, plan.total]
    share = f"{100 * plan.share_of_v32:.2f} %"
    return [plan.layout, *map(size_text, parts), share, size_text(weights), size_text(weights + plan.total)]


def plan_on_targets(
    spec: ModelSpec, stored: str, names: Sequence[str], sizes: Sizes, layout: str | None, *, chunk: int, profile: str,
    plugins: bool | None, max_context: bool, backend: str | None = None, devices: int | None = None,
) -> Said:  # fmt: skip
    """Whether a model fits on targets, and what each of ``devices`` GPUs holds; other arguments and errors as of
    ``resolve_targets`` and ``optimize.fit.plan_targets``."""
    targets, runs = resolve_targets(names, backend), read_runs()
    plans = plan_targets(
        spec, targets, layout=layout, runs=runs, stored=stored, context=sizes.context, batch=sizes.batch, chunk=chunk,
        plugins=plugins, profile=profile, max_context=max_context,
    )  # fmt: skip
    export, graph = export_estimate(spec, runs, stored), graph_bytes(spec, stored)
    facts = {
        "parameters": parameter_count(spec), **sizes.facts(chunk=chunk), "profile": profile, "stored": stored,
        "graph": graph, "export_seconds": export.to_dict() if export else None,
        "targets": [
            plan.to_dict()
            | {"stacking_seconds": _stacking(plan.stacked)}
            | ({"step": _step_facts(spec, plan)} if plan.stacked else {})
            | (_share_facts(plan, devices) if devices else {})
            for plan in plans
        ],
    }  # fmt: skip
    head = (
        f"{count_text(parameter_count(spec))} parameters; {sizes.context:,} tokens x {sizes.batch}, chunks of {chunk}"
    )
    held = {name: size for name in FORMATS for plan in plans if (size := plan.weights.get(name))}
    rows = [
        [
            "target",
            "memory",
            "rows",
            "caches",
            "activations",
            "at best",
            *(f"{n}, {size_text(size)}" for n, size in held.items()),
        ]
    ]
    for plan in plans:
        best = "" if plan.best_tokens is None else f"{plan.best_tokens:,.0f} tokens/s"
        cells = [size_text(plan.capacity), plan.layout, size_text(plan.caches), size_text(plan.activation_bytes), best]
        rows.append([plan.target.name, *cells, *(_verdict(plan, name) for name in held)])
    lines = [
        head,
        *table(rows, numbers=(1, 3, 4, 5)),
        *(_largest_contexts(plans, list(held)) if max_context else ()),
        *(line for plan in plans if devices for line in _shares(plan, devices)),
        *_disk_and_time(plans, graph, export),
        *_assumptions(spec, plans),
    ]
    return Said(facts, lines)


def _verdict(plan: TargetPlan, format_: str) -> str:
    """Whether the model fits with weights in a format. If not: what one device lacks, and how many GPUs it takes.

    The format that a build writes is marked.
    """
    if format_ not in plan.weights:
        return "not kept"
    over, devices, mark = plan.over(format_), plan.devices(format_), " *" if format_ == plan.built_in else ""
    if not over:
        return f"fits{mark}"
    if not plan.target.backend.gpu:
        return f"{size_text(over)} over{mark}"
    if devices is None:
        return f"{size_text(over)} over{', on any number of GPUs' if plan.call_weights else ''}{mark}"
    return f"{size_text(over)} over, {devices} GPUs{mark}"


def _share_facts(plan: TargetPlan, count: int) -> dict[str, Any]:
    shares = plan.shares(plan.built_in, count)
    return {"devices": [{"calls": list(one.calls), "weights": one.weights, "caches": one.state} for one in shares]}


def _shares(plan: TargetPlan, count: int) -> list[str]:
    """What each GPU holds, with weights as `build` writes them."""
    rows = [["GPU", "has", "weights", "caches", "activations", "in all"]]
    last = len(plan.call_state) - 1
    for number, share in enumerate(plan.shares(plan.built_in, count)):
        total = share.held + plan.activation_bytes
        fits = "" if total <= plan.capacity else f", {size_text(total - plan.capacity)} over"
        sizes = (share.weights, share.state, plan.activation_bytes)
        rows.append([str(number), _span(*share.calls, last), *map(size_text, sizes), f"{size_text(total)}{fits}"])
    title = (
        f"{plan.target.name} x {count}, {plan.layout} rows, {plan.built_in} weights: {size_text(plan.capacity)} each"
    )
    return ["", title, *table(rows, numbers=(2, 3, 4))]


def _span(first: int, last: int, head: int) -> str:
    """Calls by name: the embedding, layers, the head."""
    layers = [call - 1 for call in (max(first, 1), min(last, head - 1))]
    inside = f"layers {layers[0]} to {layers[1]}" if layers[0] < layers[1] else f"layer {layers[0]}"
    names = ["embedding"] * (first == 0) + [inside] * (layers[0] <= layers[1]) + ["head"] * (last == head)
    return ", ".join(names)


def _largest_contexts(plans: Sequence[TargetPlan], formats: Sequence[str]) -> list[str]:
    rows = [["target", "rows", *formats]]
    for plan in plans:
        found = [plan.max_context.get(name) for name in formats]
        cells = ["not kept" if tokens is None else f"{tokens:,}" if tokens else "none" for tokens in found]
        rows.append([plan.target.name, plan.layout, *cells])
    return ["", "largest context that fits on one device", *table(rows, numbers=tuple(range(2, 2 + len(formats))))]


def _disk_and_time(plans: Sequence[TargetPlan], graph: int, export: Estimate | None) -> list[str]:
    rows = [["stage", "on disk", "time"], ["export", size_text(graph), time_text(export)]]
    shown = {plan.target.name: plan for plan in plans}  # a target's bundle has the same size with any row format
    for name, plan in shown.items():
        time = "not on this machine (see --json)" if plan.missing else time_text(plan.build)
        rows.append([f"build {name}", size_text(plan.bundle), time])
        if plan.stacked:
            rows.append([f"first run, {name}", size_text(plan.stacked), _stacking_text(plan.stacked)])
    return ["", *table(rows, numbers=(1,)), ""]


def _assumptions(spec: ModelSpec, plans: Sequence[TargetPlan]) -> list[str]:
    marked = "`foldkv build` writes the format marked with *: quantised experts as they are stored, plain ones in the type of their products."
    lines = [marked]
    for plan in {plan.target.name: plan for plan in plans if plan.placed}.values():
        lines.append(
            f"The bundle for {plan.target.name} holds {size_text(plan.placed)} of weights converted to float32, which it computes in; the rest stays "
            "in the checkpoint. `foldkv build --no-place` converts them in every step instead."
        )
    for plan in {plan.target.name: plan for plan in plans if plan.stacked}.values():
        lines.append(
            f"The first run of a bundle for {plan.target.name} copies {size_text(plan.stacked)} of weights to {stacks_folder()}, in the order and the type in "
            "which ONNX Runtime reads them; all bundles of the checkpoint share them. With `--no-place` it copies none, and every step decodes them."
        )
        lines.append(_step_text(spec, plan))
    for plan in {
        plan.target.name: plan for plan in plans if plan.target.backend.gpu and not plan.target.backend.engine
    }.values():
        lines.append(
            f"{plan.target.backend.library} on {plan.target.name}: the GPU holds all of {size_text(plan.weights[plan.built_in])} of weights, "
            f"and caches and activations in {plan.target.precision}. It has never been run, and will be far slower than memory allows."
        )
    backends = [plan.target.backend for plan in plans]
    if any(backend.engine for backend in backends):
        lines.append(
            "Over: what one device lacks. GPUs of one machine share the layers, with their weights and caches; each has its own activations. The driver is not counted, and two machines are not supported."
        )
    elif any(backend.gpu for backend in backends):
        lines.append("Over: what the GPU lacks. The driver is not counted, and ONNX Runtime uses one GPU.")
    if any(not plan.target.backend.gpu and plan.over(plan.built_in) for plan in plans):
        lines.append(
            "A bundle for cpu that is over runs all the same: its weights are read where they lie, and memory keeps what is read most."
        )
    if any(plan.best_tokens is not None for plan in plans):
        lines.append(
            "At best: the tokens a second of one sequence if memory is read at its full speed, each weight once per token, as stored."
        )
    if any(plan.target.backend.engine and not plan.plugins for plan in plans):
        lines.append(
            "Without plugins, products take their weights in bfloat16 or float32, and every token copies and decodes its experts: that is counted."
        )
    if any(plan.activations.largest == "experts" for plan in plans):
        lines.append(
            "Activations are estimates. In engines, at most 1 GiB of them are experts' weights, gathered for a few tokens at a time."
        )
    else:
        lines.append("Activations are estimates. They are largest in attention and grow with chunk and context.")
    return lines


def _step_facts(spec: ModelSpec, plan: TargetPlan) -> dict[str, Any]:
    matrices, experts = cpu_step(spec, plan.built_in)
    ways, wide = _ways(spec, plan), wide_matrix_bytes(spec, plan.built_in)
    seconds = {name: round(cpu_step_seconds(spec, plan.built_in, matrices=way), 2) for name, way in ways.items()}
    return {
        "matrix_bytes": matrices, "expert_bytes": experts, "float32_bytes": wide, "seconds": seconds, "estimate": True,
    }  # fmt: skip


def _step_text(spec: ModelSpec, plan: TargetPlan) -> str:
    matrices, experts = cpu_step(spec, plan.built_in)
    takes = {
        name: _seconds_text(cpu_step_seconds(spec, plan.built_in, matrices=way))
        for name, way in _ways(spec, plan).items()
    }
    held = (
        "memory holds them"
        if matrices + experts <= plan.capacity
        else f"the {size_text(plan.capacity)} of memory do not hold them: the disk is read in every step"
    )
    wide = (
        f", {takes['float32']} where memory holds the matrices in float32 ({size_text(wide_matrix_bytes(spec, plan.built_in))})"
        if "float32" in takes
        else ""
    )
    return (
        f"A step of one sequence on {plan.target.name} reads {size_text(matrices)} of matrices and {size_text(experts)} of experts; {held}. On two processors it takes "
        f"{takes['copied']}{wide}, with `--no-place` {takes['no_place']} (rates as measured, docs/results.md)."
    )


def _ways(spec: ModelSpec, plan: TargetPlan) -> dict[str, str]:
    """How a step can read its matrices, by the names of the plan."""
    if not wide_matrix_bytes(spec, plan.built_in):
        return {"copied": FLOAT32, "no_place": STORED}
    return {"copied": BFLOAT16, "float32": FLOAT32, "no_place": STORED}


def _seconds_text(seconds: float) -> str:
    return warning(seconds) or f"about {seconds:.2g} s"


#: Bytes a second at which stacks are made where nobody has made some: hashing, and a disk that writes half a gigabyte a second.
_STACKING_SPEED = 0.5e9


def _stacking(size: int) -> dict[str, Any] | None:
    """Seconds that stacks of a size take to make, and from how many that were made here; None if there are none to make."""
    if not size:
        return None
    made = made_here()
    speed = statistics.median(one.bytes / one.seconds for one in made) if made else _STACKING_SPEED
    return {"estimate": True, "seconds": round(size / speed, 1), "runs": len(made)}


def _stacking_text(size: int) -> str:
    found = _stacking(size)
    assert found is not None
    runs = found["runs"]
    source = (
        f"estimate from {runs} run{'s' if runs > 1 else ''} on this machine" if runs
        else f"at {_STACKING_SPEED / 1e9:.1f} GB/s; nothing was stacked here yet"
    )  # fmt: skip
    return f"{duration_text(found['seconds'])} ({source})"


def time_text(found: Estimate | None) -> str:
    """An estimate in words."""
    if found is None:
        return "no comparable runs yet"
    low, high = duration_text(found.low), duration_text(found.high)
    span = high if low == high else f"{low} to {high}"
    return f"{span} (estimate from {found.runs} run{'s' if found.runs > 1 else ''} on this machine)"
