"""Manifold-constrained hyper-connections: several residual streams, mixed around every block."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..contract.geometry import ModelSpec
from ..operators.hyper_connections import hc_post, hc_pre
from .norm import rms_normalize


def collapse(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, spec: ModelSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """The block's input, and the weights that put its output back (V4 report 2.2).

    streams [B, S, N, C], fn [(2 + N) N, N C], base [(2 + N) N], scale [3] (pre, post, comb)
    -> x [B, S, C], post [B, S, N], comb [B, S, N, N].
    """
    x, post, comb = hc_pre(streams, fn, base, scale, spec.rms_norm_eps, spec.hc_sinkhorn_iters, spec.hc_eps)
    return x, post, comb


def expand(streams: Tensor, out: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Streams [B, S, N, C] after the block: each takes its share of ``out`` [B, S, C] and a mix of the old streams."""
    mixed: Tensor = hc_post(streams, out, post, comb)
    return mixed


def collapse_last(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, spec: ModelSpec) -> Tensor:
    """The head's input: streams [B, S, N, C], fn [N, N C], base [N], scale [1] -> [B, S, C].

    Once per step and without Sinkhorn, so it is no operator of its own.
    """
    mixed = functional.linear(rms_normalize(streams.flatten(2), spec.rms_norm_eps), fn)
    return ((torch.sigmoid(mixed * scale + base) + spec.hc_eps).unsqueeze(-1) * streams).sum(dim=2)
