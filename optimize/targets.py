"""Targets: the machines that engines can be built for, read from targets.toml."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

from ..errors import InputError, nearest


@dataclass(frozen=True)
class Target:
    """One machine: compute capability, memory (GiB), bandwidth (GB/s), backends in order of preference."""

    name: str
    backends: tuple[str, ...]
    precision: str
    sm: int | None = None
    memory_gib: int | None = None
    bandwidth_gb_s: int | None = None

    @property
    def backend(self) -> str:
        """The backend that builds for it here: the first of its list."""
        return self.backends[0]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {**asdict(self), "backends": list(self.backends)}


@functools.cache
def load_targets() -> dict[str, Target]:
    """All targets by name."""
    table = tomllib.loads(resources.files("foldkv.optimize").joinpath("targets.toml").read_text())
    return {name: Target(name, **{**row, "backends": tuple(row["backends"])}) for name, row in table["targets"].items()}


def resolve_targets(names: Sequence[str | Target]) -> list[Target]:
    """The targets with these names, each once, in their order; a target is returned unchanged.

    Raises:
        InputError: no name, or unknown names; all are listed.
    """
    known = load_targets()
    unknown = [f"{n!r}{nearest(n, list(known))}" for n in names if isinstance(n, str) and n not in known]
    if unknown or not names:
        what = f"unknown target {', '.join(unknown)}" if unknown else "no target given"
        raise InputError(f"{what}. Targets are {', '.join(known)}; see `foldkv targets`.")
    return [known[name] if isinstance(name, str) else name for name in dict.fromkeys(names)]
