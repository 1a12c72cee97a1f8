"""Weights of a segment in the form in which the CPU reads them, declared per weight; the graph follows.

ONNX Runtime computes in float32. A weight that a checkpoint stores in another type is either converted in every step, or
*placed*: converted once, into a file of the bundle. Integers and float32 lie in the checkpoint's files as the graph takes
them, so nothing is placed. Experts as released stay packed: a step decodes those that it chose, and no others. Where a
file holds the experts of a layer at a regular distance, they are the rows of one tensor in that file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from ...export.contract.lock import Part, Weight
from ...export.operators import packed, packed_words
from ...export.operators.packed import Matrix
from ...export.operators.registry import DOMAIN

#: How the CPU gets a weight: from its place in the checkpoint's file, or placed by these steps.
IN_PLACE, JOINED, FLOAT32 = "in place", "joined", "float32"


@dataclass(frozen=True)
class Rows:
    """Experts as rows of a range of one file: [E, stride], the row of every expert, and where a row's matrices begin.

    ``starts`` are the offsets of w1, w2 and w3 within a row, in bytes.
    """

    file: str
    offset: int
    stride: int
    slots: tuple[int, ...]
    starts: tuple[int, ...]


def rows_of(weight: Weight, per_row: int, file_bytes: Mapping[str, int]) -> Rows | None:
    """The experts of a packed weight in place, or None if no file has them at a regular distance.

    Args:
        weight: [E, bytes]; its parts are those of the first expert, then those of the second, and so on.
        per_row: parts of an expert.
        file_bytes: size of every file.
    """
    if len({part.file for part in weight.parts}) != 1:
        return None
    rows = [weight.parts[at : at + per_row] for at in range(0, len(weight.parts), per_row)]
    begins = [min(part.offset for part in row) for row in rows]
    starts = tuple(part.offset - begins[0] for part in rows[0])
    if any(tuple(part.offset - begin for part in row) != starts for row, begin in zip(rows, begins, strict=True)):
        return None
    order = sorted(begins)
    extent = max(start + part.bytes for start, part in zip(starts, rows[0], strict=True))
    stride = order[1] - order[0] if len(order) > 1 else extent
    distances = {after - before for before, after in zip(order, order[1:], strict=False)}
    file = weight.parts[0].file
    if stride < extent or distances - {stride} or order[0] + len(order) * stride > file_bytes[file]:
        return None
    slot = {begin: number for number, begin in enumerate(order)}
    return Rows(file, order[0], stride, tuple(slot[begin] for begin in begins), starts)


def row_weight(weight: Weight, rows: Rows) -> Weight:
    """The rows as one weight of one part."""
    count = len(rows.slots)
    return Weight("I8", (count, rows.stride), (Part(rows.file, rows.offset, count * rows.stride),))


def take_float32(model: ir.Model, role: str) -> None:
    """Let a segment take a weight in float32, and not convert it itself; in place."""
    graph = model.graph
    stored = next(value for value in graph.inputs if value.name == role)
    at = list(graph.inputs).index(stored)
    value = next((v for node in graph for v in node.outputs if v.name == f"{role}.value"), None)
    shape = stored.shape if value is None else value.shape
    wide = ir.Value(name=role, type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
    graph.inputs[at] = wide
    stored.name = f"{role}.stored"
    if value is None:  # the experts' operator reads any type, and an embedding is converted after its look-up
        ir.convenience.replace_all_uses_with(stored, wide)
        return
    node = value.producer()
    assert node is not None
    ir.convenience.replace_all_uses_with(value, wide)
    pending: list[ir.Node | None] = [node]
    while pending:
        dead = pending.pop()
        if dead is None or dead.graph is None or any(out.uses() for out in dead.outputs):
            continue
        before = [value.producer() for value in dead.inputs if value is not None]
        graph.remove(dead, safe=True)
        pending += before


def take_rows(model: ir.Model, role: str, codes: Rows, scales: Rows) -> None:
    """Let a segment's experts read rows of a file in place; it then takes the row of every expert as ``{role}.slots``."""
    graph = model.graph
    node = next(node for node in graph if node.domain == DOMAIN and packed_words.format_of_node(node.op_type))
    inputs = {value.name: value for value in graph.inputs}
    for name, rows in ((f"{role}.codes", codes), (f"{role}.scales", scales)):
        inputs[name].shape = ir.Shape([len(rows.slots), rows.stride])
    table = graph.initializers.pop(f"{role}.slots")
    slots = ir.Value(name=f"{role}.slots", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([len(codes.slots)]))
    table.name = f"{role}.identity"
    ir.convenience.replace_all_uses_with(table, slots)
    graph.inputs.append(slots)
    attributes = {key: value.as_ints() for key, value in node.attributes.items() if key != "limit"}
    old = packed_words.matrices_of(attributes)
    matrices: dict[str, Matrix] = {
        part: replace(old[part], codes=codes.starts[at], scales=scales.starts[at]) for at, part in enumerate(packed.PARTS)
    }
    for key, values in packed_words.geometry(matrices).items():
        node.attributes[key] = ir.AttrInt64s(key, values)
    format_ = packed_words.format_of_node(node.op_type)
    assert format_ is not None
    body = packed.routed_experts(format_, matrices)
    model.functions[DOMAIN, node.op_type, ""] = ir.serde.deserialize_function(body)
