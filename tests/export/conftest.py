"""Random models in transformers, the independent implementation that the export is compared with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

SLIDING, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
YARN = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "beta_fast": 8, "beta_slow": 1}

BASE: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "num_attention_heads": 4, "head_dim": 16,
    "q_lora_rank": 12, "o_groups": 2, "o_lora_rank": 8, "sliding_window": 8, "index_n_heads": 24,
    "index_head_dim": 12, "index_topk": 3, "n_routed_experts": 5, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "num_hash_layers": 1, "hc_mult": 4, "hc_sinkhorn_iters": 20,
    "partial_rotary_factor": 0.5, "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 1,
    "layer_types": [SLIDING, CSA, HCA], "compress_rates": {CSA: 4, HCA: 8}, "rope_parameters": YARN,
}  # fmt: skip

#: Geometry that the released checkpoints do not have but the code must not rely on. All kinds of layers in one model are
#: the first's; the others have no layer that their geometry does not concern, because each is traced.
CONFIGS: dict[str, dict[str, Any]] = {
    "all_kinds": {},
    "odd_ratios": {"layer_types": [CSA, HCA], "compress_rates": {CSA: 3, HCA: 5}, "sliding_window": 7},
    "csa_first_topk_beyond_entries": {"layer_types": [CSA, HCA], "index_topk": 64},
    "hca_only_many_hash_layers": {"layer_types": [HCA, HCA], "num_hash_layers": 2, "compress_rates": {HCA: 6}},
    "sliding_only_no_hash": {"layer_types": [SLIDING], "num_hash_layers": 0, "sliding_window": 5},
    "one_head_one_group_two_streams": {
        "layer_types": [CSA, HCA], "num_attention_heads": 1, "o_groups": 1, "hc_mult": 2, "hc_sinkhorn_iters": 3, "num_experts_per_tok": 5,
        "rope_parameters": None, "index_topk": 1, "compress_rates": {CSA: 1, HCA: 2}, "sliding_window": 3,
    },
    "ratio_one_and_window_of_three": {"layer_types": [CSA, HCA], "compress_rates": {CSA: 1, HCA: 2}, "sliding_window": 3, "index_topk": 4},
}  # fmt: skip


def random_reference(seed: int = 0, **overrides: Any) -> DeepseekV4ForCausalLM:
    """A float32 model with every parameter random, none at its neutral initial value."""
    settings = BASE | overrides
    config = DeepseekV4Config(**settings, num_hidden_layers=len(settings["layer_types"]), attn_implementation="eager")
    torch.manual_seed(seed)
    model = DeepseekV4ForCausalLM(config).float().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("inv_freq"):
            continue
        if name.endswith("tid2eid"):
            value.copy_(torch.stack([
                torch.randperm(config.n_routed_experts, generator=generator)[: config.num_experts_per_tok]
                for _ in range(config.vocab_size)
            ]))  # fmt: skip
        elif "norm" in name:
            value.copy_(1 + 0.2 * torch.randn(value.shape, generator=generator))
        else:
            fan = value.shape[-1] if value.dim() > 1 else 4
            value.copy_(torch.randn(value.shape, generator=generator) * fan**-0.5)
    return model


@pytest.fixture
def make_reference() -> Callable[..., DeepseekV4ForCausalLM]:
    return random_reference


@pytest.fixture(scope="session")
def make_reference_once() -> Callable[..., DeepseekV4ForCausalLM]:
    """As :func:`make_reference`, for fixtures that live longer than a test."""
    return random_reference


#: Those whose graphs are compared too: tracing takes half a minute for each, and the others differ in sizes of the same graph
#: (test_served.py traces odd ratios).
TRACED = (
    "all_kinds",
    "one_head_one_group_two_streams",
)


@pytest.fixture(scope="session", params=list(CONFIGS))
def reference_checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[DeepseekV4ForCausalLM, Path]:
    """A random reference of every configuration, and its checkpoint as transformers saves it."""
    return _saved(request.param, tmp_path_factory)


@pytest.fixture(scope="session", params=TRACED)
def traced_checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[DeepseekV4ForCausalLM, Path]:
    """As :func:`reference_checkpoint`, of the configurations whose graphs are compared."""
    return _saved(request.param, tmp_path_factory)


def _saved(name: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[DeepseekV4ForCausalLM, Path]:
    model = random_reference(seed=len(name), **CONFIGS[name])
    folder = tmp_path_factory.mktemp(name)
    model.save_pretrained(folder)
    return model, folder
