"""Where the graph of a segment multiplies with a weight, for passes that put something else in the place of the product."""

from __future__ import annotations

import onnx_ir as ir

from ...errors import BuildError

_TRANSPOSED = {2: [1, 0], 3: [0, 2, 1]}  # a weight's axes, before a product
#: Tokens and groups exchanged.
GROUPED = [1, 0, 2]


def product_of(value: ir.Value, groups: int, name: str) -> ir.Node:
    """The product with a weight.

    Args:
        value: the weight's values in float32 [rows, columns].
        groups: of rows, each with its own part of the activations: then both are tensors of groups.
        name: of the weight, for the error.

    Raises:
        BuildError: the weight is not used as in a product.
    """
    uses = list(value.uses())
    if groups > 1 and len(uses) == 1 and uses[0].node.op_type == "Reshape":
        uses = list(uses[0].node.outputs[0].uses())
    rank = 3 if groups > 1 else 2
    if len(uses) == 1 and permutation(uses[0].node) == _TRANSPOSED[rank]:
        uses = list(uses[0].node.outputs[0].uses())
        wanted = "MatMul"
    else:
        wanted = "Gemm"
    if len(uses) != 1 or uses[0].idx != 1 or uses[0].node.op_type != wanted:
        found = ", ".join(sorted({use.node.op_type for use in uses})) or "nothing"
        raise BuildError(f"weight {name} is used by {found}; expected one product. Report this as a fault of foldkv.")
    return uses[0].node


def permutation(node: ir.Node) -> list[int]:
    """The axes of a Transpose; nothing for other nodes."""
    return list(node.attributes["perm"].as_ints()) if node.op_type == "Transpose" else []


def remove_unused(node: ir.Node | None) -> None:
    """Remove a node that nothing uses, and those before it that only it used."""
    pending = [node]
    while pending:
        dead = pending.pop()
        if dead is None or dead.graph is None or any(out.uses() for out in dead.outputs):
            continue
        before = [value.producer() for value in dead.inputs if value is not None]
        dead.graph.remove(dead, safe=True)
        pending += before
