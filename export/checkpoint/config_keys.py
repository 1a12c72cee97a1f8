"""Keys of config.json that do not describe the geometry: without effect, harmless, harmful, unknown. Standard library only.

Keys without effect on the model are ignored: silently if released files and transformers write them, with a warning if
trainers and other tools do. Some keys change the computation in other models. Such a key is ignored with a warning if its
value changes nothing, and otherwise refused with the reason. All other keys are refused, because nobody knows what they
change.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import nearest
from .notices import warn_once

logger = logging.getLogger(__name__)

#: Keys that released checkpoints and transformers write: training, sampling, storage, the draft head. Ignored silently.
_WITHOUT_EFFECT = (
    "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "torch_dtype", "dtype",
    "use_cache", "expert_dtype", "quantization_config", "quantization", "compression_config", "num_nextn_predict_layers",
    "transformers_version", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "return_dict",
    "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id",
    "problem_type", "_name_or_path", "attn_implementation", "default_partial_rotary_factor", "default_compress_rates",
    "default_num_hash_layers", "auto_map", "max_window_layers",
)  # fmt: skip
#: Keys that trainers, quantisers and older versions of transformers leave in a file. Ignored with a warning.
_BOOKKEEPING = (
    "pretraining_tp", "ep_size", "seq_aux", "aux_loss_alpha", "num_labels", "finetuning_task", "task_specific_params",
    "tokenizer_class", "prefix", "sep_token_id", "decoder_start_token_id", "is_decoder", "cross_attention_hidden_size",
    "tie_encoder_decoder", "tf_legacy_loss", "use_bfloat16", "torchscript", "use_return_dict", "gradient_checkpointing",
    "model_name", "model_max_length", "base_model_name_or_path", "peft_type", "use_flash_attention", "experts_implementation",
    "attention_implementation", "name_or_path", "tie_last_hidden_states", "transformers_weights", "license", "language",
    # Settings of generation that older versions stored here; `foldkv generate` has options for them.
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate",
    "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty",
    "suppress_tokens", "begin_suppress_tokens", "max_new_tokens",
)  # fmt: skip
#: The same, by prefix; names with a leading underscore are private to the tool that wrote them.
_BOOKKEEPING_PREFIXES = ("_", "unsloth_", "axolotl_", "swift_", "wandb_", "mtp_", "dspark_")


@dataclass(frozen=True)
class _Neutral:
    """Values with which a key changes nothing, and what any other value changes."""

    values: tuple[Any, ...]
    why: str


_GROUPS = "experts would be chosen group by group, which V4 does not do"
_DENSE = "some layers would have no experts; V4 has them in every layer"
_CAPPED = "logits would be scaled or capped, which V4 does not do"
_MSCALE = "rotations or attention scores would be scaled, which V4 does not do"
_NEUTRAL = {
    "n_group": _Neutral((None, 0, 1), _GROUPS),
    "topk_group": _Neutral((None, 0, 1), _GROUPS),
    "num_expert_group": _Neutral((None, 0, 1), _GROUPS),
    "first_k_dense_replace": _Neutral((None, 0), _DENSE),
    "moe_layer_freq": _Neutral((None, 1), _DENSE),
    "decoder_sparse_step": _Neutral((None, 1), _DENSE),
    "mlp_only_layers": _Neutral((None, []), _DENSE),
    "per_layer_config": _Neutral((None, {}), "layers would differ in more than their kind"),
    "use_sliding_window": _Neutral((None, True), "layers would see the whole text; V4 keeps a window"),
    "attn_logit_softcapping": _Neutral((None, 0), _CAPPED),
    "final_logit_softcapping": _Neutral((None, 0), _CAPPED),
    "logit_scale": _Neutral((None, 1), _CAPPED),
    "logits_scaling": _Neutral((None, 1), _CAPPED),
    "embedding_multiplier": _Neutral((None, 1), "embeddings would be scaled, which V4 does not do"),
    "residual_multiplier": _Neutral((None, 1), "residual streams would be scaled, which V4 does not do"),
    "clip_qkv": _Neutral((None,), "queries, keys and values would be clipped, which V4 does not do"),
    "rope_interleave": _Neutral((None, True), "channels would be paired differently; V4 turns neighbouring channels"),
    "pruned_heads": _Neutral((None, {}, []), "heads would be missing"),
    "add_cross_attention": _Neutral((None, False), "layers would look at another text"),
    "mscale": _Neutral((None, 0, 1), _MSCALE),
    "mscale_all_dim": _Neutral((None, 0, 1), _MSCALE),
}
#: Other models' names for a fact that has a different name here: harmless if they agree.
_SAME_AS = {
    "num_experts": "num_experts",
    "moe_num_experts": "num_experts",
    "moe_topk": "experts_per_token",
    "num_shared_experts": "shared_experts",
    "qk_head_dim": "head_dim",
    "v_head_dim": "head_dim",
    "kv_lora_rank": "head_dim",
    "qk_nope_head_dim": "nope_dim",
    "window_size": "sliding_window",
    "original_max_position_embeddings": "original_max_position_embeddings",
}


@dataclass
class KeyReport:
    """Decisions on the keys that do not describe the geometry. Names of nested keys are dotted.

    Attributes:
        findings: why keys are refused.
        harmless: keys that are ignored with a warning.
        allowed: keys that are ignored because the caller allowed them.
        unknown: refused keys that could be allowed.
    """

    allow: Collection[str] = ()
    findings: list[str] = field(default_factory=list)
    harmless: list[str] = field(default_factory=list)
    allowed: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def judge(
        self, name: str, value: Any, facts: Mapping[str, Any], read: Sequence[str], present: Collection[str]
    ) -> None:
        """Decide on one key that does not describe the geometry.

        Args:
            name: of the key, dotted if it is nested.
            value: of the key.
            facts: the facts read so far, by field of ModelSpec.
            read: names of keys that are read in this place, to suggest one.
            present: names of keys that the file has in this place; these are not suggested.
        """
        leaf = name.rpartition(".")[2]
        neutral = _NEUTRAL.get(leaf)
        if _harmless(leaf, value, neutral, facts):
            self.harmless.append(name)
        elif name in self.allow:
            self.allowed.append(name)
        elif neutral is not None:
            self.unknown.append(name)
            self.findings.append(f"{name} is {value!r}: {neutral.why}; only {neutral.values[-1]!r} can be exported")
        elif (fact := _SAME_AS.get(leaf)) is not None and facts.get(fact) is not None:
            self.unknown.append(name)
            self.findings.append(f"{name} is {value!r}; the other keys give {facts[fact]!r} for it")
        else:
            hint = nearest(leaf, [key for key in read if key not in present])
            if not hint:  # otherwise the key is a typo, and ignoring it would lose its value
                self.unknown.append(name)
                hint = nearest(leaf, read)
            self.findings.append(f"unknown key {name!r} with value {shortened(value)}{hint}")

    def judge_all(self, config: Mapping[str, Any], facts: Mapping[str, Any], read: Sequence[str]) -> None:
        """Decide on every top-level key of a file that is not in ``read``."""
        for name, value in config.items():
            if name not in read and name not in _WITHOUT_EFFECT:
                self.judge(name, value, facts, read, config.keys())
        for name in self.allow:
            if name in read and name in config:
                self.findings.append(
                    f"{name} was allowed as an unknown key, but foldkv reads it, so it cannot be ignored"
                )

    def next_step(self) -> str:
        """What to do about keys that could be allowed, or an empty string."""
        if not self.unknown:
            return ""
        options = " ".join(f"--allow-unknown-key {name}" for name in self.unknown)
        return (
            f" If you know that a key changes nothing, ignore it: {options} (in a pipeline file: allow_unknown_keys in "
            "the table [export])."
        )

    def warn(self, source: str) -> None:
        """Log once per file which keys are ignored."""
        if self.harmless:
            warn_once(logger, f"{source}: ignored, because they do not change the model: {', '.join(self.harmless)}")
        if self.allowed:
            warn_once(logger, f"{source}: ignored, because you allowed it: {', '.join(self.allowed)}")

    def without_ignored(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration without the ignored keys: reading it again needs no permission and gives no warning."""
        drop = {*self.harmless, *self.allowed}
        return _pruned(config, drop, "")


def _pruned(table: Mapping[str, Any], drop: Collection[str], prefix: str) -> dict[str, Any]:
    return {
        key: _pruned(value, drop, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in table.items()
        if f"{prefix}{key}" not in drop
    }


def _harmless(leaf: str, value: Any, neutral: _Neutral | None, facts: Mapping[str, Any]) -> bool:
    if neutral is not None:
        return value in neutral.values
    if leaf in _SAME_AS:
        return value is None or (facts.get(_SAME_AS[leaf]) is not None and value == facts[_SAME_AS[leaf]])
    return leaf in _BOOKKEEPING or leaf.startswith(_BOOKKEEPING_PREFIXES)


def shortened(value: Any) -> str:
    """A value, shortened for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
