"""Targets: the machines that engines can be built for, read from targets.toml."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

from ..backends import BACKENDS, Backend, backend_named
from ..errors import InputError, listing, nearest
from ..manifests import TargetFacts
from ..records import to_json


@dataclass(frozen=True)
class Target(TargetFacts):
    """A machine that bundles are built for, with its fields as in manifests."""

    @property
    def backend(self) -> Backend:
        """The backend that builds for it here: the first of its list.

        Raises:
            InputError: a target of your own names a backend that there is none of.
        """
        return backend_named(self.backends[0])

    def built_by(self, backend: Backend) -> Target:
        """The same machine with a backend that builds for it in the first place, and the precision that this one needs."""
        others = tuple(name for name in self.backends if name != backend.name)
        return replace(self, backends=(backend.name, *others), precision=backend.precision or self.precision)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return dict(to_json(self))


@functools.cache
def load_targets() -> dict[str, Target]:
    """All targets by name, each with the backends that build for its compute capability."""
    table = tomllib.loads(resources.files("foldkv.optimize").joinpath("targets.toml").read_text())
    return {name: Target(name, _backends(row.get("sm")), **row) for name, row in table["targets"].items()}


def _backends(sm: int | None) -> tuple[str, ...]:
    return tuple(backend.name for backend in BACKENDS.values() if backend.builds_for(sm))


def resolve_targets(names: Sequence[str | Target], backend: str | None = None) -> list[Target]:
    """The targets with these names, each once, in their order; without a backend, a target is returned unchanged.

    Args:
        names: of the table, or your own targets.
        backend: that builds for the GPUs among them, or for the cpu, instead of the first of their lists. The cpu beside GPUs keeps
            its own.

    Raises:
        InputError: no name, unknown names, or targets that the backend does not build for; all are listed.
    """
    known = load_targets()
    unknown = [f"{n!r}{nearest(n, list(known))}" for n in names if isinstance(n, str) and n not in known]
    if unknown or not names:
        what = f"unknown target {', '.join(unknown)}" if unknown else "no target given"
        raise InputError(f"{what}. Targets are {', '.join(known)}; see `foldkv targets`.")
    targets = [known[name] if isinstance(name, str) else name for name in dict.fromkeys(names)]
    return targets if backend is None else _built_by(backend_named(backend), targets)


def _built_by(backend: Backend, targets: Sequence[Target]) -> list[Target]:
    gpus = any(target.backend.gpu for target in targets)
    chosen, findings = [], []
    for target in targets:
        if backend.builds_for(target.sm):
            chosen.append(target.built_by(backend))
            continue
        if target.backend.gpu or not gpus:
            findings.append(f"{target.name} is built by {', '.join(target.backends)}")
        chosen.append(target)
    if findings:
        title = f"the backend {backend.name} does not build for these targets"
        raise InputError(listing(title, findings, "Leave out --backend, or choose other targets."))
    return chosen
