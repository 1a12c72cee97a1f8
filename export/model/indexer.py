"""The lightning indexer of a CSA layer: which entries each query attends to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..contract.geometry import ModelSpec
from ..contract.profiles import HF, SERVED
from ..operators.index import index_scores, index_select
from ..operators.quantize import quantize_fp4
from ..operators.rope import rope
from .compressor import Compressor
from .hadamard import hadamard_matrix
from .norm import split_last


class Indexer(nn.Module):
    """Query latents and hidden states in, chosen entry rows and the indexer's own state out.

    In the profile ``served``, queries and keys are rotated by one Hadamard matrix, which does not change their products,
    and then quantised to FP4.
    """

    hadamard: Tensor | None

    def __init__(self, spec: ModelSpec, ratio: int, profile: str = HF) -> None:
        super().__init__()
        self.wq_b = nn.Linear(spec.q_lora_rank, spec.index_heads * spec.index_head_dim, bias=False)
        self.weights_proj = nn.Linear(spec.hidden_size, spec.index_heads, bias=False)
        self.compressor = Compressor(
            spec.hidden_size, spec.index_head_dim, ratio, overlap=True, eps=spec.rms_norm_eps, profile=profile
        )
        self.heads, self.width, self.topk, self.ratio = spec.index_heads, spec.index_head_dim, spec.index_topk, ratio
        matrix = hadamard_matrix(spec.index_head_dim) if profile == SERVED else None
        self.register_buffer("hadamard", matrix, persistent=False)

    def forward(
        self,
        x: Tensor,
        latent: Tensor,
        state: list[Tensor],
        inv_freq: Tensor,
        positions: Tensor,
        num_tokens: Tensor,
        tokens: Tensor,
        active_context: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """x [B, S, C], latent [B, S, q_lora_rank], tokens [B, S] positions -> chosen [B, S, topk] int32, state."""
        state = self.compressor(x, state, inv_freq, positions, num_tokens, self.hadamard)
        q = split_last(self.wq_b(latent), self.heads, self.width)
        q = rope(q, tokens, inv_freq, 0)
        if self.hadamard is not None:
            q = quantize_fp4(torch.matmul(q, self.hadamard))
        weights = self.weights_proj(x) * (self.width**-0.5 * self.heads**-0.5)
        scores = index_scores(q, weights, state[0], positions, active_context, self.ratio)
        return index_select(scores, positions, self.ratio, self.topk), state
