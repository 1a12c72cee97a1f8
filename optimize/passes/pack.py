"""Packed state for the graph of the profile ``served``: cache rows as bytes, in standard ONNX operators.

A served graph quantises a row before it writes it, so keeping the row's bytes instead changes no value: nodes that
quantised now pack, and nodes that read now decode. Only some rows are decoded: the window with the chunk, the chosen
entries, and the active rows of caches that a step reads as a whole (the index, and the entries of HCA). Nodes that touch
packed rows have ``row_format``, ``rope_dim`` and ``layout_version``, like injected ones (plugins/declarations.py).

What a node reads and writes is declared in export/contract/operators.py; what a format's bytes are, in its row format.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from ...errors import InputError
from ...export.contract.layouts import LAYOUTS
from ...export.contract.operators import BLOCKS, STATE, WINDOW, OperatorSpec, operator_specs
from ...export.contract.rows import row_format_named
from ...export.contract.state import StateTensor
from ...export.operators.registry import DOMAIN, operators
from ...export.operators.row_formats import body_attributes, row_bodies
from .functions import attach, attach_reader, attach_writer


def pack_state(model: ir.Model, state: Sequence[StateTensor], layout: str, rope_dim: int) -> list[StateTensor]:
    """Let a served graph keep its rows packed, in place; returns its state tensors.

    Args:
        model: as ``foldkv export --profile served`` wrote it.
        state: its state tensors, in order.
        layout: a layout of packed rows that a served graph supports (optimize/choices.py).
        rope_dim: channels of a main row that RoPE turns.

    Raises:
        InputError: graphs cannot read a format of the layout, or the graph does not compute its values.
    """
    packed = [LAYOUTS[layout].stored(tensor, rope_dim) for tensor in state]
    values = {value.name: value for value in (*model.graph.inputs, *model.graph.outputs)}
    for old, new in zip(state, packed, strict=True):
        if old == new:
            continue
        for name in (old.input, old.output):
            value = values[name]
            value.dtype = ir.DataType.INT8
            if value.shape is not None:
                value.shape = ir.Shape([*value.shape.dims[:-1], new.width])
    _Packer(model, state, layout, rope_dim).run()
    return packed


class _Packer:
    """Changes the nodes of one graph."""

    def __init__(self, model: ir.Model, state: Sequence[StateTensor], layout: str, rope_dim: int) -> None:
        self._model, self._graph, self._rope_dim = model, model.graph, rope_dim
        self._specs, self._operators = operator_specs(), operators()
        self._groups = {tensor.input: tensor.group for tensor in state}
        self._widths = {tensor.group: tensor.width for tensor in state}
        self._layout = LAYOUTS[layout]

    def run(self) -> None:
        """Change every operator that touches rows; values between operators have no declared type to change."""
        for node in list(self._graph):
            spec = self._specs.get(node.op_type) if node.domain == DOMAIN else None
            if spec is None or not spec.state:
                continue
            if spec.updates:
                self._write(node, spec)
            else:
                for index, tensor in enumerate(spec.inputs):
                    if tensor.dtype == STATE:
                        self._read(node, index, tensor.groups[0], tensor.read)

    def _format(self, group: str) -> str:
        """The name of a group's packed format, or "" if its rows are dense."""
        name = self._layout.format_of(group)
        return name if name is not None and row_format_named(name).packed else ""

    def _write(self, node: ir.Node, spec: OperatorSpec) -> None:
        [place] = [index for index, tensor in enumerate(spec.inputs) if tensor.dtype == STATE]
        state = node.inputs[place]
        assert state is not None
        format_ = self._format(self._groups[state.name or ""])
        if not format_:
            return
        if spec.rounds is not None:
            self._check(spec, format_)
            name = f"{node.op_type}Packed"
            attach_writer(self._model, self._operators[node.op_type].function, format_, name=name)
            self._rename(node, name, format_)
            return
        # It stores what another node has rounded.
        makers = [value.producer() for value in node.inputs if value is not None]
        known = [(maker, self._specs.get(maker.op_type)) for maker in makers if maker is not None]
        rounding = [(maker, declared) for maker, declared in known if declared is not None and declared.rounds]
        if len(rounding) != 1:
            raise InputError(
                f"{node.name} writes rows that nothing has rounded to {format_}. Export with --profile served."
            )
        [(maker, declared)] = rounding
        self._check(declared, format_)
        pack = row_bodies(format_).pack
        attach(self._model, pack)
        self._rename(maker, pack.name, format_)
        self._mark(node, format_)
        for value in node.outputs:
            _forget(value)

    @staticmethod
    def _check(spec: OperatorSpec, format_: str) -> None:
        if spec.rounds != format_:
            raise InputError(
                f"{spec.name} rounds to the values of {spec.rounds}, which rows in {format_} do not hold. "
                "Choose another layout."
            )

    def _read(self, node: ir.Node, index: int, group: str, how: str) -> None:
        format_, width = self._format(group), self._widths[group]
        if not format_:
            return
        if how == WINDOW:
            self._decode(node, index, format_, width)
        elif how == BLOCKS:  # optimize/passes/blocks.py lets it read blocks of rows, and decode each
            self._mark(node, format_)
            node.attributes["width"] = ir.AttrInt64("width", width)
        else:
            name = f"{node.op_type}Packed"
            function = self._operators[node.op_type].function
            attach_reader(self._model, function, format_, width, self._rope_dim, name=name)
            self._rename(node, name, format_)

    def _rename(self, node: ir.Node, op_type: str, format_: str) -> None:
        node.op_type = op_type
        for value in node.outputs:
            _forget(value)
        self._mark(node, format_)

    def _mark(self, node: ir.Node, format_: str) -> None:
        node.attributes["row_format"] = ir.AttrString("row_format", format_)
        node.attributes["rope_dim"] = ir.AttrInt64("rope_dim", self._rope_dim)
        node.attributes["layout_version"] = ir.AttrInt64("layout_version", row_format_named(format_).version)

    def _decode(self, node: ir.Node, index: int, format_: str, width: int) -> None:
        """Let a node read decoded rows instead."""
        rows, unpack = node.inputs[index], row_bodies(format_).unpack
        assert rows is not None
        attach(self._model, unpack)
        attributes = {"width": width} | body_attributes(row_format_named(format_), self._rope_dim)
        decode = ir.node(unpack.name, [rows], attributes=attributes, domain=DOMAIN, name=f"{node.name}_unpack_{index}")
        value = decode.outputs[0]
        value.name, value.dtype = f"{decode.name}_out", ir.DataType.FLOAT
        self._graph.insert_before(node, decode)
        node.replace_input_with(index, value)


def _forget(value: ir.Value) -> None:
    """Packed rows have a different type and width than declared; the caller declares the graph outputs again."""
    if not value.is_graph_output():
        value.dtype, value.shape = None, None
