"""Operators that read a whole compressed cache read it block by block, so a step's memory does not grow with the context.

The indexer's scores of every entry, [batch, chunk, heads, entries], are gigabytes at a million tokens; so are the logits
of HCA. From one block to the next it is enough to keep the k best so far, or the softmax's running maximum, sum and
accumulator (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"). A block fits in the processor's
cache, which also makes one decode step faster: a cache is read once and never copied.

The chosen entries are the same as without blocks, ties included: earlier choices come first, and TopK takes the first.
Attention differs only in the order of float32 sums. Packed rows are decoded block by block.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import FLOAT, INT32, INT64, script
from onnxscript import opset20 as op

from ...errors import FoldkvError
from ...export.contract.rows import DENSE, row_format_named
from ...export.memory import BLOCK_ROOM, block_rows
from ...export.operators.attention import (
    FoldkvQueryPositions,
    FoldkvScale,
    FoldkvSharedLogits,
    FoldkvSharedSum,
    FoldkvWindowKeys,
)
from ...export.operators.index import FoldkvVisibleEntries
from ...export.operators.registry import DOMAIN, OPSET
from ...export.operators.rope import FoldkvRope
from ...export.operators.window import FoldkvReadRows
from .functions import attach, attach_reader


@script(OPSET, default_opset=op)
def FoldkvBlockLength(q: FLOAT, room: int, least: int):  # type: ignore[no-untyped-def]
    # Rows of a block: as many as leave room for the scores of all queries and heads, and for the rows themselves.
    sizes = op.Shape(q)
    scores = sizes[0:1] * sizes[1:2] * sizes[2:3]
    width = sizes[3:4]
    length = op.Unsqueeze(op.Constant(value_int=1) * room, [0]) / op.Max(scores, width)
    return op.Max(length, op.Unsqueeze(op.Constant(value_int=1) * least, [0]))


@script(OPSET, default_opset=op)
def FoldkvActiveCount(entries: FLOAT, active_context: INT64, ratio: int):  # type: ignore[no-untyped-def]
    return op.Min(active_context / ratio, op.Shape(entries, start=1, end=2))


@script(OPSET, default_opset=op)
def FoldkvBlockScores(flat: FLOAT, heads: FLOAT, keys: FLOAT):  # type: ignore[no-untyped-def]
    # flat [B, S Hi, D], heads [B, S, 1, Hi], keys [B, N, D] -> [B, S, N]
    dots = op.Relu(op.MatMul(flat, op.Transpose(keys, perm=[0, 2, 1])))
    sizes = op.Concat(op.Shape(heads, start=0, end=2), op.Shape(heads, start=3, end=4), [-1], axis=0)
    return op.Squeeze(op.MatMul(heads, op.Reshape(dots, sizes)), [2])


@script(OPSET, default_opset=op)
def FoldkvKeepBest(best: FLOAT, chosen: INT64, scores: FLOAT, start: INT64, k: INT64):  # type: ignore[no-untyped-def]
    # Earlier choices come first, so the lowest index stays among equal scores.
    kept, place = op.TopK(op.Concat(best, scores, axis=-1), k, axis=-1)
    old = op.GatherElements(chosen, op.Min(place, k - 1), axis=-1)
    return kept, op.Where(place < k, old, place - k + start)


@script(OPSET, default_opset=op)
def FoldkvIndexSelectBlocks(  # type: ignore[no-untyped-def]
    q: FLOAT, weights: FLOAT, index_entries: FLOAT, positions: INT32, active_context: INT64, ratio: int, topk: int, room: int,
    least: int,
):  # fmt: skip
    k = op.Unsqueeze(op.Constant(value_int=1) * topk, [0])
    active = FoldkvActiveCount(index_entries, active_context, ratio)
    visible = op.Min(op.Unsqueeze(FoldkvVisibleEntries(q, positions, ratio), [2]), active)
    flat = op.Reshape(q, op.Concat(op.Shape(q, start=0, end=1), [-1], op.Shape(q, start=3, end=4), axis=0))
    heads = op.Unsqueeze(weights, [2])
    block = FoldkvBlockLength(q, room, least)
    places = op.Concat(op.Shape(q, start=0, end=2), k, axis=0)
    best = op.Expand(op.Constant(value_float=float("-inf")), places)
    chosen = op.Expand(op.Constant(value_int=-1), places)
    # First the entries that every query may choose: they need no mask, and are nearly all of a long context.
    whole = op.Reshape(op.ReduceMin(visible), [1])
    for i in range(op.Squeeze((whole + block - 1) / block)):
        start = i * block
        keys = FoldkvReadRows(op.Slice(index_entries, start, op.Min(start + block, whole), [1]))
        best, chosen = FoldkvKeepBest(best, chosen, FoldkvBlockScores(flat, heads, keys), start, k)
    for j in range(op.Squeeze((active - whole + block - 1) / block)):
        first = whole + j * block
        last = op.Min(first + block, active)
        some = FoldkvReadRows(op.Slice(index_entries, first, last, [1]))
        nth = op.Reshape(op.Range(op.Squeeze(first), op.Squeeze(last), op.Constant(value_int=1)), [1, 1, -1])
        scores = op.Where(nth < visible, FoldkvBlockScores(flat, heads, some), op.Constant(value_float=float("-inf")))
        best, chosen = FoldkvKeepBest(best, chosen, scores, first, k)
    return op.Cast(op.Where(chosen < visible, chosen, op.Constant(value_int=-1)), to=6)


@script(OPSET, default_opset=op)
def FoldkvBlockLogits(scaled: FLOAT, rows: FLOAT):  # type: ignore[no-untyped-def]
    # scaled [B, S, H, D], rows [B, N, D] -> [B, S, H, N]
    flat = op.Reshape(
        scaled, op.Concat(op.Shape(scaled, start=0, end=1), [-1], op.Shape(scaled, start=3, end=4), axis=0)
    )
    dots = op.MatMul(flat, op.Transpose(rows, perm=[0, 2, 1]))
    return op.Reshape(dots, op.Concat(op.Shape(scaled, start=0, end=3), [-1], axis=0))


@script(OPSET, default_opset=op)
def FoldkvAbsorb(top: FLOAT, total: FLOAT, sum: FLOAT, logits: FLOAT, rows: FLOAT):  # type: ignore[no-untyped-def]
    # One step of the softmax: running maximum and denominator [B, S, H, 1], numerator [B, S, H, D].
    higher = op.Max(top, op.ReduceMax(logits, [-1], keepdims=1))
    parts = op.Exp(logits - higher)
    shrink = op.Exp(top - higher)
    return (
        higher,
        total * shrink + op.ReduceSum(parts, [-1], keepdims=1),
        sum * shrink + FoldkvSharedSum(parts, rows),
    )


@script(OPSET, default_opset=op)
def FoldkvDenseAttentionBlocks(  # type: ignore[no-untyped-def]
    q: FLOAT, rows: FLOAT, entries: FLOAT, sinks: FLOAT, inv_freq: FLOAT, positions: INT32, num_tokens: INT32,
    active_context: INT64, ratio: int, room: int, least: int,
):  # fmt: skip
    keys, seen = FoldkvWindowKeys(q, rows, positions, num_tokens)
    scaled = FoldkvScale(q)
    near = FoldkvSharedLogits(scaled, keys, seen)
    sink = op.Reshape(sinks, [1, 1, -1, 1])
    # The sink is finite, so the maximum is finite too, whatever is masked.
    top = op.Max(op.ReduceMax(near, [-1], keepdims=1), sink)
    parts = op.Exp(near - top)
    total = op.ReduceSum(parts, [-1], keepdims=1) + op.Exp(sink - top)
    sum = FoldkvSharedSum(parts, keys)
    active = FoldkvActiveCount(entries, active_context, ratio)
    closed = op.Unsqueeze((op.Cast(positions, to=7) + op.Cast(num_tokens, to=7)) / ratio, [1])
    limit = op.Min(op.Min(FoldkvVisibleEntries(q, positions, ratio), closed), active)
    block = FoldkvBlockLength(q, room, least)
    # First the entries that every query sees: they are written, so they need neither a mask nor a guard against stale memory.
    whole = op.Reshape(op.ReduceMin(limit), [1])
    limit = op.Unsqueeze(limit, [2, 3])
    for i in range(op.Squeeze((whole + block - 1) / block)):
        start = i * block
        part = FoldkvReadRows(op.Slice(entries, start, op.Min(start + block, whole), [1]))
        top, total, sum = FoldkvAbsorb(top, total, sum, FoldkvBlockLogits(scaled, part), part)
    for j in range(op.Squeeze((active - whole + block - 1) / block)):
        first = whole + j * block
        last = op.Min(first + block, active)
        nth = op.Range(op.Squeeze(first), op.Squeeze(last), op.Constant(value_int=1))
        written = op.Unsqueeze(op.Unsqueeze(nth, [0]) < closed, [2])
        some = op.Where(written, FoldkvReadRows(op.Slice(entries, first, last, [1])), 0.0)
        logits = FoldkvSharedLogits(scaled, some, op.Reshape(nth, [1, 1, 1, -1]) < limit)
        top, total, sum = FoldkvAbsorb(top, total, sum, logits, some)
    return FoldkvRope(sum / total, FoldkvQueryPositions(q, positions), inv_freq, inverse=1)


def read_in_blocks(model: ir.Model, *, room: int = BLOCK_ROOM) -> int:
    """Let nodes that read whole caches read blocks instead, in place, also in layers' functions; returns how many.

    A node with packed rows has the attributes ``row_format`` (optimize/passes/pack.py), ``width`` and ``rope_dim``.

    Args:
        model: with the operators' nodes.
        room: elements of a block of scores, and of a block of rows.

    Raises:
        FoldkvError: the scores are not used by exactly one selection, which would be an internal fault.
    """
    count = 0
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    for node in [node for graph in graphs for node in graph if node.domain == DOMAIN]:
        if node.op_type == "FoldkvIndexScores":
            users = [user for user, _ in node.outputs[0].uses()]
            if [user.op_type for user in users] != ["FoldkvIndexSelect"]:
                raise FoldkvError(f"the scores of {node.name} are used by {users}. Report this as a fault of foldkv.")
            topk = users[0].attributes["topk"].value
            attributes = {"topk": topk, "least": block_rows(topk), "room": room}
            _replace(model, users[0], node, FoldkvIndexSelectBlocks, attributes)
            _graph(node).remove(node, safe=True)
        elif node.op_type == "FoldkvDenseAttention":
            _replace(model, node, node, FoldkvDenseAttentionBlocks, {"least": block_rows(0), "room": room})
        else:
            continue
        count += 1
    return count


def _replace(model: ir.Model, old: ir.Node, reader: ir.Node, function: Any, attributes: dict[str, int]) -> None:
    """Replace ``old`` by a node that takes the inputs of ``reader``."""
    attributes = {"ratio": reader.attributes["ratio"].value} | attributes
    new = ir.node(function.name, reader.inputs, attributes=attributes, domain=DOMAIN, name=f"{old.name}_blocks")
    value, out, graph = new.outputs[0], old.outputs[0], _graph(old)
    value.name, value.dtype, value.shape = out.name, out.dtype, out.shape
    graph.insert_before(old, new)
    ir.convenience.replace_all_uses_with(out, value, replace_graph_outputs=True)
    graph.remove(old, safe=True)
    given = reader.attributes
    format_ = given["row_format"].value if "row_format" in given else DENSE  # injected nodes have it for dense rows too
    if (DOMAIN, function.name, "") in model.functions:
        return
    if row_format_named(format_).packed:
        attach_reader(model, function, format_, given["width"].value, given["rope_dim"].value)
    else:
        attach(model, function)


def _graph(node: ir.Node) -> ir.Graph:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    return graph
