"""The compressor of a CSA or HCA layer: projections around the compress operator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foldkv.export.model.norm import RMSNorm
from foldkv.export.operators.compress import compress


class Compressor(nn.Module):
    """Hidden states in, updated entries and carries out. ``overlap`` doubles the projected series (CSA)."""

    def __init__(self, hidden: int, width: int, ratio: int, *, overlap: bool, eps: float) -> None:
        super().__init__()
        series = width * (2 if overlap else 1)
        self.wkv = nn.Linear(hidden, series, bias=False)
        self.wgate = nn.Linear(hidden, series, bias=False)
        self.ape = nn.Parameter(torch.empty(ratio, series))
        self.norm = RMSNorm(width, eps)
        self.ratio = ratio

    def forward(
        self, x: Tensor, state: list[Tensor], inv_freq: Tensor, positions: Tensor, num_tokens: Tensor
    ) -> list[Tensor]:
        """x [B, S, C]; state = entries, carry_kv, carry_gate (see operators/compress.py) -> the state after the chunk."""
        return list(
            compress(
                *state, self.wkv(x), self.wgate(x), self.ape, self.norm.weight, inv_freq, positions, num_tokens,
                self.ratio, self.norm.eps,
            )
        )  # fmt: skip
