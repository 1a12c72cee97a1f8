"""The bundle of a package for ONNX Runtime: its segments in the form that runs fastest, and every weight where it is read.

A weight that the graph takes as it is stored stays in the checkpoint's files. What is needed in another form is
*placed*: written once, in that form, into a file of the bundle (optimize/passes/place.py says which and why). Segments for a GPU
are those for the cpu, except that a GPU decodes a whole matrix of an expert at once, and that every node must have a kernel there.

Segments for the cpu have a second form where it is faster: experts in e2m1 as stacks (optimize/passes/stack_experts.py), and
the matrices of a large model in bfloat16, in blocks of rows (optimize/passes/row_blocks.py). The runtime makes what no file of the
checkpoint has in that form, once for all bundles of a checkpoint, and then runs it. Then nothing large is placed. If there are such matrices,
a third form takes them whole, in float32, for machines whose memory holds that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir
import torch

from ..errors import BuildError
from ..export.checkpoint.formats import FP8, Format
from ..export.checkpoint.names import scale_name
from ..export.checkpoint.values import dequantised
from ..export.contract.chain import CHAIN, PLACED, Bound, Call, ChainTable, Stacked
from ..export.contract.layouts import DENSE
from ..export.contract.lock import Weight
from ..export.contract.products import all_products
from ..export.contract.stacks import SMALL, Decoded, RowBlocks
from ..export.contract.state import StateTensor
from ..export.contract.weights import EXPERTS
from ..export.in_place import Rows, in_place_rows, row_weight, take_rows
from ..export.package import FOLDER, Package
from ..export.roles import DTYPE_NAMES, onnx_dtype
from ..export.segments import STEP, STEP_INPUTS, Segment
from ..export.stitch import read_parts
from ..progress import BYTES, Progress, Say, silent
from .cuda_kernels import check_kernels
from .passes.byte_kernels import use_byte_kernels
from .passes.cpu import optimize_for_cpu
from .passes.hoist import hoist
from .passes.pack import pack_state
from .passes.place import take_float32
from .passes.row_blocks import row_blocks, take_row_blocks
from .passes.stack_experts import stack_experts
from .passes.transposes import fuse_transposes
from .passes.whole_experts import decode_whole_experts

_ALIGNMENT = 64
_NARROW = ("BF16", "F16")
#: How a segment takes packed experts, if not as stacks.
_PACKED = (f"{EXPERTS}.codes", f"{EXPERTS}.scales", f"{EXPERTS}.slots")


@dataclass
class Placement:
    """What a segment takes in another form than stored: roles in float32; in its second form, roles in blocks of rows; and rows of
    experts in place, by call."""

    widened: set[str] = field(default_factory=set)
    blocks: dict[str, RowBlocks] = field(default_factory=dict)
    rows: dict[str, tuple[Rows, Rows]] = field(default_factory=dict)


def placement(package: Package, name: str, *, place: bool = True, stack: bool = False) -> Placement:
    """How ONNX Runtime takes the weights of one segment, for all of its calls.

    Args:
        package: the package.
        name: of the segment.
        place: whether weights may be converted once; if not, a step converts them.
        stack: whether the segment may have a second form.
    """
    owners = [owner for owner, segment in package.calls() if segment == name]
    found = Placement()
    first = package.lock.weights[owners[0]]
    groups = _groups_of_large(package) if stack else {}
    for role, weight in first.items():
        matrix = weight.dtype == "F8_E4M3" and scale_name(role) in first
        small = len(weight.shape) == 1  # vectors take no room, and norms are one node only with a float32 weight
        if role == "embed.weight" or not (place or small) or not (weight.dtype in _NARROW or matrix):
            continue
        if role in groups and (not matrix or first[scale_name(role)].dtype == "F8_E8M0"):
            rows, columns = weight.shape
            found.blocks[role] = row_blocks(rows, columns, groups[role])
        else:
            found.widened.add(role)
    found.rows = in_place_rows(package.lock, owners, EXPERTS)
    return found


def _groups_of_large(package: Package) -> dict[str, int]:
    """The matrices of products and the groups of their rows, if these take more than ``SMALL`` bytes in float32; else nothing."""
    groups = {product.role: product.groups for product in all_products(package.spec)}
    weights = [(role, one) for owner, _ in package.calls() for role, one in package.lock.weights[owner].items()]
    total = sum(4 * prod(weight.shape) for role, weight in weights if role in groups and weight.dtype != "F32")
    return groups if total > SMALL else {}


def write_chain(
    package: Package,
    files: Mapping[str, Path],
    out: Path,
    *,
    layout: str = DENSE,
    rope_dim: int = 0,
    place: bool = True,
    stack: bool = False,
    gpu: bool = False,
    progress: Say = silent,
) -> tuple[list[StateTensor], dict[str, dict[str, int]], dict[str, str]]:
    """Write the segments, the table of the chain and the placed weights of a bundle.

    Args:
        package: the graph package.
        files: path of every file of the lock.
        out: folder of the bundle.
        layout: name of the cache layout.
        rope_dim: rotated channels of a row, for packed layouts.
        place: convert weights once, into the bundle; else the segments convert them in every step.
        stack: also write the second form of the segments that have one, and the third.
        gpu: whether a GPU computes the segments.
        progress: called with one line per step; a :class:`~foldkv.progress.Progress` learns more.

    Returns:
        The state as the bundle keeps it, nodes of every segment ("inlined" and "optimized"), and the sha256 of the files
        that were hashed as they were written.

    Raises:
        BuildError: a step tensor has no fixed shape, or a node no kernel for the GPU, which would be an internal fault.
        SystemFailure: the disk is full or cannot be written.
    """
    report = Progress.of(progress)
    names = list(package.manifest.segments)
    placements = {name: placement(package, name, place=place, stack=stack) for name in names if name != STEP}
    report("optimizing the segments")
    models: dict[str, ir.Model] = {}
    nodes: dict[str, dict[str, int]] = {}
    states: dict[int, list[StateTensor]] = {}
    stacked: dict[str, Stacked] = {}
    for number, name in enumerate(names):
        report.steps(number, len(names), "segments")
        segment = package.segment(name)
        packed = _prepare(package, segment, placements.get(name), layout, rope_dim)
        for layer, kind in enumerate(package.layers):
            if kind == name:
                states[layer] = packed
        if gpu:
            decode_whole_experts(segment.model)
        nodes[name] = {"inlined": optimize_for_cpu(segment.model)}
        models[name] = segment.model
        second = _second(package, name, placements.get(name), layout, rope_dim) if stack else None
        if second is not None:
            forms, stacked[name] = second
            for key, model in forms.items():
                models[key] = model
                nodes[key] = {"inlined": optimize_for_cpu(model)}
    _share_step(models)
    for model in models.values():
        if gpu:
            use_byte_kernels(model)
        else:
            fuse_transposes(model)
    if gpu:
        check_kernels(models)
    (out / FOLDER).mkdir()
    for name, model in models.items():
        nodes[name]["optimized"] = len(model.graph)
        ir.save(model, out / FOLDER / f"{name}.onnx")
    writer = _Placed(package, files, placements, report)
    weights = writer.write(out / PLACED)
    table = ChainTable(
        {name: f"{FOLDER}/{name}.onnx" for name in names},
        tuple(Call(owner, name) for owner, name in package.calls()),
        weights,
        stacked,
        package.spec.chosen_parameters,
    )
    table.write(out / CHAIN)
    return _state(package, states), nodes, writer.digests


def _second(
    package: Package, name: str, placed: Placement | None, layout: str, rope_dim: int
) -> tuple[dict[str, ir.Model], Stacked] | None:
    """The second form of a segment, and the third, by name, and what they take; None if there is none."""
    if placed is None:
        return None
    segment = package.segment(name)
    experts = stack_experts(segment.model, EXPERTS)
    if not experts and not placed.blocks:
        return None
    decoded = {role: one for role in placed.blocks if (one := _decoded(segment.model, role)) is not None}
    for role, blocks in placed.blocks.items():
        stored = next(value.dtype for value in segment.model.graph.inputs if value.name == role)
        assert stored is not None
        take_row_blocks(segment.model, role, blocks, ir.DataType.BFLOAT16 if role in decoded else stored)
    others = replace(placed, rows={}) if experts else placed
    _prepare(package, segment, others, layout, rope_dim)
    forms = {f"{name}.stacked": segment.model}
    if placed.blocks:
        third = package.segment(name)
        stack_experts(third.model, EXPERTS)
        _prepare(package, third, replace(others, widened=placed.widened | placed.blocks.keys()), layout, rope_dim)
        forms[f"{name}.wide"] = third.model
    dropped = [*(_PACKED if experts else ()), *decoded, *(one.scale for one in decoded.values())]
    form = Stacked(
        f"{FOLDER}/{name}.stacked.onnx", {**experts, **decoded}, tuple(dropped), placed.blocks,
        f"{FOLDER}/{name}.wide.onnx" if placed.blocks else "",
    )  # fmt: skip
    return forms, form


def _decoded(model: ir.Model, role: str) -> Decoded | None:
    """An e4m3 matrix as the second form takes it; None for one of another type."""
    node = next((node for node in model.graph if node.name == f"{role}.scaled"), None)
    if node is None:
        return None
    value = node.outputs[0]
    assert value.shape is not None
    rows, columns = (int(size) for size in value.shape)
    return Decoded(role, scale_name(role), _scaled_block(node), (rows, columns))


def _scaled_block(node: ir.Node) -> tuple[int, int]:
    """Rows and columns that share a scale, of a node that scales a matrix."""
    blocks = node.attributes["blocks"].as_ints()
    return int(blocks[1]), int(blocks[3])


def _prepare(
    package: Package, segment: Segment, placed: Placement | None, layout: str, rope_dim: int
) -> list[StateTensor]:
    """Let a segment take its weights and its state in the form that the bundle has; returns its state."""
    if placed is None:
        return []
    for role in sorted(placed.widened):
        take_float32(segment.model, role)
    if placed.rows:
        take_rows(segment.model, EXPERTS, *next(iter(placed.rows.values())))
    if segment.name not in package.layers:
        return []
    own = package.own_state(segment.name)
    return own if layout == DENSE else pack_state(segment.model, own, layout, rope_dim)


def _state(package: Package, states: Mapping[int, list[StateTensor]]) -> list[StateTensor]:
    """The state of the whole model as the bundle keeps it, under the names of the package."""
    found = []
    for layer in range(len(package.layers)):
        for row, kept in zip(package.state_of(layer), states[layer], strict=True):
            found.append(StateTensor(**row.to_dict() | {"width": kept.width, "dtype": kept.dtype}))
    return found


def _share_step(models: dict[str, ir.Model]) -> None:
    step = models[STEP]
    have = {value.name for value in step.graph.inputs}
    types = {"num_tokens": (ir.DataType.INT32, ["batch"]), "active_context": (ir.DataType.INT64, [1])}
    for name, (dtype, shape) in types.items():
        if name not in have:
            step.graph.inputs.append(ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape)))
    kinds = {name: model for name, model in models.items() if any(v.name == "streams" for v in model.graph.inputs)}
    layers = {name: model for name, model in kinds.items() if any(v.name == "after" for v in model.graph.outputs)}
    hoist(step, layers, STEP_INPUTS)
    for value in step.graph.outputs:
        if value.shape is None:
            raise BuildError(f"the step's tensor {value.name} has no shape. Report this as a fault of foldkv.")


class _Placed:
    """Writes the placed weights of a bundle one after the other, and says where every weight lies."""

    def __init__(
        self, package: Package, files: Mapping[str, Path], placements: Mapping[str, Placement], progress: Progress
    ) -> None:
        self._package, self._files, self._placements, self._progress = package, files, placements, progress
        self.digests: dict[str, str] = {}
        self._at = 0
        self._blocks: dict[tuple[str, str], tuple[int, int]] = {}

    def write(self, path: Path) -> dict[str, dict[str, Bound]]:
        """Write the file, unless nothing is placed; returns where every weight of every call lies."""
        total = sum(self._size(owner, name, role) for owner, name, role in self._roles())
        if total:
            self._progress(f"placing {total / 2**20:.0f} MiB of weights in float32 or in another order")
        weights: dict[str, dict[str, Bound]] = {owner: {} for owner, _ in self._package.calls()}
        digest = hashlib.sha256()
        with path.open("wb") as out:

            def add(data: Any) -> None:
                out.write(data)
                digest.update(data)
                self._at += len(data)
                self._progress.steps(min(self._at, total), total, BYTES)

            for owner, name, role in self._roles():
                weights[owner] |= self._place(owner, name, role, add, out)
        if self._at:
            self.digests[path.name] = digest.hexdigest()
        else:
            path.unlink()
        return weights

    def _roles(self) -> Iterator[tuple[str, str, str]]:
        for owner, name in self._package.calls():
            for role in self._package.lock.weights[owner]:
                yield owner, name, role

    def _in_place(self, weight: Weight) -> bool:
        [first, *others] = weight.parts
        return not others and first.offset % max(1, onnx_dtype(weight).itemsize) == 0

    def _size(self, owner: str, name: str, role: str) -> int:
        weight, placed = self._package.lock.weights[owner][role], self._placements[name]
        if role in placed.widened:
            return 4 * int(np.prod(weight.shape))
        if placed.rows and role in (f"{EXPERTS}.codes", f"{EXPERTS}.scales"):
            return 0
        return 0 if self._in_place(weight) or self._dropped(owner, role, placed) else weight.bytes

    def _dropped(self, owner: str, role: str, placed: Placement) -> bool:
        """Whether a role is the scale of a matrix that is placed without it."""
        return any(scale_name(wide) == role and wide != role for wide in placed.widened)

    def _place(self, owner: str, name: str, role: str, add: Any, out: BinaryIO) -> dict[str, Bound]:
        weight, placed = self._package.lock.weights[owner][role], self._placements[name]
        dtype = DTYPE_NAMES[onnx_dtype(weight)]
        if self._dropped(owner, role, placed):
            return {}
        if placed.rows and role in (f"{EXPERTS}.codes", f"{EXPERTS}.scales"):
            rows = placed.rows[owner][role.endswith(".scales")]
            found = {role: self._bound(row_weight(weight, rows), "int8")}
            if role.endswith(".codes"):
                slots = np.array(rows.slots, np.int64)
                found[f"{EXPERTS}.slots"] = self._written(slots.tobytes(), "int64", slots.shape, add)
            return found
        if role in placed.widened:
            return {role: self._widened(owner, role, weight, add)}
        if self._in_place(weight):
            return {role: self._bound(weight, dtype)}
        return {role: self._written(read_parts(weight, self._files), dtype, weight.shape, add)}

    def _bound(self, weight: Weight, dtype: str) -> Bound:
        [part] = weight.parts
        return Bound(part.file, False, part.offset, dtype, weight.shape)

    def _written(self, data: Any, dtype: str, shape: tuple[int, ...], add: Any) -> Bound:
        add(bytes(-self._at % _ALIGNMENT))
        bound = Bound(PLACED, True, self._at, dtype, tuple(shape))
        add(data)
        return bound

    def _widened(self, owner: str, role: str, weight: Weight, add: Any) -> Bound:
        """Write a weight in float32, a part at a time; the values are exact."""
        add(bytes(-self._at % _ALIGNMENT))
        bound = Bound(PLACED, True, self._at, "float32", weight.shape)
        if weight.dtype == "F8_E4M3":
            scale = self._package.lock.weights[owner][scale_name(role)]
            block = self._block(owner, role)
            codes = torch.frombuffer(read_parts(weight, self._files), dtype=torch.float8_e4m3fn).reshape(weight.shape)
            kind = torch.float32 if scale.dtype == "F32" else torch.float8_e8m0fnu
            factors = torch.frombuffer(read_parts(scale, self._files), dtype=kind).reshape(scale.shape)
            add(dequantised(codes, factors, Format(FP8, block)).numpy().tobytes())
            return bound
        for part in weight.parts:
            data = read_parts(Weight("U8", (part.bytes,), (part,)), self._files)
            kind = torch.bfloat16 if weight.dtype == "BF16" else torch.float16
            add(torch.frombuffer(data, dtype=kind).to(torch.float32).numpy().tobytes())
        return bound

    def _block(self, owner: str, role: str) -> tuple[int, int]:
        """Rows and columns that share a scale: what the package's graph says, which has it from config.json."""
        name = dict(self._package.calls())[owner]
        if (name, role) not in self._blocks:
            for node in self._package.segment(name).model.graph:
                if (node.name or "").endswith(".scaled"):
                    self._blocks[name, (node.name or "").removesuffix(".scaled")] = _scaled_block(node)
        if (name, role) in self._blocks:
            return self._blocks[name, role]
        raise BuildError(f"the segment {name} does not say which elements of {role} share a scale. Export it again.")
