"""Bodies of operators in a graph: added with their helpers, or as variants that read or write packed rows.

A body reads rows through ``FoldkvReadRows`` and rounds what it writes through the ``quantize`` body of a row format. A
variant calls the format's decoder or packer instead, so no operator needs a second body for packed rows.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from ...export.contract.rows import row_format_named
from ...export.operators.registry import DOMAIN
from ...export.operators.row_formats import body_attributes, row_bodies
from ...export.operators.window import FoldkvReadRows


def attach(model: ir.Model, function: Any, name: str = "") -> ir.Function:
    """Add the body of an operator, under another name if one is given, and of the helpers that it calls; returns it."""
    identifier = (DOMAIN, name or function.name, "")
    if identifier not in model.functions:
        proto = function.to_function_proto()
        proto.name = identifier[1]
        model.functions[identifier] = ir.serde.deserialize_function(proto)
        for called in function.function_ir.get_called_functions().values():
            attach(model, called)
    return model.functions[identifier]


def attach_reader(
    model: ir.Model, function: Any, format_: str, width: int, rope_dim: int, *, name: str = ""
) -> ir.Function:
    """Add a body that reads packed rows.

    Args:
        model: gets the function.
        function: reads dense rows, through ``FoldkvReadRows``.
        format_: name of the row format.
        width: channels of a row.
        rope_dim: channels among them that RoPE turned.
        name: of the variant; the default is the function's own.

    Raises:
        InputError: graphs cannot read the format.
    """
    attributes = {"width": width} | body_attributes(row_format_named(format_), rope_dim)
    return _attach_calling(model, function, name, FoldkvReadRows.name, row_bodies(format_).unpack, attributes)


def attach_writer(model: ir.Model, function: Any, format_: str, *, name: str) -> ir.Function:
    """Add a body that writes packed rows; ``function`` writes their values. See :func:`attach_reader`."""
    bodies = row_bodies(format_)
    return _attach_calling(model, function, name, bodies.quantize.name, bodies.pack, {})


def _attach_calling(
    model: ir.Model, function: Any, name: str, old: str, new: Any, attributes: dict[str, int]
) -> ir.Function:
    """Add a body under a name, with its calls of ``old`` going to ``new``, with these attributes besides their own."""
    body = attach(model, function, name)
    attach(model, new)
    for node in ir.traversal.RecursiveGraphIterator(body.graph):
        if node.domain == DOMAIN and node.op_type == old:
            node.op_type = new.name
            node.attributes.update({key: ir.AttrInt64(key, value) for key, value in attributes.items()})
    return body
