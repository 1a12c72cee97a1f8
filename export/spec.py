"""ModelSpec: the geometry of a DeepSeek-V4-class model, read from config.json. Standard library only.

Two spellings of the configuration exist and both are read: the released checkpoints'
(`compress_ratios`, `num_hash_layers`, `rope_scaling`) and the one that transformers saves
(`layer_types`, `compress_rates`, `mlp_layer_types`, `rope_parameters`). The layer schedule is always
taken from the file: the defaults of transformers' config class have CSA and HCA swapped against the
released checkpoints. Keys that change the computation in a way that is not exported, and keys that
are not known, are refused; all findings are listed in one error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from foldkv.errors import CheckpointError, listing, nearest

SLIDING = "sliding_attention"
CSA = "compressed_sparse_attention"
HCA = "heavily_compressed_attention"
LAYER_TYPES = (SLIDING, CSA, HCA)
_RATIO_TO_TYPE = {0: SLIDING, 4: CSA, 128: HCA}
_DEFAULT_RATES = {CSA: 4, HCA: 128}

_INTEGERS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "head_dim": "head_dim",
    "q_lora_rank": "q_lora_rank",
    "o_groups": "o_groups",
    "o_lora_rank": "o_lora_rank",
    "sliding_window": "sliding_window",
    "index_n_heads": "index_heads",
    "index_head_dim": "index_head_dim",
    "index_topk": "index_topk",
    "n_routed_experts": "num_experts",
    "num_experts_per_tok": "experts_per_token",
    "moe_intermediate_size": "moe_intermediate_size",
    "hc_mult": "hc_mult",
    "hc_sinkhorn_iters": "hc_sinkhorn_iters",
    "max_position_embeddings": "max_position_embeddings",
}
_NUMBERS = {
    "routed_scaling_factor": "routed_scaling_factor",
    "swiglu_limit": "swiglu_limit",
    "hc_eps": "hc_eps",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "compress_rope_theta": "compress_rope_theta",
}
# Values that are the only ones whose computation is exported.
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("deepseek_v4",),
    "num_key_value_heads": (1,),
    "n_shared_experts": (1,),
    "scoring_func": ("sqrtsoftplus",),
    "topk_method": ("noaux_tc",),
    "norm_topk_prob": (True,),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "tie_word_embeddings": (False,),
    "attention_dropout": (0, 0.0),
}
_SCHEDULES = (
    "compress_ratios", "layer_types", "compress_rates", "compress_rate_csa", "compress_rate_hca", "num_hash_layers",
    "mlp_layer_types", "rope_scaling", "rope_parameters", "qk_rope_head_dim", "partial_rotary_factor",
)  # fmt: skip
# Facts that change neither the graph nor its state: training, sampling, storage, bookkeeping.
_WITHOUT_EFFECT = (
    "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "torch_dtype", "dtype",
    "use_cache", "expert_dtype", "quantization_config", "num_nextn_predict_layers", "transformers_version",
    "output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "num_local_experts", "intermediate_size",
    "return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "is_encoder_decoder",
    "id2label", "label2id", "problem_type", "_name_or_path", "attn_implementation", "default_partial_rotary_factor",
    "default_compress_rates", "default_num_hash_layers", "auto_map", "max_window_layers", "use_sliding_window",
    "dspark_block_size", "dspark_noise_token_id", "dspark_target_layer_ids", "dspark_markov_rank",
)  # fmt: skip
_KNOWN = (*_INTEGERS, *_NUMBERS, *_FIXED, *_SCHEDULES, *_WITHOUT_EFFECT)


@dataclass(frozen=True)
class Yarn:
    """YaRN scaling of the rotary frequencies of compressed layers (no mscale on cos and sin)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float


@dataclass(frozen=True)
class ModelSpec:
    """The geometry of one model. All sizes in elements; ``ratios`` in tokens per compressed entry."""

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
    def from_config(cls, config: Mapping[str, Any], *, source: str = "config.json") -> ModelSpec:
        """The spec of a parsed config.json; ``source`` names it in errors.

        Raises:
            CheckpointError: unknown, missing or contradictory keys, all listed.
        """
        return _Reader(config, source).read()

    @classmethod
    def from_file(cls, path: Path) -> ModelSpec:
        """The spec of a config.json, or of the one in a checkpoint folder.

        Raises:
            CheckpointError: no such file, not a JSON object, or as :meth:`from_config`.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        return cls.from_config(read_config(path), source=str(path))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]


def read_config(path: Path) -> dict[str, Any]:
    """A config.json as a dict.

    Raises:
        CheckpointError: the file cannot be read or is not a JSON object.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}. Give the folder of a checkpoint that has a config.json."
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}. Download or write the file again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; expected an object with model facts.")
    return value


