"""The compressor of a CSA or HCA layer: projections around the compressing operators."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..contract.profiles import HF, SERVED
from ..operators.compress import compress, compress_fp4, compress_fp8
from ..operators.compress_online import compress_online, compress_online_fp8
from .norm import RMSNorm


class Compressor(nn.Module):
    """Hidden states in, updated entries and carries out. ``overlap`` doubles the projected series (CSA). Without it (HCA)
    the carry is an online softmax.

    In the profile ``served``, entries are quantised before they are written; ``rope_dim`` is the number of rotated channels.
    """

    def __init__(
        self, hidden: int, width: int, ratio: int, *, overlap: bool, eps: float, profile: str = HF, rope_dim: int = 0
    ) -> None:
        super().__init__()
        self.served, self.rope_dim, self.overlap = profile == SERVED, rope_dim, overlap
        series = width * (2 if overlap else 1)
        self.wkv = nn.Linear(hidden, series, bias=False)
        self.wgate = nn.Linear(hidden, series, bias=False)
        self.ape = nn.Parameter(torch.empty(ratio, series))
        self.norm = RMSNorm(width, eps)
        self.ratio = ratio

    def forward(
        self,
        x: Tensor,
        state: list[Tensor],
        inv_freq: Tensor,
        positions: Tensor,
        num_tokens: Tensor,
        hadamard: Tensor | None = None,
    ) -> list[Tensor]:
        """x [B, S, C]; state = entries and carries, as export/contract/state.py lists them -> the state after the chunk.

        hadamard [D, D] is the rotation of an indexer's entries in the profile ``served``.
        """
        chunk = (self.wkv(x), self.wgate(x), self.ape, self.norm.weight, inv_freq, positions, num_tokens)
        if not self.served:
            plain = compress if self.overlap else compress_online
            return list(plain(*state, *chunk, self.ratio, self.norm.eps))
        if hadamard is None:
            rounding = compress_fp8 if self.overlap else compress_online_fp8
            return list(rounding(*state, *chunk, self.rope_dim, self.ratio, self.norm.eps))
        return list(compress_fp4(*state, *chunk, hadamard, self.ratio, self.norm.eps))
