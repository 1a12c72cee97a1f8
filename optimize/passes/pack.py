"""Packed state for the graph of the profile ``served``: cache rows as bytes, in standard ONNX operators.

A served graph quantises a row before it writes it, so keeping the row's bytes instead changes no value: nodes that
quantised now pack, and nodes that read now decode. Only some rows are decoded: the window with the chunk, the chosen
entries, and the active rows of caches that a step reads as a whole (the index, and the entries of HCA). Nodes that touch
packed rows have ``rows``, ``rotary`` and ``layout_version``, like injected ones (plugins/declarations.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir

from ...export.contract.layouts import DENSE, FP8_DS_MLA, INDEX_FP4, LAYOUT_VERSION, LAYOUTS, row_bytes
from ...export.contract.state import StateTensor
from ...export.operators.attention import FoldkvSparseAttentionFp8
from ...export.operators.compress import FoldkvCompressPackedFp4, FoldkvCompressPackedFp8
from ...export.operators.compress_online import FoldkvCompressOnlinePackedFp8
from ...export.operators.quantize import FoldkvPackFp8, FoldkvUnpackFp4, FoldkvUnpackFp8
from ...export.operators.registry import DOMAIN
from .blocks import attach

_ATTENTIONS = ("FoldkvWindowAttention", "FoldkvSparseAttention", "FoldkvDenseAttention")
_BODIES = (
    FoldkvCompressPackedFp8, FoldkvCompressPackedFp4, FoldkvCompressOnlinePackedFp8, FoldkvSparseAttentionFp8, FoldkvPackFp8, FoldkvUnpackFp8, FoldkvUnpackFp4,
)  # fmt: skip


def pack_state(model: ir.Model, state: Sequence[StateTensor], layout: str, rotary: int) -> list[StateTensor]:
    """Let a served graph keep its rows packed, in place; returns its state tensors.

    Args:
        model: as ``foldkv export --profile served`` wrote it.
        state: its state tensors, in order.
        layout: a layout of packed rows that a served graph supports (optimize/choices.py).
        rotary: channels of a main row that RoPE turns.
    """
    packed = [_packed(tensor, layout, rotary) for tensor in state]
    values = {value.name: value for value in (*model.graph.inputs, *model.graph.outputs)}
    widths: dict[str, int] = {}
    for old, new in zip(state, packed, strict=True):
        if old == new:
            continue
        widths[LAYOUTS[layout].format_of(old.group) or DENSE] = old.width
        for name in (old.input, old.output):
            value = values[name]
            value.dtype = ir.DataType.INT8
            if value.shape is not None:
                value.shape = ir.Shape([*value.shape.dims[:-1], new.width])
    _Packer(model, widths, rotary).run()
    for function in _BODIES:
        attach(model, function)
    return packed


def _packed(tensor: StateTensor, layout: str, rotary: int) -> StateTensor:
    format_ = LAYOUTS[layout].format_of(tensor.group)
    if format_ is None:
        return tensor
    return replace(tensor, dtype="int8", width=row_bytes(format_, tensor.width, rotary))


class _Packer:
    """Changes the nodes of one graph."""

    def __init__(self, model: ir.Model, widths: dict[str, int], rotary: int) -> None:
        self._graph, self._widths, self._rotary = model.graph, widths, rotary

    def run(self) -> None:
        """Change every operator that touches rows; values between operators have no declared type to change."""
        for node in list(self._graph):
            if node.domain != DOMAIN:
                continue
            if node.op_type == "FoldkvWindowUpdate":
                self._window(node)
            elif node.op_type == "FoldkvCompressFp8":
                self._rename(node, "FoldkvCompressPackedFp8", FP8_DS_MLA)
            elif node.op_type == "FoldkvCompressOnlineFp8":
                self._rename(node, "FoldkvCompressOnlinePackedFp8", FP8_DS_MLA)
            elif node.op_type == "FoldkvCompressFp4":
                self._rename(node, "FoldkvCompressPackedFp4", INDEX_FP4)
            elif node.op_type == "FoldkvIndexScores":
                self._read_blocks(node, INDEX_FP4)
            elif node.op_type in _ATTENTIONS:
                self._attention(node)

    def _window(self, node: ir.Node) -> None:
        quantize = node.inputs[1].producer() if node.inputs[1] is not None else None
        assert quantize is not None and quantize.op_type == "FoldkvQuantizeFp8"
        self._rename(quantize, "FoldkvPackFp8", FP8_DS_MLA)
        self._mark(node, FP8_DS_MLA)
        for value in (*quantize.outputs, *node.outputs):
            _forget(value)

    def _attention(self, node: ir.Node) -> None:
        self._read(node, 1, FP8_DS_MLA)
        if node.op_type == "FoldkvDenseAttention":
            self._read_blocks(node, FP8_DS_MLA)
        elif node.op_type == "FoldkvSparseAttention":
            node.attributes["width"] = ir.AttrInt64("width", self._widths[FP8_DS_MLA])
            self._rename(node, "FoldkvSparseAttentionFp8", FP8_DS_MLA)

    def _rename(self, node: ir.Node, op_type: str, format_: str) -> None:
        node.op_type = op_type
        for value in node.outputs:
            _forget(value)
        self._mark(node, format_)

    def _mark(self, node: ir.Node, format_: str) -> None:
        node.attributes["rows"] = ir.AttrString("rows", format_)
        node.attributes["rotary"] = ir.AttrInt64("rotary", self._rotary)
        node.attributes["layout_version"] = ir.AttrInt64("layout_version", LAYOUT_VERSION)

    def _read(self, node: ir.Node, index: int, format_: str) -> None:
        """Let a node read decoded rows instead."""
        rows = node.inputs[index]
        assert rows is not None
        attributes: dict[str, Any] = {"width": self._widths[format_]}
        if format_ == FP8_DS_MLA:
            attributes["rotary"] = self._rotary
        decode = ir.node(
            "FoldkvUnpackFp8" if format_ == FP8_DS_MLA else "FoldkvUnpackFp4", [rows], attributes=attributes, domain=DOMAIN,
            name=f"{node.name}_unpack_{index}",
        )  # fmt: skip
        self._insert(node, decode, ir.DataType.FLOAT)
        node.replace_input_with(index, decode.outputs[0])

    def _read_blocks(self, node: ir.Node, format_: str) -> None:
        """Tell a node that reads in blocks (optimize/passes/blocks.py) what it reads."""
        self._mark(node, format_)
        node.attributes["width"] = ir.AttrInt64("width", self._widths[format_])

    def _insert(self, before: ir.Node, node: ir.Node, dtype: ir.DataType) -> None:
        value = node.outputs[0]
        value.name, value.dtype = f"{node.name}_out", dtype
        self._graph.insert_before(before, node)


def _forget(value: ir.Value) -> None:
    """Packed rows have a different type and width than declared; the caller declares the graph outputs again."""
    if not value.is_graph_output():
        value.dtype, value.shape = None, None
