"""FoldkvHcPre and FoldkvHcPost: what hyper-connections do before and after a sub-layer.

A layer has N residual streams of C channels. Before a sub-layer their mix, by weights that follow from all of them, becomes
its input. After it every new stream is its share of the output and a mix of the old streams (V4 report 2.2; transformers
`DeepseekV4HyperConnection`; ``hc_pre`` and ``hc_post`` of the released code). Everything is float32.

One product gives M = (2 + N) N numbers a token: N for the input, N for the shares, N x N for the mix of the streams, which a
softmax and Sinkhorn's iterations make nearly doubly stochastic.
"""

from __future__ import annotations

import torch
from onnxscript import FLOAT, script
from onnxscript import opset20 as op
from torch import Tensor
from torch.nn import functional

from .registry import OPSET, operator
from .sinkhorn import FoldkvSinkhorn, sinkhorn


def _pre(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, iterations: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """streams [B, S, N, C], fn [M, N C], base [M], scale [3] -> x [B, S, C], post [B, S, N], comb [B, S, N, N].

    ``norm_eps`` is added to the mean square of a token's streams; ``eps`` to the input's weights, to the softmax and to
    Sinkhorn's sums.
    """
    count, flat = streams.shape[2], streams.flatten(2)
    normed = flat * torch.rsqrt(flat.square().mean(dim=-1, keepdim=True) + norm_eps)
    pre, post, comb = functional.linear(normed, fn).split((count, count, count * count), dim=-1)
    of_pre, of_post, of_comb = base.split((count, count, count * count))
    pre = torch.sigmoid(pre * scale[0] + of_pre) + eps
    post = 2 * torch.sigmoid(post * scale[1] + of_post)
    comb = (comb * scale[2] + of_comb).unflatten(-1, (count, count)).softmax(dim=-1) + eps
    return (pre.unsqueeze(-1) * streams).sum(dim=2), post, sinkhorn(comb, iterations, eps)


def _post(streams: Tensor, out: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """streams [B, S, N, C], out [B, S, C], post [B, S, N], comb [B, S, N, N] -> [B, S, N, C].

    comb is summed over its first stream axis: it is doubly stochastic but not symmetric.
    """
    return post.unsqueeze(-1) * out.unsqueeze(2) + torch.matmul(comb.transpose(-1, -2), streams)


@script(OPSET, default_opset=op)
def FoldkvHcPre(  # type: ignore[no-untyped-def]
    streams: FLOAT, fn: FLOAT, base: FLOAT, scale: FLOAT, norm_eps: float, iterations: int, eps: float
):
    count = op.Shape(streams, start=2, end=3)
    square = count * count
    flat = op.Reshape(streams, [0, 0, -1])
    mean = op.ReduceMean(op.Pow(flat, 2.0), [-1], keepdims=1, noop_with_empty_axes=0)
    normed = flat * op.Reciprocal(op.Sqrt(mean + norm_eps))
    # Which of the three factors each of the M numbers takes: 0 for the input's, 1 for the shares, 2 for the mix.
    nth = op.Range(op.Constant(value_int=0), op.Squeeze(op.Shape(base)), op.Constant(value_int=1))
    part = op.Cast(nth >= count, to=7) + op.Cast(nth >= count + count, to=7)
    numbers = op.MatMul(normed, op.Transpose(fn, perm=[1, 0])) * op.Gather(scale, part, axis=0) + base
    to_pre, to_post, to_comb = op.Split(numbers, op.Concat(count, count, square, axis=0), axis=2)
    pre = op.Sigmoid(to_pre) + eps
    post = op.Sigmoid(to_post) * 2.0
    matrix = op.Softmax(op.Reshape(to_comb, op.Concat([0, 0], count, count, axis=0)), axis=-1)
    comb = FoldkvSinkhorn(matrix + eps, iterations, eps)
    return op.ReduceSum(op.Unsqueeze(pre, [3]) * streams, [2], keepdims=0), post, comb


@script(OPSET, default_opset=op)
def FoldkvHcPost(streams: FLOAT, out: FLOAT, post: FLOAT, comb: FLOAT):  # type: ignore[no-untyped-def]
    share = op.Unsqueeze(post, [3]) * op.Unsqueeze(out, [2])
    return share + op.MatMul(op.Transpose(comb, perm=[0, 1, 3, 2]), streams)


hc_pre = operator("FoldkvHcPre", eager=_pre, function=FoldkvHcPre)
hc_post = operator("FoldkvHcPost", eager=_post, function=FoldkvHcPost)
