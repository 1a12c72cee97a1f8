"""Reads the geometry of a model from config.json, in both of its spellings. Standard library only.

Released checkpoints write `compress_ratios`, `num_hash_layers`, `rope_scaling` and `qk_rope_head_dim`; transformers saves
`layer_types`, `compress_rates`, `mlp_layer_types`, `rope_parameters` and `partial_rotary_factor`. For every fact, this
takes the value that transformers' DeepseekV4Config computes with. If a file has both spellings and they disagree, it is
refused and the error names both values. The only exception is a top-level default that transformers writes by itself
(export/checkpoint/config_rope.py). The layer schedule always comes from the file, because the defaults of transformers' class swap
CSA and HCA compared with the released checkpoints. One error lists all findings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...artifact import artifact_kind
from ...errors import CheckpointError, listing
from ...inputs import refuse_unreadable_name, snapshot_hint
from ..contract.geometry import CSA, HCA, LAYER_TYPES, SLIDING, ModelSpec
from .config_keys import KeyReport
from .config_rope import ROPE_KEYS, is_number, read_rope
from .storage import unread_file, unread_in_folder, warn_of_unread_weights

_FAMILY = "deepseek_v4"
_RATIO_TO_TYPE = {0: SLIDING, 4: CSA, 128: HCA}
_DEFAULT_RATES = {CSA: 4, HCA: 128}
_SCALAR_RATES = {"compress_rate_csa": CSA, "compress_rate_hca": HCA}

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
}
#: Second names, as in the attribute_map of transformers' class: both names mean the same fact.
_ALIASES = {"n_routed_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"}
# The only values whose computation can be exported.
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": (_FAMILY,),
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
    "compress_ratios", "layer_types", "compress_rates", *_SCALAR_RATES, "num_hash_layers", "mlp_layer_types",
)  # fmt: skip
_READ = (*_INTEGERS, *_NUMBERS, *_ALIASES.values(), *_FIXED, *_SCHEDULES, *ROPE_KEYS)


@dataclass(frozen=True)
class Reading:
    """What a config.json says.

    Attributes:
        spec: the geometry.
        config: the file without the ignored keys.
        allowed: the unknown keys that were ignored because the caller allowed them.
    """

    spec: ModelSpec
    config: dict[str, Any]
    allowed: tuple[str, ...]


def spec_from_config(
    config: Mapping[str, Any], *, source: str = "config.json", allow_unknown_keys: Sequence[str] = ()
) -> ModelSpec:
    """The geometry of a parsed config.json; ``source`` names it in errors and warnings.

    Args:
        config: the parsed file.
        source: where it comes from.
        allow_unknown_keys: unknown keys to ignore instead of refusing them.

    Raises:
        CheckpointError: unknown, missing or contradictory keys, all listed.
    """
    return read_model(config, source=source, allow_unknown_keys=allow_unknown_keys).spec


def spec_from_file(path: Path, *, allow_unknown_keys: Sequence[str] = ()) -> ModelSpec:
    """The geometry of a config.json, or of the one in a checkpoint folder.

    Logs a warning if the weights are stored in a format that is not read.

    Raises:
        CheckpointError: there is no file, it is not a JSON object, or as :func:`spec_from_config`.
    """
    path = Path(path)
    config = read_config(path)
    source = path / "config.json" if path.is_dir() else path
    spec = spec_from_config(config, source=str(source), allow_unknown_keys=allow_unknown_keys)
    warn_of_unread_weights(path, config)
    return spec


def read_config(path: Path) -> dict[str, Any]:
    """A config.json, or the one in a checkpoint folder, as a dict.

    Raises:
        CheckpointError: there is none, or it is not a JSON object. The message names weights in a format that is not read.
    """
    path = Path(path)
    refuse_unreadable_name(path)
    if path.is_dir():
        file = path / "config.json"
        if not file.exists():
            refuse_artifact(path)
        if not file.exists() and (found := unread_in_folder(path)):
            raise CheckpointError(found.message(path))
        if not file.exists() and (hint := snapshot_hint(path)):
            raise CheckpointError(f"{path} has no config.json.{hint}")
        return read_object(file)
    if path.is_file() and (found := unread_file(path)):
        raise CheckpointError(found.message(path))
    return read_object(path)


def refuse_artifact(folder: Path) -> None:
    """Refuse a folder that foldkv wrote where a checkpoint is expected.

    Raises:
        CheckpointError: it has a manifest.
    """
    if kind := artifact_kind(folder):
        raise CheckpointError(
            f"{folder} is a {kind} artifact; expected a checkpoint. Give the checkpoint that it was made from: `foldkv inspect` shows "
            "its path."
        )


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file of a checkpoint as a dict.

    Raises:
        CheckpointError: the file cannot be read or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}. Give the folder of a checkpoint, with its config.json and weights."
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}. Download or write the file again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} contains a JSON {type(value).__name__}; expected an object with model facts.")
    return value


def read_model(
    config: Mapping[str, Any], *, source: str = "config.json", allow_unknown_keys: Sequence[str] = ()
) -> Reading:
    """Read a parsed config.json; a warning lists the keys that are ignored.

    Args:
        config: the parsed file.
        source: its name in errors and warnings.
        allow_unknown_keys: unknown keys to ignore instead of refusing them; nested ones are dotted.

    Raises:
        CheckpointError: unknown, missing or contradictory keys, all listed.
    """
    keys = KeyReport(tuple(allow_unknown_keys))
    spec = _Reader(config, source, keys).read()
    keys.warn(source)
    return Reading(spec, keys.without_ignored(config), tuple(keys.allowed))


class _Reader:
    """Reads one configuration and collects every finding before it refuses."""

    def __init__(self, config: Mapping[str, Any], source: str, keys: KeyReport) -> None:
        self.config = config
        self.source = source
        self.keys = keys
        self.findings: list[str] = []

    def read(self) -> ModelSpec:
        family = self.config.get("model_type", _FAMILY)
        if family != _FAMILY:
            # What else its file has or lacks says nothing: it is another model.
            raise CheckpointError(
                f"{self.source} does not describe a model that can be exported: model_type is {family!r}; only {_FAMILY!r} can be "
                "exported. Use a DeepSeek-V4 checkpoint."
            )
        self._check_fixed()
        fields: dict[str, Any] = {field: self._number(key, integral=True) for key, field in _INTEGERS.items()}
        fields |= {field: self._number(key, integral=False) for key, field in _NUMBERS.items()}
        fields["layer_types"], fields["ratios"] = self._schedule(fields["num_layers"] or 0)
        fields["hash_layers"] = self._hash_layers(len(fields["layer_types"]))
        rope = read_rope(self.config, fields["head_dim"], fields["max_position_embeddings"], self.keys, self.findings)
        fields["rope_theta"], fields["compress_rope_theta"] = rope.theta, rope.compress_theta
        fields["rope_dim"], fields["yarn"] = rope.dim, rope.yarn
        fields["bos_token_id"] = self._token("bos_token_id")
        fields["eos_token_ids"] = self._eos()
        self.keys.judge_all(self.config, _named_elsewhere(fields), _READ)
        self.findings = list(dict.fromkeys([*self.keys.findings, *self.findings]))
        if not self.findings:
            self._relations(fields)
        if self.findings:
            raise CheckpointError(
                listing(
                    f"{self.source} does not describe a model that can be exported",
                    self.findings,
                    f"Correct these keys, or use a DeepSeek-V4 checkpoint.{self.keys.next_step()}",
                )
            )
        return ModelSpec(**fields)

    def _check_fixed(self) -> None:
        if "model_type" not in self.config:
            self.findings.append(f"missing key 'model_type'; expected {_FAMILY!r}")
        for key, allowed in _FIXED.items():
            if key in self.config and self.config[key] not in allowed:
                self.findings.append(f"{key} is {self.config[key]!r}; only {allowed[0]!r} can be exported")

    def _number(self, key: str, *, integral: bool) -> Any:
        value, alias = self.config.get(key), _ALIASES.get(key, "")
        second = self.config.get(alias)
        if value is not None and second is not None and value != second:
            self.findings.append(
                f"{key} is {value!r} and {alias} is {second!r}; both name the same number, and transformers takes {alias}. "
                "Remove the wrong one"
            )
        key, value = (key, value) if value is not None else (alias if second is not None else key, second)
        if value is None:
            self.findings.append(f"missing key {key!r}")
            return None
        if not is_number(value) or (integral and not isinstance(value, int)):
            self.findings.append(f"{key} is {value!r}; expected {'an integer' if integral else 'a number'}")
            return None
        if value <= 0:
            self.findings.append(f"{key} is {value!r}; expected more than 0")
            return None
        return value if integral else float(value)

    def _schedule(self, layers: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
        types, ratios = self.config.get("layer_types"), self.config.get("compress_ratios")
        if types is None and ratios is None:
            self.findings.append("missing key 'compress_ratios' (or 'layer_types'): the schedule is never guessed")
            return (), ()
        if ratios is not None and not _integers(ratios):
            self.findings.append(f"compress_ratios is {ratios!r}; expected a list with one ratio per layer")
            return (), ()
        if types is None:
            types = self._from_ratios(ratios or [])
        if not isinstance(types, list) or len(types) < layers:
            self.findings.append(
                f"the layer schedule has {len(types) if isinstance(types, list) else types!r} layers; expected {layers}"
            )
            return (), ()
        types = types[:layers]  # released files also list the draft head's layers at the end
        for index, kind in enumerate(types):
            if kind not in LAYER_TYPES:
                self.findings.append(f"layer_types[{index}] is {kind!r}; expected one of {', '.join(LAYER_TYPES)}")
        rates = self._rates([kind for kind in (CSA, HCA) if kind in types])
        if ratios is not None:
            self._compare_schedules(types, rates, ratios)
        return tuple(types), tuple(rates.get(kind, 0) if isinstance(kind, str) else 0 for kind in types)

    def _from_ratios(self, ratios: list[int]) -> list[str]:
        bad = sorted({str(ratio) for ratio in ratios if ratio not in _RATIO_TO_TYPE})
        if bad:
            self.findings.append(
                f"compress_ratios has {', '.join(bad)}; only 0, 4 and 128 name a layer kind: give 'layer_types' and 'compress_rates'"
            )
        return [_RATIO_TO_TYPE.get(ratio, SLIDING) for ratio in ratios]

    def _compare_schedules(self, types: list[Any], rates: dict[str, int], ratios: list[int]) -> None:
        """Both give the number of tokens per entry of a layer, so they must agree layer by layer."""
        if len(ratios) < len(types):
            self.findings.append(f"compress_ratios has {len(ratios)} layers and layer_types has {len(types)}")
            return
        explicit = self.config.get("layer_types") is not None
        for index, (kind, ratio) in enumerate(zip(types, ratios, strict=False)):
            expected = rates.get(kind, 0) if isinstance(kind, str) else 0
            if ratio != expected and (explicit or ratio in _RATIO_TO_TYPE):
                named = f"layer_types[{index}] is {kind!r}, " if explicit else ""
                self.findings.append(
                    f"compress_ratios[{index}] is {ratio}; {named}compress_rates give {expected} for it. Remove the wrong one"
                )
                return  # the rest is the same mistake

    def _rates(self, used: list[str]) -> dict[str, int]:
        """Tokens per entry by kind, from compress_rates or from the older names of its two entries."""
        table = self.config.get("compress_rates")
        if table is not None and not isinstance(table, dict):
            self.findings.append(f"compress_rates is {table!r}; expected an object from layer type to ratio")
            table = None
        given: dict[str, Any] = dict(_DEFAULT_RATES if table is None else table)
        for key, kind in _SCALAR_RATES.items():
            value = self.config.get(key)
            if value is None:
                continue
            if table is not None and table.get(kind, value) != value:
                self.findings.append(
                    f"{key} is {value!r} and compress_rates[{kind!r}] is {table[kind]!r}; both name the same number, and "
                    f"transformers takes {key}. Remove the wrong one"
                )
            given[kind] = value
        for kind in used:
            if kind not in given:
                self.findings.append(f"compress_rates has no {kind!r}, but layer_types has; add it")
        rates = {}
        for kind, ratio in given.items():
            if kind not in _DEFAULT_RATES:
                self.findings.append(f"compress_rates has {kind!r}; expected {CSA!r} or {HCA!r}")
            elif not is_number(ratio) or not isinstance(ratio, int) or ratio < 1:
                self.findings.append(f"compress_rates[{kind!r}] is {ratio!r}; expected an integer of at least 1")
            else:
                rates[kind] = ratio
        return rates

    def _hash_layers(self, layers: int) -> tuple[bool, ...]:
        types, count = self.config.get("mlp_layer_types"), self.config.get("num_hash_layers")
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
            self.findings.append(f"num_hash_layers is {count!r}; expected an integer (or 'mlp_layer_types')")
            return ()
        if types is None:
            if count is None:
                self.findings.append("missing key 'num_hash_layers' (or 'mlp_layer_types')")
            return tuple(index < (count or 0) for index in range(layers))
        if not isinstance(types, list) or len(types) < layers or any(t not in ("hash_moe", "moe") for t in types):
            self.findings.append(f"mlp_layer_types is {types!r}; expected {layers} of 'hash_moe' or 'moe'")
            return ()
        hashed = tuple(kind == "hash_moe" for kind in types[:layers])
        if count is not None and hashed != tuple(index < count for index in range(layers)):
            self.findings.append(
                f"num_hash_layers is {count} and mlp_layer_types has 'hash_moe' at {[i for i, h in enumerate(hashed) if h]}; "
                "transformers takes mlp_layer_types. Remove the wrong one"
            )
        return hashed

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


def _integers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _named_elsewhere(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that were read, also under other models' names (export/checkpoint/config_keys.py)."""
    yarn = fields["yarn"]
    return {
        **fields,
        "shared_experts": 1,
        "nope_dim": fields["head_dim"] - fields["rope_dim"] if fields["head_dim"] and fields["rope_dim"] else None,
        "original_max_position_embeddings": yarn.original_max_position_embeddings if yarn else None,
    }
