"""Packed experts for a GPU: a whole matrix is decoded at once.

A processor decodes bands of a matrix that fit in its cache (operators/packed.py). On a GPU every band would be a dozen launches of
small kernels, while the decoded matrix of one expert is a few tens of MiB.
"""

from __future__ import annotations

import sys

import onnx_ir as ir

from ...export.operators import packed, packed_words
from ...export.operators.registry import DOMAIN


def decode_whole_experts(model: ir.Model) -> int:
    """Let the nodes of packed experts decode whole matrices, in place; returns how many nodes. Float32 scales keep their bands."""
    count = 0
    for node in model.graph:
        format_ = packed_words.format_of_node(node.op_type) if node.domain == DOMAIN else None
        if format_ is None:
            continue
        geometry = {key: value.as_ints() for key, value in node.attributes.items() if key != "limit"}
        body = packed.routed_experts(format_, packed_words.matrices_of(geometry), band=sys.maxsize)
        model.functions[node.op_identifier()] = ir.serde.deserialize_function(body)
        count += 1
    return count
