"""Products with a matrix that lies transposed, as one node: ONNX Runtime's FusedMatMul reads it where it is.

A segment's weights are inputs, so ONNX Runtime cannot transpose them once. It would fuse such nodes itself while a session is opened, with the
optimisations that the runtime leaves out because they take longer than the rest of opening (runtime/chain.py). Left apart, every step
writes a transposed copy of each matrix, which takes nine times as long as its product with one token.
"""

from __future__ import annotations

import onnx_ir as ir

from .products import permutation

_DOMAIN = "com.microsoft"


def fuse_transposes(model: ir.Model) -> int:
    """Let products read transposed matrices as they lie, in place, also in subgraphs; returns how many.

    MatMul(x, Transpose(w)) with the last two axes of w swapped becomes FusedMatMul(x, w). Values are float32.
    """
    fused = 0
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        if (node.domain, node.op_type) != ("", "MatMul"):
            continue
        right = node.inputs[1]
        swap = None if right is None else right.producer()
        if right is None or swap is None or not _swaps(swap) or right.dtype not in (None, ir.DataType.FLOAT):
            continue
        new = ir.node(
            "FusedMatMul", [node.inputs[0], swap.inputs[0]], {"transA": 0, "transB": 1, "alpha": 1.0},
            domain=_DOMAIN, name=node.name,
        )  # fmt: skip
        old, made = node.outputs[0], new.outputs[0]
        made.type, made.shape, made.name = old.type, old.shape, old.name
        assert node.graph is not None
        node.graph.insert_before(node, new)
        ir.convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)
        node.graph.remove(node, safe=True)
        if not right.uses() and not right.is_graph_output() and swap.graph is not None:
            swap.graph.remove(swap, safe=True)
        fused += 1
    if fused:
        model.graph.opset_imports[_DOMAIN] = 1
    return fused


def _swaps(node: ir.Node) -> bool:
    """Whether a node swaps the last two axes and nothing else."""
    perm = permutation(node)
    return len(perm) > 1 and perm == [*range(len(perm) - 2), len(perm) - 1, len(perm) - 2]
