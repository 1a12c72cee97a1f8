"""Packed e2m1 experts by ONNX Runtime's QMoE, which multiplies with them as they are, in float32.

It takes the experts of a layer as stacks (export/contract/stacks.py): codes and scales of all w1 and w3, whose rows alternate,
and of all w2. It chooses the k experts with the best scores, so the chosen ones get a score of 1 and the others 0: whoever chose
them, a router or a table, they are the k best. A token that a table sends twice to one expert weighs that expert by the sum;
QMoE then also computes one that nobody chose, and weighs it by 0.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...export.checkpoint.formats import FP4
from ...export.contract.stacks import Stack
from ...export.operators.packed import EXPERTS, PARTS, Matrix
from ...export.operators.packed_words import matrices_of
from ...export.operators.registry import DOMAIN

#: Values that share a scale, in a row: QMoE's block of e2m1. It takes whole blocks only.
BLOCK = 32
_DOMAIN = "com.microsoft"
_TYPES = {"uint8": ir.DataType.UINT8, "float8e8m0": ir.DataType.FLOAT8E8M0}


def stack_experts(model: ir.Model, role: str) -> dict[str, Stack]:
    """Let a segment take its routed experts as stacks, in place, if QMoE computes with their format.

    Args:
        model: of a segment whose weights are inputs, with the experts' operator still a node.
        role: of the packed experts.

    Returns:
        What the segment takes then instead of the packed experts, by role; nothing if it is unchanged.
    """
    graph = model.graph
    node = next((node for node in graph if (node.domain, node.op_type) == (DOMAIN, EXPERTS[FP4])), None)
    if node is None:
        return {}
    x, chosen, weights, codes, scales, slots = node.inputs
    assert x is not None and chosen is not None and weights is not None
    assert codes is not None and scales is not None and slots is not None and codes.shape is not None
    matrices = matrices_of({key: value.as_ints() for key, value in node.attributes.items() if key != "limit"})
    if any(not _whole_blocks(matrix) for matrix in matrices.values()):
        return {}
    stacks = _stacks(role, int(codes.shape[0]), matrices)
    taken = {}
    for name, stack in stacks.items():
        taken[name] = ir.Value(name=name, type=ir.TensorType(_TYPES[stack.dtype]), shape=ir.Shape(stack.shape))
        graph.inputs.append(taken[name])
    made = _moe(node, x, chosen, weights, list(taken.values()), graph)
    graph.insert_before(node, made)
    old, new = node.outputs[0], made[-1].outputs[0]
    new.name, new.shape, new.dtype = old.name, old.shape, old.dtype
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    for value in (codes, scales):
        graph.inputs.remove(value)
    graph.initializers.pop(slots.name or "")
    model.functions.pop((DOMAIN, EXPERTS[FP4], ""), None)
    model.opset_imports[_DOMAIN] = 1
    return stacks


def _whole_blocks(matrix: Matrix) -> bool:
    rows, columns = matrix.shape
    return columns % BLOCK == 0 and matrix.grid == (rows, columns // BLOCK)


def _stacks(role: str, experts: int, matrices: dict[str, Matrix]) -> dict[str, Stack]:
    found = {}
    for name, parts in (("w13", ("w1", "w3")), ("w2", ("w2",))):
        rows, columns = matrices[parts[0]].shape
        at = tuple(PARTS.index(part) for part in parts)
        for kind, dtype, width in (("codes", "uint8", columns // 2), ("scales", "float8e8m0", columns // BLOCK)):
            shape = (experts, rows * len(parts), width)
            found[f"{role}.{name}.{kind}"] = Stack(f"{role}.{kind}", at, dtype, shape)
    return found


def _moe(
    node: ir.Node, x: ir.Value, chosen: ir.Value, weights: ir.Value, taken: list[ir.Value], graph: ir.Graph
) -> list[ir.Node]:
    """The nodes from x [M, C], chosen [M, K] int64 and weights [M, K] to y [M, C]."""
    assert taken[0].shape is not None and chosen.shape is not None
    experts, topk = int(taken[0].shape[0]), chosen.shape[-1]
    assert isinstance(topk, int)
    made: list[ir.Node] = []

    def constant(name: str, array: np.ndarray) -> ir.Value:
        value = ir.Value(name=f"experts.{name}", const_value=ir.tensor(array, name=f"experts.{name}"))
        value.dtype, value.shape = ir.DataType(ir.tensor(array).dtype), ir.Shape(array.shape)
        graph.register_initializer(value)
        return value

    def add(name: str, op_type: str, inputs: list[ir.Value | None], domain: str = "", **attributes: object) -> ir.Value:
        made.append(ir.node(op_type, inputs, attributes, domain=domain, name=f"experts.{name}"))
        made[-1].outputs[0].name = f"experts.{name}"
        return made[-1].outputs[0]

    tokens = add("tokens", "Shape", [x], start=0, end=1)
    every = add("every", "Concat", [tokens, constant("count", np.array([experts]))], axis=0)
    none = add("none", "ConstantOfShape", [every])
    listed = add("listed", "Shape", [chosen])
    one = add("one", "ConstantOfShape", [listed], value=ir.tensor(np.ones(1, np.float32)))
    score = add("score", "ScatterElements", [none, chosen, one], axis=1)
    share = add("share", "ScatterElements", [none, chosen, weights], axis=1, reduction="add")
    ones = constant("ones", np.ones(experts, np.float32))  # a factor of every expert, which these formats do not have
    w13, w13_scales, w2, w2_scales = taken
    inputs = [x, score, w13, w13_scales, None, w2, w2_scales, *[None] * 7, share, ones, ones]
    add(
        "y", "QMoE", inputs, domain=_DOMAIN, k=topk, quant_type="fp4", expert_weight_bits=4, block_size=BLOCK,
        activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0,
        swiglu_limit=node.attributes["limit"].as_float(), normalize_routing_weights=0,
        weights_prepacked=1,  # the order above; with another value the kernel for processors refuses fp4
    )  # fmt: skip
    return made
