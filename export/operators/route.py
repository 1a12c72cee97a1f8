"""FoldkvRoute and FoldkvRouteHashed: which experts a token goes to, and with what weight.

An expert's score is ``sqrt(softplus(x W))``. FoldkvRoute takes the best ``score + bias``, of equal ones the lowest index
first; the bias balances the load and does not change the weights (V4 report 2.1). FoldkvRouteHashed looks the experts up by
token id. The weights are the chosen scores over their sum, times ``scaling``.

The matrix is read as stored, in bfloat16 or float32 (``weight_format``); everything is computed in float32.
"""

from __future__ import annotations

from onnxscript import FLOAT, INT64, script
from onnxscript import opset20 as op
from torch import Tensor
from torch.nn import functional

from .registry import OPSET, operator

#: Added to the sum of the chosen scores (transformers `DeepseekV4TopkRouter`).
LEAST = 1e-20


def _scores(x: Tensor, weight: Tensor) -> Tensor:
    return functional.softplus(functional.linear(x, weight.to(x.dtype))).sqrt()


def _weights(scores: Tensor, chosen: Tensor, scaling: float) -> Tensor:
    taken = scores.gather(1, chosen)
    return taken / (taken.sum(dim=-1, keepdim=True) + LEAST) * scaling


def _route(
    x: Tensor, weight: Tensor, bias: Tensor, topk: int, scaling: float, weight_format: str
) -> tuple[Tensor, Tensor]:
    """x [M, C], weight [X, C], bias [X] -> chosen [M, topk] int64, best first, and weights [M, topk]."""
    scores = _scores(x, weight)
    order = (scores + bias).sort(dim=-1, descending=True, stable=True).indices
    chosen = order[:, :topk].contiguous()
    return chosen, _weights(scores, chosen, scaling)


def _route_hashed(
    x: Tensor, weight: Tensor, tid2eid: Tensor, input_ids: Tensor, scaling: float, weight_format: str
) -> tuple[Tensor, Tensor]:
    """x [M, C], weight [X, C], tid2eid [V, K] int64, input_ids [M] int64 -> chosen [M, K] int64, weights [M, K]."""
    chosen = tid2eid[input_ids]
    return chosen, _weights(_scores(x, weight), chosen, scaling)


@script(OPSET, default_opset=op)
def FoldkvRouteScores(x: FLOAT, weight: FLOAT):  # type: ignore[no-untyped-def]
    return op.Sqrt(op.Softplus(op.Gemm(x, op.Cast(weight, to=1), transB=1)))


@script(OPSET, default_opset=op)
def FoldkvRouteWeights(scores: FLOAT, chosen: INT64, scaling: float):  # type: ignore[no-untyped-def]
    taken = op.GatherElements(scores, chosen, axis=1)
    return taken / (op.ReduceSum(taken, [-1], keepdims=1) + 1e-20) * scaling


@script(OPSET, default_opset=op)
def FoldkvRoute(  # type: ignore[no-untyped-def]
    x: FLOAT, weight: FLOAT, bias: FLOAT, topk: int, scaling: float, weight_format: str
):
    scores = FoldkvRouteScores(x, weight)
    places = op.Reshape(op.Constant(value_int=1) * topk, [1])
    _, chosen = op.TopK(scores + bias, places, axis=-1, largest=1, sorted=1)
    return chosen, FoldkvRouteWeights(scores, chosen, scaling)


@script(OPSET, default_opset=op)
def FoldkvRouteHashed(  # type: ignore[no-untyped-def]
    x: FLOAT, weight: FLOAT, tid2eid: INT64, input_ids: INT64, scaling: float, weight_format: str
):
    chosen = op.Gather(tid2eid, input_ids, axis=0)
    return chosen, FoldkvRouteWeights(FoldkvRouteScores(x, weight), chosen, scaling)


route = operator("FoldkvRoute", eager=_route, function=FoldkvRoute)
route_hashed = operator("FoldkvRouteHashed", eager=_route_hashed, function=FoldkvRouteHashed)
