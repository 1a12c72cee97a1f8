"""ModelSpec: the geometry of a DeepSeek-V4-class model. Standard library only.

export/checkpoint/config_reader.py reads it from config.json.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

SLIDING = "sliding_attention"
CSA = "compressed_sparse_attention"
HCA = "heavily_compressed_attention"
#: The kinds of layers by the names of released checkpoints, with the names of their segments.
SHORT_NAMES = {SLIDING: "sliding", CSA: "csa", HCA: "hca"}
LAYER_TYPES = tuple(SHORT_NAMES)
#: Those whose indexer chooses entries.
INDEXED = (CSA,)


@dataclass(frozen=True)
class Yarn:
    """YaRN scaling of the rotary frequencies of compressed layers (no mscale on cos and sin)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float


@dataclass(frozen=True)
class ModelSpec:
    """The geometry of one model. All sizes are in elements; ``ratios`` are in tokens per compressed entry."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    rope_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    layer_types: tuple[str, ...]
    ratios: tuple[int, ...]
    index_heads: int
    index_head_dim: int
    index_topk: int
    num_experts: int
    experts_per_token: int
    moe_intermediate_size: int
    routed_scaling_factor: float
    swiglu_limit: float
    hash_layers: tuple[bool, ...]
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    rope_theta: float
    compress_rope_theta: float
    yarn: Yarn | None
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def indexed_ratios(self) -> dict[int, int]:
        """The layers whose indexer chooses entries, with the tokens per entry."""
        return {layer: self.ratios[layer] for layer, kind in enumerate(self.layer_types) if kind in INDEXED}

    @property
    def chosen_parameters(self) -> int:
        """Parameters of the routed experts that one token is sent to, in one layer: three matrices of each."""
        return self.experts_per_token * 3 * self.hidden_size * self.moe_intermediate_size

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]
