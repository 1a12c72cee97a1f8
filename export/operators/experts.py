"""FoldkvRoutedExperts: the chosen experts' clamped SwiGLU, weighted and summed.

Only the weights of chosen experts are read: the cost depends on ``tokens * experts_per_token``, not on the
number of experts. Gate and up projections are stacked as ``w13`` (transformers `gate_up_proj`).
The body gathers every token's weights at once, which works in every runtime. There are two other bodies. In
:func:`grouped_body`, for ONNX Runtime, a chunk's tokens share the weights. :func:`bounded_body`, for engines of models with
wide experts, gathers the weights of a few tokens at a time.
"""

from __future__ import annotations

import numpy as np
import onnx
import torch
from onnxscript import FLOAT, INT64, script
from onnxscript import opset20 as op
from torch import Tensor

from .grouped import CONSTANTS, clamped_swiglu, grouped_experts
from .packed import _function
from .registry import OPSET, operator


def _eager(x: Tensor, chosen: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, limit: float) -> Tensor:
    """x [T, C], chosen [T, K] int64, weights [T, K], w13 [E, 2I, C], w2 [E, C, I] -> [T, C] float32."""
    gate, up = torch.einsum("tkic,tc->tki", w13[chosen], x).chunk(2, dim=-1)
    hidden = torch.nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    return (torch.einsum("tkci,tki->tkc", w2[chosen], hidden) * weights[..., None]).sum(dim=1)


@script(OPSET, default_opset=op)
def FoldkvRoutedExperts(x: FLOAT, chosen: INT64, weights: FLOAT, w13: FLOAT, w2: FLOAT, limit: float):  # type: ignore[no-untyped-def]
    column = op.Unsqueeze(x, [1, 3])
    both = op.Cast(op.MatMul(op.Gather(w13, chosen, axis=0), op.CastLike(column, w13)), to=1)
    gate, up = op.Split(both, num_outputs=2, axis=2)
    gate = op.Min(gate, limit)
    hidden = gate * op.Sigmoid(gate) * op.Max(op.Min(up, limit), 0.0 - limit)
    down = op.Cast(op.MatMul(op.Gather(w2, chosen, axis=0), op.CastLike(hidden, w2)), to=1)
    return op.ReduceSum(op.Squeeze(down, [3]) * op.Unsqueeze(weights, [2]), [1], keepdims=0)


routed_experts = operator("FoldkvRoutedExperts", eager=_eager, function=FoldkvRoutedExperts)


def grouped_body() -> onnx.FunctionProto:
    """FoldkvRoutedExperts with the same inputs for ONNX Runtime: products in float32, whatever type the weights have.

    A chunk of T tokens gathers only the experts that it chose, one after the other, instead of T * K copies. A single token
    shares nothing: its experts are gathered at once, as in the other body, which starts fewer nodes.
    """
    grouped = grouped_experts(
        """
            w13_stored = Gather <axis = 0> (w13, expert)
            w13_one = Cast <to = 1> (w13_stored)
            both = MatMul (w13_one, columns)
            gate, up = Split <axis = 0, num_outputs = 2> (both)
        """,
        """
            w2_stored = Gather <axis = 0> (w2, expert)
            w2_one = Cast <to = 1> (w2_stored)
            down = MatMul (w2_one, hidden)
        """,
        table="w13",
        name="y_grouped",
    )
    body = f"""
        limit = Constant <value_float: float = @limit> ()
        low = Neg (limit)
        tokens_of_x = Shape <start = 0, end = 1> (x)
        number_of_tokens = Squeeze (tokens_of_x, first)
        is_single = Equal (number_of_tokens, one)
        y = If (is_single) <
            then_branch = single () => (float[T, C] y_single) {{
                column = Transpose <perm = [1, 0]> (x)
                own = Squeeze (chosen, first)
                own_w13_stored = Gather <axis = 0> (w13, own)
                own_w13 = Cast <to = 1> (own_w13_stored)
                own_both = MatMul (own_w13, column)
                own_gate, own_up = Split <axis = 1, num_outputs = 2> (own_both)
                {clamped_swiglu("own_")}
                own_w2_stored = Gather <axis = 0> (w2, own)
                own_w2 = Cast <to = 1> (own_w2_stored)
                own_down = MatMul (own_w2, own_hidden)
                own_rows = Squeeze (own_down, third)
                y_single = MatMul (weights, own_rows)
            }},
            else_branch = several () => (float[T, C] y_grouped) {{ {grouped} }}
        >
    """
    constants = CONSTANTS | {"one": np.array(1), "third": np.array([2])}
    return _function("FoldkvRoutedExperts", ["x", "chosen", "weights", "w13", "w2"], ["y"], ["limit"], body, constants)


def bounded_body(tokens: int) -> onnx.FunctionProto:
    """FoldkvRoutedExperts with the same inputs for engines: at any time it has the weights of at most ``tokens`` tokens.

    A chunk of T tokens is processed in groups of min(T, tokens). The last group is padded with copies of the last token,
    which are cut off later, because TensorRT needs the same sizes in every round. Products run in the weights' type.
    """
    body = f"""
        limit = Constant <value_float: float = @limit> ()
        low = Neg (limit)
        sizes = Shape <start = 0, end = 1> (x)
        width = Shape <start = 1> (x)
        count = Squeeze (sizes, first)
        last = Sub (count, one)
        group = Min (count, most)
        rounded = Add (last, group)
        rounds = Div (rounded, group)
        offsets = Range (zero, group, one)
        always = Constant <value = bool {{1}}> ()
        rows = Loop (rounds, always) <body = some_tokens (int64 number, bool go) => (bool more, float[G, C] some) {{
            more = Identity (go)
            begin = Mul (number, group)
            beyond = Add (offsets, begin)
            tokens = Min (beyond, last)
            input = Gather <axis = 0> (x, tokens)
            experts = Gather <axis = 0> (chosen, tokens)
            shares = Gather <axis = 0> (weights, tokens)
            column = Unsqueeze (input, column_axes)
            own_w13 = Gather <axis = 0> (w13, experts)
            narrow = CastLike (column, w13)
            product = MatMul (own_w13, narrow)
            both = Cast <to = 1> (product)
            gate, up = Split <axis = 2, num_outputs = 2> (both)
            {clamped_swiglu()}
            own_w2 = Gather <axis = 0> (w2, experts)
            hidden_narrow = CastLike (hidden, w2)
            down_product = MatMul (own_w2, hidden_narrow)
            down = Cast <to = 1> (down_product)
            flat = Squeeze (down, last_axis)
            share = Unsqueeze (shares, share_axis)
            weighted = Mul (flat, share)
            some = ReduceSum <keepdims = 0> (weighted, expert_axis)
        }}>
        shape = Concat <axis = 0> (all, width)
        padded = Reshape (rows, shape)
        y = Slice (padded, first, sizes, first)
    """
    constants = {
        "first": np.array([0]), "most": np.array(tokens), "one": np.array(1), "zero": np.array(0),
        "column_axes": np.array([1, 3]), "last_axis": np.array([3]), "share_axis": np.array([2]),
        "expert_axis": np.array([1]), "all": np.array([-1]),
    }  # fmt: skip
    return _function("FoldkvRoutedExperts", ["x", "chosen", "weights", "w13", "w2"], ["y"], ["limit"], body, constants)
