"""RMSNorm, with and without a learned weight, in float32; and the split of a width into heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rms_normalize(x: Tensor, eps: float) -> Tensor:
    """x [..., D] divided by the root of its mean square over D."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def split_last(x: Tensor, *sizes: int) -> Tensor:
    """x [..., D] -> [..., *sizes]; the product of the sizes is D."""
    return x.reshape(*x.shape[:-1], *sizes)


class RMSNorm(nn.Module):
    """RMS normalisation times a weight [D]."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return rms_normalize(x, self.eps) * self.weight
