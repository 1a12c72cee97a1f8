"""What a step of an engine launches and moves, from the text that TensorRT-RTX 1.7 writes into a plan and from the plugins' plans.

The text lists, for each optimization profile, the tensors and calls of every part that the library compiled; a name in a later
profile ends in ``[profile N]``. Plugins that update the state in place are layers between these parts; of them, only the graph
tells. The format of the text is the library's own: tests that read it fail on another version before anything relies on it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foldkv.export.contract.engine_set import ENGINES, EngineTable
from foldkv.export.contract.layouts import DENSE, LAYOUTS
from foldkv.export.contract.operators import STATE
from foldkv.export.contract.rows import row_format_named
from foldkv.export.operators.registry import DOMAIN
from foldkv.export.package import Package
from foldkv.manifests import BundleManifest, read
from foldkv.optimize.floor import state_floor, stored_read
from foldkv.optimize.passes.linears import read_stored
from foldkv.plugins.declarations import PLUGINS
from foldkv.plugins.launch import plan as launches_of

_ITEM = {"float": 4, "int32": 4, "int64": 8, "int8": 1, "uint8": 1, "bool": 1, "bf16": 2, "half": 2}
_WORKSPACE = ("_wksp", "__scratch_space")


@dataclass(frozen=True)
class Tensor:
    """A tensor of a compiled part: sizes that are not fixed are names. ``host``: it is a size, in the host's memory."""

    name: str
    dims: tuple[int | str, ...]
    item: int
    host: bool
    base: str | None

    def bytes(self, sizes: dict[str, int] | int) -> int:
        """Bytes with every size that is not fixed as given."""
        return self.item * math.prod(
            dim if isinstance(dim, int) else sizes if isinstance(sizes, int) else sizes[dim] for dim in self.dims
        )


@dataclass(frozen=True)
class Call:
    """A launch of a compiled part: "custom_layer" for a plugin, else the library's own."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass
class Part:
    """A part that the library compiled as a whole."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    runs: bool = False

    def under(self, name: str) -> Tensor:
        """The tensor in whose memory ``name`` is."""
        tensor = self.tensors[name]
        return self.under(tensor.base) if tensor.base else tensor


def parts(plan: bytes) -> list[tuple[Part, ...]]:
    """The parts of every profile, in order. Bodies of fused products, which are in the text too, are left out."""
    found: list[Part] = []
    section = ""
    for line in plan.decode("latin-1").splitlines():
        if opened := re.fullmatch(r"([a-z_]+) \{", line):
            section = opened[1]
            if section == "descriptors":
                found.append(Part())
        elif line.startswith("}"):
            section = ""
        elif section == "descriptors" and (row := re.fullmatch(r"  (?:sub_)?tensor=\{(.*)\}", line)):
            tensor = _tensor(row[1])
            found[-1].tensors[tensor.name] = tensor
        elif section == "main" and (row := re.match(r" +([a-z_]+)=\{ name=", line)):
            if row[1] == "shape_call":
                found[-1].runs = True
            elif row[1] not in ("signal", "wait"):
                found[-1].calls.append(_call(row[1], line))
    run = [part for part in found if part.runs]
    later = [any("[profile " in name for name in part.tensors) for part in run]
    first = len(run) - sum(later)
    if later != sorted(later) or len(run) != 2 * first:
        raise AssertionError(f"expected as many parts of each of two profiles; found {later}")
    return [tuple(run[:first]), tuple(run[first:])]


def _tensor(text: str) -> Tensor:
    def of(key: str, pattern: str) -> str:
        match = re.search(rf"(?:^| ){key}={pattern}", text)
        return match[1] if match else ""

    dims = tuple(int(dim) if dim.isdigit() else dim.strip('"') for dim in of("dims", r"\{([^}]*)\}").split())
    host = "hmem" in of("region", r'"?([^" ]*)')
    return Tensor(of("name", r'"([^"]*)"'), dims, _ITEM[of("type", r"(\w+)")], host, of("base", r'"([^"]*)"') or None)


def _call(kind: str, line: str) -> Call:
    def names(*keys: str) -> tuple[str, ...]:
        for key in keys:
            if match := re.search(rf" {key}=\{{([^}}]*)\}}", line):
                return tuple(re.findall(r'"([^"]*)"', match[1]))
        return ()

    name = re.search(r' name="?([^" ]+)', line)
    return Call(kind, name[1] if name else "", names("input_args", "input", "args"), names("output_args", "output"))


@dataclass(frozen=True)
class Traffic:
    """Bytes that one decode step of one sequence moves in one segment, and its launches.

    Attributes:
        launches: kernels of plugins, and others.
        weights: bytes of weights that launches read, each as often as it is read.
        state: bytes of rows that attention and indexer look at.
        activations: bytes between launches, written and read, workspaces included.
        floor: bytes of the weights as stored, and of the same rows, each once.
        widest: bytes of the largest weight that is written into memory again in any profile, with its name.
    """

    launches: Counter[str]
    weights: int
    state: int
    activations: int
    floor: int
    widest: tuple[int, str]

    @property
    def bytes(self) -> int:
        """All bytes that are moved."""
        return self.weights + self.state + self.activations

    @property
    def ratio(self) -> float:
        """Bytes moved over the floor."""
        return self.bytes / self.floor


