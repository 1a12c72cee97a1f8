"""Plans on disk: an engine is built once for a segment, a compute capability, shapes and versions, whatever the weights.

A key is a digest of everything that a plan depends on. So a fine-tune of a model takes the plans of the model, and targets of
one compute capability take each other's. The folder can be shared between machines: a plan is written beside its place and
moved there whole, and is taken only if its sha256 is the one that was recorded with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..inputs import cache_folder

_building: dict[str, threading.Lock] = {}
_adding = threading.Lock()


class PlanCache:
    """A folder of plans by key."""

    def __init__(self, folder: Path | None = None) -> None:
        """In ``folder``, by default ``FOLDKV_CACHE`` or ~/.cache/foldkv."""
        self.folder = (folder or cache_folder()) / "engines"

    @contextlib.contextmanager
    def alone(self, key: str) -> Iterator[None]:
        """Hold a key: another thread that wants to build the same plan waits, and then finds it."""
        with _adding:
            lock = _building.setdefault(f"{self.folder}/{key}", threading.Lock())
        with lock:
            yield

    def take(self, key: str, plan: Path) -> dict[str, Any] | None:
        """Copy the plan of a key to ``plan`` and return its facts; None if there is none, or it is damaged."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            facts = json.loads((self.folder / f"{key}.json").read_bytes())
            content = (self.folder / f"{key}.plan").read_bytes()
            if hashlib.sha256(content).hexdigest() == facts["sha256"]:
                plan.write_bytes(content)
                found: dict[str, Any] = facts["facts"]
                return found
        return None

    def keep(self, key: str, plan: Path, facts: dict[str, Any]) -> None:
        """Keep a plan with what is known of it; a cache that cannot be written is not used."""
        content = plan.read_bytes()
        row = {"sha256": hashlib.sha256(content).hexdigest(), "facts": facts}
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            for name, data in ((f"{key}.plan", content), (f"{key}.json", json.dumps(row).encode())):
                part = self.folder / f"{name}.{os.getpid()}-{secrets.token_hex(4)}"
                try:
                    part.write_bytes(data)
                    part.replace(self.folder / name)
                finally:
                    part.unlink(missing_ok=True)
