"""Rotary frequencies per layer kind: plain for sliding layers, YaRN for compressed ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..contract.geometry import SLIDING, ModelSpec, Yarn


def inverse_frequencies(spec: ModelSpec, layer_type: str) -> Tensor:
    """[rope_dim / 2] float32 on the CPU, whatever the default device is; in radians per token.

    Sliding layers: ``theta ** (-2j / rope_dim)``. Compressed layers use ``compress_rope_theta`` and, if
    the checkpoint asks for it, YaRN's blend of kept and interpolated frequencies (Peng et al. 2023,
    section 3.2; transformers `_compute_yarn_parameters`) without its mscale.
    """
    theta = spec.rope_theta if layer_type == SLIDING else spec.compress_rope_theta
    base = theta ** (torch.arange(0, spec.rope_dim, 2, dtype=torch.float32, device="cpu") / spec.rope_dim)
    if layer_type == SLIDING or spec.yarn is None:
        return 1.0 / base
    return _yarn(base, theta, spec.rope_dim, spec.yarn)


def _yarn(base: Tensor, theta: float, dim: int, yarn: Yarn) -> Tensor:
    def dimension_of(turns: float) -> float:
        return dim * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension_of(yarn.beta_fast)), 0)
    high = min(math.ceil(dimension_of(yarn.beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low if high != low else 0.001)
    keep = 1.0 - ramp.clamp(0, 1)
    return (1.0 / (yarn.factor * base)) * (1.0 - keep) + (1.0 / base) * keep
