"""ModelSpec: both spellings of the configuration, and refusals that list every finding."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import DeepseekV4Config

from foldkv.errors import CheckpointError
from foldkv.export.checkpoint.config_reader import spec_from_config
from foldkv.export.contract.geometry import CSA, HCA, SLIDING

RELEASED: dict[str, Any] = {
    "model_type": "deepseek_v4", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "qk_rope_head_dim": 8, "q_lora_rank": 12,
    "o_groups": 2, "o_lora_rank": 8, "sliding_window": 8, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16,
    "routed_scaling_factor": 1.5, "swiglu_limit": 10.0, "num_hash_layers": 1, "hc_mult": 4, "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6, "rms_norm_eps": 1e-6, "rope_theta": 10000, "compress_rope_theta": 160000,
    "rope_scaling": {"type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1,
                     "original_max_position_embeddings": 65536},
    "max_position_embeddings": 1048576, "compress_ratios": [0, 4, 128, 0], "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def test_the_released_spelling_is_read_without_the_draft_layer() -> None:
    spec = spec_from_config(RELEASED)
    assert spec.layer_types == (SLIDING, CSA, HCA)
    assert spec.ratios == (0, 4, 128)
    assert spec.hash_layers == (True, False, False)
    assert spec.rope_dim == 8
    assert spec.yarn is not None and spec.yarn.factor == 16
    assert spec.eos_token_ids == (1,)


def test_transformers_spelling_of_the_same_model_gives_the_same_spec() -> None:
    config = {key: value for key, value in RELEASED.items() if key != "topk_method"}
    saved = DeepseekV4Config(**config).to_dict()
    assert "compress_ratios" not in saved
    assert spec_from_config(saved) == spec_from_config(RELEASED)


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"hiden_size": 1}, "unknown key 'hiden_size' with value 1 (did you mean 'hidden_size'?)"),
        ({"model_type": "deepseek_v3"}, "model_type is 'deepseek_v3'"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"vocab_size": None}, "missing key 'vocab_size'"),
        ({"vocab_size": "64"}, "vocab_size is '64'; expected an integer"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"head_dim": 0}, "head_dim is 0; expected more than 0"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps is 'x'; expected a number"),
        ({"compress_ratios": None}, "the schedule is never guessed"),
        ({"compress_ratios": [0, 4]}, "the layer schedule has 2 layers; expected 3"),
        ({"compress_ratios": [0, 7, 128]}, "only 0, 4 and 128 name a layer kind"),
        ({"compress_ratios": "x"}, "expected a list with one ratio per layer"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types[0] is 'full_attention'"),
        ({"compress_rates": {CSA: 0}}, "expected an integer of at least 1"),
        ({"compress_rates": {"x": 4}}, "compress_rates has 'x'"),
        ({"num_hash_layers": -1}, "num_hash_layers is -1"),
        ({"mlp_layer_types": ["dense"] * 3}, "mlp_layer_types is"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7; expected an even integer"),
        ({"qk_rope_head_dim": 12}, "larger than head_dim 16 or index_head_dim 8"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope scaling 'linear'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "mscale": 0.7}}, "rope_scaling.mscale is 0.7: rotations or"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "x": 1}}, "unknown key 'rope_scaling.x' with value 1"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": "x"}}, "rope_scaling: beta_fast is 'x'"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling.factor is 2 but its rope_type is 'default'"),
        ({"swiglu_limit": float("nan")}, "swiglu_limit is nan; expected a number"),
        ({"rope_scaling": {"type": "yarn"}}, "yarn factor None"),
        ({"o_groups": 3}, "o_groups 3 does not divide"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 is more than n_routed_experts 8"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(change: dict[str, Any], finding: str) -> None:
    config = {key: value for key, value in (RELEASED | change).items() if value is not None}
    with pytest.raises(CheckpointError) as caught:
        spec_from_config(config, source="x/config.json")
    assert finding in str(caught.value)
    assert "x/config.json" in str(caught.value)


def test_all_findings_are_listed_at_once() -> None:
    with pytest.raises(CheckpointError, match=r"\(3 found\)"):
        spec_from_config(RELEASED | {"typo": 1, "head_dim": -1, "hidden_act": "gelu"})
