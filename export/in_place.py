"""Experts in place: where a file holds the experts of a layer at a regular distance, they are rows of one tensor there.

A segment takes the experts' codes as ``[E, bytes]``, each row w1, w2, w3. Files have the same matrices with others in
between. If the distance from one expert to the next is the same for all, a row can be that long, and the matrices begin
where they begin in the file: nothing is copied.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from .contract.lock import Part, Weight, WeightsLock
from .operators import packed, packed_words
from .operators.packed import Matrix
from .operators.registry import DOMAIN


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
    distances = {after - before for before, after in itertools.pairwise(order)}
    file = weight.parts[0].file
    if stride < extent or distances - {stride} or order[0] + len(order) * stride > file_bytes[file]:
        return None
    slot = {begin: number for number, begin in enumerate(order)}
    return Rows(file, order[0], stride, tuple(slot[begin] for begin in begins), starts)


def in_place_rows(lock: WeightsLock, owners: list[str], role: str) -> dict[str, tuple[Rows, Rows]]:
    """Codes and scales of the experts in place, by owner; nothing if the calls of a segment cannot all read them in one form.

    Args:
        lock: where the weights lie.
        owners: the calls of one segment.
        role: of the packed experts.
    """
    codes, scales = f"{role}.codes", f"{role}.scales"
    first = lock.weights[owners[0]]
    if codes not in first or first[scales].dtype != "I8":
        return {}
    sizes = {file: facts.bytes for file, facts in lock.files.items()}
    found: dict[str, tuple[Rows, Rows]] = {}
    for owner in owners:
        pair = [rows_of(lock.weights[owner][name], len(packed.PARTS), sizes) for name in (codes, scales)]
        if pair[0] is None or pair[1] is None or pair[0].slots != pair[1].slots:
            return {}
        found[owner] = (pair[0], pair[1])
    forms = {tuple((rows.stride, rows.starts) for rows in pair) for pair in found.values()}
    return found if len(forms) == 1 else {}


def row_weight(weight: Weight, rows: Rows) -> Weight:
    """The rows as one weight of one part."""
    count = len(rows.slots)
    return Weight("I8", (count, rows.stride), (Part(rows.file, rows.offset, count * rows.stride),))


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
        part: replace(old[part], codes=codes.starts[at], scales=scales.starts[at])
        for at, part in enumerate(packed.PARTS)
    }
    for key, values in packed_words.geometry(matrices).items():
        node.attributes[key] = ir.AttrInt64s(key, values)
    format_ = packed_words.format_of_node(node.op_type)
    assert format_ is not None
    body = packed.routed_experts(format_, matrices)
    model.functions[DOMAIN, node.op_type, ""] = ir.serde.deserialize_function(body)
