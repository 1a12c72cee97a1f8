"""Manifold-constrained hyper-connections: several residual streams, mixed around every block."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..contract.geometry import ModelSpec
from ..operators.sinkhorn import sinkhorn
from .norm import rms_normalize, split_last


def collapse(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, spec: ModelSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """The block's input, and the weights that put its output back (V4 report 2.2).

    streams [B, S, N, C], fn [(2 + N) N, N C], base [(2 + N) N], scale [3] (pre, post, comb)
    -> x [B, S, C], post [B, S, N], comb [B, S, N, N].
    """
    count = spec.hc_mult
    mixed = functional.linear(rms_normalize(streams.flatten(2), spec.rms_norm_eps), fn)
    pre = torch.sigmoid(mixed[..., :count] * scale[0] + base[:count]) + spec.hc_eps
    post = 2 * torch.sigmoid(mixed[..., count : 2 * count] * scale[1] + base[count : 2 * count])
    comb = split_last(mixed[..., 2 * count :] * scale[2] + base[2 * count :], count, count)
    comb = sinkhorn(comb.softmax(dim=-1) + spec.hc_eps, spec.hc_sinkhorn_iters, spec.hc_eps)
    return (pre.unsqueeze(-1) * streams).sum(dim=2), post, comb


def expand(streams: Tensor, out: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Streams after the block: each takes its share of ``out`` and a mix of the old streams.

    comb is summed over its first stream axis: it is doubly stochastic but not symmetric.
    """
    return post.unsqueeze(-1) * out.unsqueeze(2) + torch.matmul(comb.transpose(-1, -2), streams)


def collapse_last(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, spec: ModelSpec) -> Tensor:
    """The head's input: streams [B, S, N, C], fn [N, N C], base [N], scale [1] -> [B, S, C]."""
    mixed = functional.linear(rms_normalize(streams.flatten(2), spec.rms_norm_eps), fn)
    return ((torch.sigmoid(mixed * scale + base) + spec.hc_eps).unsqueeze(-1) * streams).sum(dim=2)
