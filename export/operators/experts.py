"""FoldkvRoutedExperts: the chosen experts' clamped SwiGLU, weighted and summed.

Only the weights of chosen experts are read: the cost follows ``tokens * experts_per_token``, not the
number of experts. Gate and up projections are stacked as ``w13`` (transformers `gate_up_proj`).
"""

from __future__ import annotations

import torch
from onnxscript import FLOAT, INT64, script
from onnxscript import opset20 as op
from torch import Tensor

from foldkv.export.operators.registry import OPSET, operator


def _eager(x: Tensor, chosen: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, limit: float) -> Tensor:
    """x [T, C], chosen [T, K] int64, weights [T, K], w13 [E, 2I, C], w2 [E, C, I] -> [T, C] float32."""
    gate, up = torch.einsum("tkic,tc->tki", w13[chosen], x).chunk(2, dim=-1)
    hidden = torch.nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    return (torch.einsum("tkci,tki->tkc", w2[chosen], hidden) * weights[..., None]).sum(dim=1)


def _fake(x: Tensor, chosen: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, limit: float) -> Tensor:
    return torch.empty_like(x)


@script(OPSET, default_opset=op)
def FoldkvRoutedExperts(x: FLOAT, chosen: INT64, weights: FLOAT, w13: FLOAT, w2: FLOAT, limit: float):  # type: ignore[no-untyped-def]
    column = op.Unsqueeze(x, [1, 3])
    both = op.Cast(op.MatMul(op.Gather(w13, chosen, axis=0), op.CastLike(column, w13)), to=1)
    gate, up = op.Split(both, num_outputs=2, axis=2)
    gate = op.Min(gate, limit)
    hidden = gate * op.Sigmoid(gate) * op.Max(op.Min(up, limit), 0.0 - limit)
    down = op.Cast(op.MatMul(op.Gather(w2, chosen, axis=0), op.CastLike(hidden, w2)), to=1)
    return op.ReduceSum(op.Squeeze(down, [3]) * op.Unsqueeze(weights, [2]), [1], keepdims=0)


routed_experts = operator(
    "FoldkvRoutedExperts",
    eager=_eager,
    fake=_fake,
    function=FoldkvRoutedExperts,
    inputs=("x", "chosen", "weights", "w13", "w2"),
    attributes=("limit",),
    outputs=("y",),
)