class _Reader:
    """Reads one configuration and collects every finding before it refuses."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self.config = config
        self.source = source
        self.findings: list[str] = []

    def read(self) -> ModelSpec:
        config = self.config
        self._check_keys()
        fields: dict[str, Any] = {}
        for key, field in _INTEGERS.items():
            fields[field] = self._number(
                key, integral=True, alias="num_local_experts" if key == "n_routed_experts" else None
            )
        for key, field in _NUMBERS.items():
            fields[field] = self._number(key, integral=False)
        layers = fields["num_layers"] or 0
        fields["layer_types"], fields["ratios"] = self._schedule(layers)
        fields["hash_layers"] = self._hash_layers(layers)
        fields["rope_dim"] = self._rope_dim(fields["head_dim"])
        fields["yarn"] = self._yarn(fields)
        fields["bos_token_id"] = self._token("bos_token_id")
        fields["eos_token_ids"] = self._eos()
        if not self.findings:
            self._relations(fields)
        if self.findings:
            raise CheckpointError(
                listing(
                    f"{self.source} does not describe a model that can be exported",
                    self.findings,
                    "Correct these keys, or use a DeepSeek-V4 checkpoint.",
                )
            )
        del config
        return ModelSpec(**fields)

    def _check_keys(self) -> None:
        for key in self.config:
            if key not in _KNOWN:
                self.findings.append(f"unknown key {key!r} (value {self.config[key]!r}){nearest(key, _KNOWN)}")
        if "model_type" not in self.config:
            self.findings.append("missing key 'model_type'; expected 'deepseek_v4'")
        for key, allowed in _FIXED.items():
            if key in self.config and self.config[key] not in allowed:
                self.findings.append(f"{key} is {self.config[key]!r}; only {allowed[0]!r} can be exported")

    def _number(self, key: str, *, integral: bool, alias: str | None = None) -> Any:
        value = self.config.get(key, self.config.get(alias) if alias else None)
        if value is None and key in ("rope_theta", "compress_rope_theta"):
            nested = self.config.get("rope_parameters")
            branch = nested.get("main" if key == "rope_theta" else "compress") if isinstance(nested, dict) else None
            value = branch.get("rope_theta") if isinstance(branch, dict) else None
        if value is None:
            self.findings.append(f"missing key {key!r}")
            return None
        allowed = int if integral else (int, float)
        if isinstance(value, bool) or not isinstance(value, allowed):
            self.findings.append(f"{key} is {value!r}; expected {'an integer' if integral else 'a number'}")
            return None
        if value <= 0:
            self.findings.append(f"{key} is {value!r}; expected more than 0")
            return None
        return value if integral else float(value)

    def _schedule(self, layers: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
        types = self.config.get("layer_types")
        legacy = self.config.get("compress_ratios")
        if types is None and legacy is None:
            self.findings.append("missing key 'compress_ratios' (or 'layer_types'): the schedule is never guessed")
            return (), ()
        if types is None:
            types = self._from_ratios(legacy)
        if not isinstance(types, list) or len(types) < layers:
            self.findings.append(
                f"the layer schedule has {len(types) if isinstance(types, list) else types!r} layers; expected {layers}"
            )
            return (), ()
        types = types[:layers]  # released files append the layers of the draft head
        rates = self._rates()
        for index, kind in enumerate(types):
            if kind not in LAYER_TYPES:
                self.findings.append(f"layer_types[{index}] is {kind!r}; expected one of {', '.join(LAYER_TYPES)}")
        return tuple(types), tuple(rates.get(kind, 0) for kind in types)

    def _from_ratios(self, ratios: Any) -> list[str]:
        if not isinstance(ratios, list):
            self.findings.append(f"compress_ratios is {ratios!r}; expected a list with one ratio per layer")
            return []
        bad = sorted({str(ratio) for ratio in ratios if ratio not in _RATIO_TO_TYPE})
        if bad:
            self.findings.append(
                f"compress_ratios has {', '.join(bad)}; only 0, 4 and 128 name a layer kind: give 'layer_types' and 'compress_rates'"
            )
        return [_RATIO_TO_TYPE.get(ratio, SLIDING) for ratio in ratios]

    def _rates(self) -> dict[str, int]:
        rates = dict(_DEFAULT_RATES)
        given = self.config.get("compress_rates") or {}
        if not isinstance(given, dict):
            self.findings.append(f"compress_rates is {given!r}; expected an object from layer type to ratio")
            given = {}
        given = {**given}
        for key, kind in (("compress_rate_csa", CSA), ("compress_rate_hca", HCA)):
            if self.config.get(key) is not None:
                given[kind] = self.config[key]
        for kind, ratio in given.items():
            if kind not in rates:
                self.findings.append(f"compress_rates has {kind!r}; expected {CSA!r} or {HCA!r}")
            elif isinstance(ratio, bool) or not isinstance(ratio, int) or ratio < 1:
                self.findings.append(f"compress_rates[{kind!r}] is {ratio!r}; expected an integer of at least 1")
            else:
                rates[kind] = ratio
        return rates

    def _hash_layers(self, layers: int) -> tuple[bool, ...]:
        types = self.config.get("mlp_layer_types")
        if types is not None:
            if not isinstance(types, list) or len(types) < layers or any(t not in ("hash_moe", "moe") for t in types):
                self.findings.append(f"mlp_layer_types is {types!r}; expected {layers} of 'hash_moe' or 'moe'")
                return ()
            return tuple(kind == "hash_moe" for kind in types[:layers])
        count = self.config.get("num_hash_layers")
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            self.findings.append(f"num_hash_layers is {count!r}; expected an integer (or 'mlp_layer_types')")
            return ()
        return tuple(index < count for index in range(layers))

    def _rope_dim(self, head_dim: int | None) -> int:
        value = self.config.get("qk_rope_head_dim")
        factor = self.config.get("partial_rotary_factor")
        nested = self.config.get("rope_parameters")
        if factor is None and isinstance(nested, dict) and isinstance(nested.get("compress"), dict):
            factor = nested["compress"].get("partial_rotary_factor")
        if value is None and isinstance(factor, (int, float)) and head_dim:
            value = int(head_dim * factor)
        if isinstance(value, bool) or not isinstance(value, int) or value < 2 or value % 2:
            self.findings.append(
                f"qk_rope_head_dim is {value!r}; expected an even integer (or 'partial_rotary_factor')"
            )
            return 0
        return value

    def _yarn(self, fields: dict[str, Any]) -> Yarn | None:
        scaling = self.config.get("rope_scaling")
        nested = self.config.get("rope_parameters")
        if scaling is None and isinstance(nested, dict):
            scaling = nested.get("compress") if isinstance(nested.get("compress"), dict) else nested
            main = nested.get("main")
            if isinstance(main, dict) and main.get("rope_type", "default") != "default":
                self.findings.append(
                    f"rope_parameters.main is {main.get('rope_type')!r}; sliding layers have no scaling"
                )
        if scaling is None:
            return None
        if not isinstance(scaling, dict):
            self.findings.append(f"rope_scaling is {scaling!r}; expected an object")
            return None
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind == "default":
            return None
        if kind != "yarn":
            self.findings.append(f"rope scaling {kind!r} cannot be exported; expected 'yarn' or 'default'")
            return None
        if scaling.get("attention_factor", 1.0) != 1.0:
            self.findings.append(f"rope attention_factor is {scaling['attention_factor']!r}; V4 uses 1.0")
        if scaling.get("truncate", True) is not True:
            self.findings.append("rope 'truncate' is false; only truncated YaRN ranges can be exported")
        unknown = set(scaling) - {
            "type", "rope_type", "factor", "beta_fast", "beta_slow", "original_max_position_embeddings", "rope_theta",
            "partial_rotary_factor", "attention_factor", "truncate",
        }  # fmt: skip
        for key in sorted(unknown):
            self.findings.append(f"unknown key {key!r} in the rope scaling (value {scaling[key]!r})")
        original = scaling.get("original_max_position_embeddings", fields["max_position_embeddings"])
        factor = scaling.get("factor")
        if not isinstance(factor, (int, float)) or factor < 1 or not isinstance(original, int) or original < 1:
            self.findings.append(
                f"yarn factor {factor!r} with original_max_position_embeddings {original!r}; expected numbers of at least 1"
            )
            return None
        return Yarn(
            float(factor), original, float(scaling.get("beta_fast") or 32), float(scaling.get("beta_slow") or 1)
        )

    def _token(self, key: str) -> int | None:
        value = self.config.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            self.findings.append(f"{key} is {value!r}; expected a token id or null")
            return None
        return value

    def _eos(self) -> tuple[int, ...]:
        value = self.config.get("eos_token_id")
        values = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) for item in values):
            self.findings.append(f"eos_token_id is {value!r}; expected a token id, a list of them or null")
            return ()
        return tuple(values)

    def _relations(self, f: dict[str, Any]) -> None:
        if f["rope_dim"] > min(f["head_dim"], f["index_head_dim"]):
            self.findings.append(
                f"qk_rope_head_dim {f['rope_dim']} is larger than head_dim {f['head_dim']} or index_head_dim {f['index_head_dim']}"
            )
        if f["num_heads"] * f["head_dim"] % f["o_groups"]:
            self.findings.append(
                f"o_groups {f['o_groups']} does not divide the {f['num_heads']} x {f['head_dim']} attention output"
            )
        if f["experts_per_token"] > f["num_experts"]:
            self.findings.append(
                f"num_experts_per_tok {f['experts_per_token']} is more than n_routed_experts {f['num_experts']}"
            )
