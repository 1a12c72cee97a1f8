"""One attention layer of any kind: low-rank queries, one KV head, compressed history, grouped output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..contract.geometry import CSA, HCA, SLIDING, ModelSpec
from ..contract.profiles import HF, SERVED
from ..operators.attention import dense_attention, sparse_attention, window_attention
from ..operators.quantize import quantize_fp8
from ..operators.rope import rope
from ..operators.window import window_update
from .compressor import Compressor
from .indexer import Indexer
from .norm import RMSNorm, rms_normalize, split_last
from .rope import inverse_frequencies


class Attention(nn.Module):
    """Sliding, CSA or HCA attention; parameters have the released checkpoints' names."""

    inv_freq: Tensor

    def __init__(self, spec: ModelSpec, layer: int, profile: str = HF) -> None:
        super().__init__()
        self.served, self.rope_dim = profile == SERVED, spec.rope_dim
        self.kind, self.ratio = spec.layer_types[layer], spec.ratios[layer]
        self.heads, self.width, self.groups = spec.num_heads, spec.head_dim, spec.o_groups
        self.o_rank, self.eps = spec.o_lora_rank, spec.rms_norm_eps
        self.wq_a = nn.Linear(spec.hidden_size, spec.q_lora_rank, bias=False)
        self.q_norm = RMSNorm(spec.q_lora_rank, spec.rms_norm_eps)
        self.wq_b = nn.Linear(spec.q_lora_rank, spec.num_heads * spec.head_dim, bias=False)
        self.wkv = nn.Linear(spec.hidden_size, spec.head_dim, bias=False)
        self.kv_norm = RMSNorm(spec.head_dim, spec.rms_norm_eps)
        self.wo_a = nn.Linear(
            spec.num_heads * spec.head_dim // spec.o_groups, spec.o_groups * spec.o_lora_rank, bias=False
        )
        self.wo_b = nn.Linear(spec.o_groups * spec.o_lora_rank, spec.hidden_size, bias=False)
        self.attn_sink = nn.Parameter(torch.empty(spec.num_heads))
        if self.kind != SLIDING:
            self.compressor = Compressor(
                spec.hidden_size, spec.head_dim, self.ratio, overlap=self.kind == CSA, eps=spec.rms_norm_eps,
                profile=profile, rope_dim=spec.rope_dim,
            )  # fmt: skip
        if self.kind == CSA:
            self.indexer = Indexer(spec, self.ratio, profile)
        self.register_buffer("inv_freq", inverse_frequencies(spec, self.kind), persistent=False)

    def forward(
        self,
        x: Tensor,
        state: list[Tensor],
        positions: Tensor,
        num_tokens: Tensor,
        tokens: Tensor,
        active_context: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """x [B, S, C] normed, state as export/contract/state.py lists it for the layer -> out [B, S, C], state."""
        latent = self.q_norm(self.wq_a(x))
        q = rms_normalize(split_last(self.wq_b(latent), self.heads, self.width), self.eps)
        q = rope(q, tokens, self.inv_freq, 0)
        kv = rope(self.kv_norm(self.wkv(x)).unsqueeze(2), tokens, self.inv_freq, 0).squeeze(2)
        if self.served:
            kv = quantize_fp8(kv, self.rope_dim)
        rows, window = window_update(state[0], kv, positions, num_tokens)
        common = (self.attn_sink, self.inv_freq, positions, num_tokens)
        after = [window]
        if self.kind == SLIDING:
            out = window_attention(q, rows, *common)
        elif self.kind == HCA:
            after += self.compressor(x, state[1:], self.inv_freq, positions, num_tokens)
            out = dense_attention(q, rows, after[1], *common, active_context, self.ratio)
        else:
            after += self.compressor(x, state[1:4], self.inv_freq, positions, num_tokens)
            chosen, index_state = self.indexer(
                x, latent, state[4:7], self.inv_freq, positions, num_tokens, tokens, active_context
            )
            after += index_state
            out = sparse_attention(q, rows, after[1], chosen, *common)
        return self._project(out), after

    def _project(self, out: Tensor) -> Tensor:
        # Tokens are rows of one product per group. With a batch of tokens, TensorRT would copy the weights for each token.
        batch, chunk = out.shape[:2]
        grouped = split_last(out.flatten(2), self.groups, -1).flatten(0, 1).transpose(0, 1)
        weight = self.wo_a.weight.reshape(self.groups, self.o_rank, -1).transpose(1, 2)
        low = torch.matmul(grouped, weight).transpose(0, 1).flatten(1)
        projected: Tensor = self.wo_b(low).reshape(batch, chunk, -1)
        return projected
