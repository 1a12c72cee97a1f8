"""Rotary frequencies in config.json, resolved like in transformers' DeepseekV4Config. Standard library only.

There are three forms:

* ``rope_scaling``, or a flat ``rope_parameters``: the scaling of compressed layers. Their theta is ``compress_rope_theta``.
  The theta of sliding layers is ``rope_theta``, and the rotated width is ``partial_rotary_factor`` or ``qk_rope_head_dim``.
* ``rope_parameters`` (or ``rope_scaling``) with ``main`` and ``compress``: each has its own theta and factor, and those count.
  transformers still writes the top-level keys beside them, with its class's defaults if nobody set them. So a default
  there is not a contradiction; any other different value is.
* neither: no scaling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from ..contract.geometry import Yarn
from .config_keys import KeyReport, shortened

ROPE_KEYS = (
    "rope_theta", "compress_rope_theta", "rope_scaling", "rope_parameters", "qk_rope_head_dim", "partial_rotary_factor",
)  # fmt: skip
_MAIN, _COMPRESS = "main", "compress"
#: What transformers' class writes for missing keys.
_CLASS_DEFAULTS = {"rope_theta": 10000, "compress_rope_theta": 160000, "partial_rotary_factor": 64 / 512}
_BRANCH_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_YARN_KEYS = (
    "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "truncate",
)  # fmt: skip


@dataclass(frozen=True)
class Rope:
    """Thetas of sliding and of compressed layers, the rotated channels, and the scaling of compressed layers.

    A value that could not be read is None, or 0 for ``dim``; a finding says why.
    """

    theta: float | None = None
    compress_theta: float | None = None
    dim: int = 0
    yarn: Yarn | None = None


def read_rope(
    config: Mapping[str, Any], head_dim: int | None, max_positions: int | None, keys: KeyReport, findings: list[str]
) -> Rope:
    """The rotary facts of a configuration; everything wrong or contradictory is added to ``findings``.

    Args:
        config: a parsed config.json.
        head_dim: channels of a head, if they could be read.
        max_positions: ``max_position_embeddings``, if it could be read.
        keys: decides on keys inside the tables that are not read.
        findings: one sentence per problem.
    """
    ropes: dict[str, Rope] = {}
    reader = _RopeReader(config, head_dim, max_positions, keys, findings)
    for label in ("rope_scaling", "rope_parameters"):
        table = config.get(label)
        if table is not None and not isinstance(table, dict):
            findings.append(f"{label} is {table!r}; expected an object")
        elif table:
            ropes[label] = reader.table(label, table)
    if len(ropes) == 2 and ropes["rope_scaling"] != ropes["rope_parameters"] and not findings:
        findings.append(
            f"rope_scaling gives {ropes['rope_scaling']} and rope_parameters gives {ropes['rope_parameters']}; transformers "
            "takes rope_scaling. Remove the wrong one"
        )
    return next(iter(ropes.values())) if ropes else reader.table("rope_parameters", {})


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a JSON value is a usable number: not a boolean, finite, within 64 bits."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -(2**63) < value < 2**63


class _RopeReader:
    def __init__(
        self, config: Mapping[str, Any], head_dim: int | None, max_positions: int | None, keys: KeyReport,
        findings: list[str],
    ) -> None:  # fmt: skip
        self.config = config
        self.head_dim = head_dim
        self.max_positions = max_positions
        self.keys = keys
        self.findings = findings

    def table(self, label: str, table: dict[str, Any]) -> Rope:
        """The meaning of one of the two tables."""
        nested = [key for key in (_MAIN, _COMPRESS) if table.get(key) is not None]
        if nested and not all(isinstance(table.get(key), dict) for key in (_MAIN, _COMPRESS)):
            found = " and ".join(f"{key!r} {shortened(table.get(key))}" for key in (_MAIN, _COMPRESS))
            self.findings.append(
                f"{label} has {found}; transformers then ignores both. Give both as objects, or neither"
            )
            return Rope()
        return self._nested(label, table) if nested else self._flat(label, table)

    def _flat(self, label: str, table: dict[str, Any]) -> Rope:
        theta = self._positive("rope_theta", self.config.get("rope_theta"))
        compress = self._positive("compress_rope_theta", self.config.get("compress_rope_theta"))
        dim = self._top_level_dim()
        within = table.get("rope_theta")
        if within is not None and None not in (theta, compress) and within not in (theta, compress):
            self.findings.append(
                f"{label}.rope_theta is {within!r}, rope_theta is {theta:g} and compress_rope_theta is {compress:g}; "
                f"transformers takes the last two. Remove the first, or correct them"
            )
        factor = table.get("partial_rotary_factor")
        if factor is not None and self.head_dim and dim and self._channels(factor) != dim:
            self.findings.append(
                f"{label}.partial_rotary_factor is {factor!r}, which is not {dim} of {self.head_dim} channels as "
                f"{self._top_level_dim_name()} says; transformers takes the latter. Remove the wrong one"
            )
        empty = [key for key in (_MAIN, _COMPRESS) if key in table]
        if empty and "original_max_position_embeddings" not in table and self._kind(label, table) == "yarn":
            self.findings.append(
                f"{label}.{empty[0]} is null, and transformers then refuses yarn without original_max_position_embeddings. "
                f"Remove {empty[0]}, or add that key"
            )
        return Rope(theta, compress, dim, self._yarn(label, table, forced=True))

    def _nested(self, label: str, table: dict[str, Any]) -> Rope:
        main, compress = table[_MAIN], table[_COMPRESS]
        theta = self._branch_theta(label, _MAIN, main, "rope_theta")
        compress_theta = self._branch_theta(label, _COMPRESS, compress, "compress_rope_theta")
        dims = {name: self._branch_dim(f"{label}.{name}", table[name]) for name in (_MAIN, _COMPRESS)}
        dim = dims[_MAIN]
        if None not in dims.values() and dim != dims[_COMPRESS]:
            self.findings.append(
                f"{label} rotates {dim} channels in main and {dims[_COMPRESS]} in compress; only one width can be exported"
            )
        elif dim is not None:
            self._compare_dim(label, dim)
        if (kind := self._kind(f"{label}.{_MAIN}", main)) != "default":
            self.findings.append(f"{label}.{_MAIN} is {kind!r}; sliding layers have no scaling")
        else:
            self._unscaled(f"{label}.{_MAIN}", main)
        self._leftovers(label, table)
        return Rope(theta, compress_theta, dim or 0, self._yarn(f"{label}.{_COMPRESS}", compress, forced=False))

    def _branch_theta(self, label: str, name: str, branch: dict[str, Any], key: str) -> float | None:
        """Theta of a branch. If it has none, transformers takes the top-level ``rope_theta`` for both branches."""
        own, top = branch.get("rope_theta"), self.config.get(key)
        if own is None:
            own = self.config.get("rope_theta")
            if top is not None and own is not None and top != own:
                self.findings.append(
                    f"{label}.{name} has no rope_theta, so transformers takes rope_theta, {own!r}, and not {key}, {top!r}. "
                    "Add the right one to it"
                )
        elif top is not None and top not in (own, _CLASS_DEFAULTS[key]):
            self.findings.append(
                f"{label}.{name}.rope_theta is {own!r} and {key} is {top!r}; transformers takes the first. Remove the wrong one"
            )
        return self._positive(f"{label}.{name}.rope_theta", own)

    def _branch_dim(self, label: str, branch: dict[str, Any]) -> int | None:
        factor = branch.get("partial_rotary_factor")
        if factor is None:
            factor = self.config.get("partial_rotary_factor")
        if factor is None:
            self.findings.append(
                f"{label} has no partial_rotary_factor; transformers then rotates all channels and ignores qk_rope_head_dim. "
                "Add it"
            )
            return None
        return self._width(f"{label}.partial_rotary_factor", factor)

    def _compare_dim(self, label: str, dim: int) -> None:
        """Compare the rotated channels of the branches with the top-level keys."""
        factor, width = self.config.get("partial_rotary_factor"), self.config.get("qk_rope_head_dim")
        if factor is None and width is None:
            return
        if factor == _CLASS_DEFAULTS["partial_rotary_factor"] and width in (None, self._channels(factor)):
            return
        if (top := self._top_level_dim()) and top != dim:
            self.findings.append(
                f"{label} rotates {dim} of {self.head_dim} channels and {self._top_level_dim_name()} says {top}; transformers "
                "takes the first. Remove the wrong one"
            )

    def _top_level_dim_name(self) -> str:
        return "qk_rope_head_dim" if self.config.get("partial_rotary_factor") is None else "partial_rotary_factor"

    def _top_level_dim(self) -> int:
        """Rotated channels according to the keys beside the tables, or 0."""
        factor, width = self.config.get("partial_rotary_factor"), self.config.get("qk_rope_head_dim")
        if width is not None and (not is_number(width) or not isinstance(width, int) or width < 2 or width % 2):
            self.findings.append(
                f"qk_rope_head_dim is {width!r}; expected an even integer (or 'partial_rotary_factor')"
            )
            return 0
        if factor is None:
            if width is None:
                self.findings.append("missing key 'qk_rope_head_dim' (or 'partial_rotary_factor')")
                return 0
            if self.head_dim and self._channels(width / self.head_dim) != width:  # transformers divides and rounds down
                self.findings.append(
                    f"qk_rope_head_dim is {width} and head_dim is {self.head_dim}: transformers rotates "
                    f"{self._channels(width / self.head_dim)} channels then. Choose a head_dim that divides exactly"
                )
                return 0
            return width
        dim = self._width("partial_rotary_factor", factor)
        if dim and width is not None and dim != width:
            self.findings.append(
                f"qk_rope_head_dim is {width} and partial_rotary_factor is {factor!r}, which is {dim} of {self.head_dim} channels; "
                "transformers takes the second. Remove the wrong one"
            )
        return dim or 0

    def _width(self, name: str, factor: Any) -> int | None:
        """An even number of rotated channels from a factor, or None."""
        if not is_number(factor) or not 0 < factor <= 1:
            self.findings.append(f"{name} is {factor!r}; expected a number above 0 and at most 1")
            return None
        width = self._channels(factor)
        if width is None:
            return None
        if width < 2 or width % 2:
            self.findings.append(
                f"{name} is {factor!r}, which is {width} of {self.head_dim} channels; expected an even number"
            )
            return None
        return width

    def _channels(self, factor: Any) -> int | None:
        if self.head_dim is None or not is_number(factor):
            return None
        return int(self.head_dim * factor)

    def _positive(self, name: str, value: Any) -> float | None:
        if value is None:
            self.findings.append(f"missing key {name!r}")
        elif not is_number(value):
            self.findings.append(f"{name} is {value!r}; expected a number")
        elif value <= 0:
            self.findings.append(f"{name} is {value!r}; expected more than 0")
        else:
            return float(value)
        return None

    def _kind(self, label: str, table: dict[str, Any]) -> Any:
        kinds = [table[key] for key in ("rope_type", "type") if key in table]
        if len(kinds) == 2 and kinds[0] != kinds[1]:
            self.findings.append(
                f"{label}.rope_type is {kinds[0]!r} and {label}.type is {kinds[1]!r}; transformers takes the first. Remove the wrong one"
            )
        return kinds[0] if kinds else "default"

    def _yarn(self, label: str, table: dict[str, Any], *, forced: bool) -> Yarn | None:
        """The scaling in a table; ``forced``: transformers sets an ``attention_factor`` of 1 if the table has none."""
        kind = self._kind(label, table)
        if kind == "default":
            self._unscaled(label, table)
            return None
        if kind != "yarn":
            self.findings.append(f"{label}: rope scaling {kind!r} cannot be exported; expected 'yarn' or 'default'")
            return None
        self._unread(label, table, (*_BRANCH_KEYS, *_YARN_KEYS))
        factor = table.get("factor")
        original = table.get("original_max_position_embeddings", self.max_positions)
        fast, slow = table.get("beta_fast") or 32, table.get("beta_slow") or 1
        if not is_number(factor) or factor < 1 or not is_number(original) or type(original) is not int or original < 1:
            self.findings.append(
                f"{label}: yarn factor {factor!r} with original_max_position_embeddings {original!r}; expected numbers of at least 1"
            )
            return None
        if not is_number(fast) or not is_number(slow) or fast <= 0 or slow <= 0:
            self.findings.append(f"{label}: beta_fast is {fast!r} and beta_slow is {slow!r}; expected numbers above 0")
            return None
        if table.get("truncate", True) is not True:
            self.findings.append(
                f"{label}.truncate is {table['truncate']!r}; only truncated YaRN ranges can be exported"
            )
        scale = _attention_factor(table, factor, forced)
        if not is_number(scale):
            self.findings.append(f"{label}.attention_factor is {scale!r}; expected a number")
        elif scale != 1:
            given = table.get("attention_factor")
            why = "has no attention_factor" if given is None else f"has the attention_factor {given!r}"
            self.findings.append(
                f"{label} {why}, so transformers scales cos and sin by {scale:.4g}; only 1 can be exported. The released "
                "models have attention_factor 1.0"
            )
        return Yarn(float(factor), original, float(fast), float(slow))

    def _unscaled(self, label: str, table: dict[str, Any]) -> None:
        """Look for signs of a scaling in a table whose type says that there is none."""
        self._unread(label, table, (*_BRANCH_KEYS, *_YARN_KEYS))
        for key in ("factor", "attention_factor"):
            if table.get(key) not in (None, 1):
                self.findings.append(
                    f"{label}.{key} is {table[key]!r} but its rope_type is 'default', so transformers ignores it. "
                    f"Name the type, or remove {key}"
                )

    def _unread(self, label: str, table: dict[str, Any], read: tuple[str, ...]) -> None:
        facts = {"original_max_position_embeddings": table.get("original_max_position_embeddings")}
        for key, value in table.items():
            if key not in read and key not in (_MAIN, _COMPRESS):
                self.keys.judge(f"{label}.{key}", value, facts, read, table.keys())

    def _leftovers(self, label: str, table: dict[str, Any]) -> None:
        """Check keys beside the two branches: transformers drops them, so they must agree with a branch."""
        for key, value in table.items():
            if key in (_MAIN, _COMPRESS):
                continue
            values = [table[name].get(key) for name in (_MAIN, _COMPRESS)]
            if value is not None and value not in values:
                self.findings.append(
                    f"{label}.{key} is {value!r}; main has {values[0]!r} and compress has {values[1]!r} for it, and transformers takes "
                    "those. Remove the wrong one"
                )


def _attention_factor(table: Mapping[str, Any], factor: float, forced: bool) -> Any:
    """The factor by which transformers multiplies cos and sin (`_compute_yarn_parameters`)."""
    given = table.get("attention_factor", 1.0 if forced else None)
    if given is not None:
        return given
    first, second = table.get("mscale"), table.get("mscale_all_dim")
    if is_number(first) and is_number(second) and first and second:
        return _mscale(factor, first) / _mscale(factor, second)
    return _mscale(factor, 1)


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0