def traffic(bundle: Path, package: Package, segment: str, context: int) -> Traffic:
    """What a step of a segment moves after ``context`` tokens, in a bundle with plugins.

    Args:
        bundle: folder of an engine bundle.
        package: that it was built from.
        segment: name of the segment.
        context: tokens in the state.
    """
    manifest, table = read(BundleManifest, bundle), EngineTable.read(bundle / ENGINES)
    owner = next(owner for owner, name in package.calls() if name == segment)
    layer = package.layers.index(segment) if segment in package.layers else None
    weights, stored = table.weights[segment], package.lock.weights[owner]
    profiles = parts((bundle / table.plans[segment]).read_bytes())
    launches, read_bytes, moved = Counter[str](), 0, 0
    seen = set()
    for part in profiles[0]:
        for call in part.calls:
            seen.add(re.sub(r"_U\d+$", "", call.name))
            launches["plugins" if call.kind == "custom_layer" else "others"] += call.kind != "custom_layer"
            for name in dict.fromkeys((*call.inputs, *call.outputs)):
                tensor = part.under(name)
                role = tensor.name.rpartition(".")[0]
                if role in weights:
                    read_bytes += stored_read(package.spec, role, weights[role].bytes)
                elif call.kind != "custom_layer" and not tensor.host and not tensor.name.startswith(_WORKSPACE):
                    moved += part.tensors[name].bytes(1)
    for node in _plugins(package, segment, manifest, context):
        launches["plugins"] += node.launches
        moved += node.moved
        if node.name not in seen:  # between the parts
            read_bytes += sum(
                stored_read(package.spec, role, weights[role].bytes) for role in node.weights if role in weights
            )
    state = 0 if layer is None else state_floor(package.spec, manifest.layout, context, "bfloat16", layer=layer)
    floor = sum(stored_read(package.spec, role, stored[role].bytes) for role in weights) + state
    widest = max(_rewritten(profiles), default=(0, ""))
    return Traffic(launches, read_bytes, state, moved, floor, widest)


def _rewritten(profiles: list[tuple[Part, ...]]) -> Iterator[tuple[int, str]]:
    """What launches write that has no axis of tokens and no workspace's name: weights in another form."""
    for profile in profiles:
        for part in profile:
            for call in part.calls:
                for name in call.outputs:
                    tensor = part.under(name)
                    fixed = all(isinstance(dim, int) for dim in tensor.dims)
                    if fixed and not tensor.host and not any(word in tensor.name for word in _WORKSPACE):
                        yield tensor.bytes({}), tensor.name


@dataclass(frozen=True)
class _Plugin:
    """A plugin node of a step: its kernels, the weights and constants that it takes, the bytes of everything else, apart from
    the state, that its kernels read and write."""

    name: str
    launches: int
    weights: tuple[str, ...]
    moved: int


def _plugins(package: Package, segment: str, manifest: BundleManifest, context: int) -> Iterator[_Plugin]:
    layout, spec, sm = LAYOUTS[manifest.layout], package.spec, manifest.target.sm
    assert sm is not None
    model = package.segment(segment).model
    read_stored(model, spec, sm=sm)
    state = {name: tensor for tensor in package.own_state(segment) for name in (tensor.input, tensor.output)}
    fixed = {value.name for value in (*model.graph.inputs, *model.graph.initializers.values())} - {"streams"}
    for node in model.graph:
        if node.domain != DOMAIN or node.op_type not in PLUGINS:
            continue
        plugin = PLUGINS[node.op_type]
        values = list(zip((*plugin.inputs, *plugin.outputs), (*node.inputs, *node.outputs), strict=True))
        attributes: dict[str, Any] = {
            name: attribute.value for name, attribute in node.attributes.items() if name in plugin.attributes
        }
        sizes: dict[str, int] = {"B": 1, "S": 1, "M": 1, "W": spec.sliding_window}
        format_ = DENSE
        for declared, value in values:
            assert value is not None
            kept = state.get(value.name or "")
            if declared.dtype == STATE and plugin.row_formats:
                format_ = layout.format_of(kept.group if kept else declared.groups[0]) or format_
            if kept is not None and kept.ratio and "carry" not in kept.group:
                sizes["E"] = context // kept.ratio
            if value.shape is not None and declared in plugin.inputs:
                sizes |= {
                    str(symbol): size
                    for symbol, size in declared.sized(tuple(value.shape))
                    if isinstance(size, int) and isinstance(symbol, str)
                }
        sizes |= {name: value for name, value in attributes.items() if isinstance(value, int)}
        sizes.setdefault("GK", sizes.get("groups", 1) * sizes.get("K", 0))
        sizes.setdefault("E", context // sizes.get("ratio", 1))
        row = row_format_named(format_).row_bytes(sizes["D"], spec.rope_dim) if "D" in sizes else 0
        if row_format_named(format_).packed:
            sizes["ROW"] = row
        plan = launches_of(
            node.op_type,
            sizes,
            attributes,
            sm=sm,
            dtype=manifest.target.precision,
            row_format=format_,
            rope_dim=spec.rope_dim,
        )
        moved = 2 * plan.workspace
        for declared, value in values:
            name = value.name if value is not None else None
            if name not in state and name not in fixed:
                count = math.prod(_size(dim, sizes) for dim in declared.dims)
                moved += count // sizes["D"] * row if declared.dtype == STATE else 4 * count
        names = [value.name or "" for _, value in values if value is not None and value.name in fixed]
        yield _Plugin(node.name or "", len(plan.launches), tuple(names), moved)


def _size(dim: int | str, sizes: dict[str, int]) -> int:
    return dim if isinstance(dim, int) else sum(int(sizes.get(part.strip(), part)) for part in dim.split("+"))
