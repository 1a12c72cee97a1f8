"""ModelSpec: the geometry of a DeepSeek-V4-class model. Standard library only.

export/config_reader.py reads it from config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SLIDING = "sliding_attention"
CSA = "compressed_sparse_attention"
HCA = "heavily_compressed_attention"
LAYER_TYPES = (SLIDING, CSA, HCA)


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

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], *, source: str = "config.json", allow_unknown_keys: Sequence[str] = ()
    ) -> ModelSpec:
        """The spec of a parsed config.json; ``source`` names it in errors and warnings.

        Args:
            config: the parsed file.
            source: where it comes from.
            allow_unknown_keys: unknown keys to ignore instead of refusing them.

        Raises:
            CheckpointError: unknown, missing or contradictory keys, all listed.
        """
        from .config_reader import read_model

        return read_model(config, source=source, allow_unknown_keys=allow_unknown_keys).spec

    @classmethod
    def from_file(cls, path: Path, *, allow_unknown_keys: Sequence[str] = ()) -> ModelSpec:
        """The spec of a config.json, or of the one in a checkpoint folder.

        Logs a warning if the weights are stored in a format that is not read.

        Raises:
            CheckpointError: there is no file, it is not a JSON object, or as :meth:`from_config`.
        """
        from .config_reader import read_config
        from .storage import warn_of_unread_weights

        path = Path(path)
        config = read_config(path)
        source = path / "config.json" if path.is_dir() else path
        spec = cls.from_config(config, source=str(source), allow_unknown_keys=allow_unknown_keys)
        warn_of_unread_weights(path, config)
        return spec

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]
