"""What TensorRT-RTX compiled for the GPU at hand, kept on disk between processes: its *runtime cache*, one per plan.

All contexts of a plan share it, so a kind of layer is compiled once and not once per layer. The library itself refuses what another
GPU, version or driver made.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
from typing import Any

from ..caches import cache_folder, keep

log = logging.getLogger("foldkv.engine")
_DIGEST = 32  # bytes of sha256, which stand before the content of a file


class RuntimeCaches:
    """The runtime caches of the plans that one GPU runs. Several threads can use it."""

    def __init__(self, device: str) -> None:
        """Args: device: the kind of GPU, such as "sm120"; each has caches of its own."""
        self._folder = cache_folder() / "runtime" / device
        self._lock = threading.Lock()
        self._open: dict[str, Any] = {}
        self._kept: dict[str, bytes] = {}

    def attach(self, config: Any, plan: str) -> None:
        """Let contexts of a runtime configuration use the cache of a plan.

        Args:
            config: an ``IRuntimeConfig`` of the plan's engine.
            plan: sha256 of the plan.
        """
        with self._lock:
            if plan not in self._open:
                cache, content = config.create_runtime_cache(), self._read(plan)
                if content and not cache.deserialize(content):
                    log.info(
                        "the runtime cache of plan %s is of another version, GPU or driver; it is made again", plan[:16]
                    )
                    content = b""
                self._open[plan], self._kept[plan] = cache, content
            if not config.set_runtime_cache(self._open[plan]):
                log.info("the library takes no runtime cache for plan %s", plan[:16])

    def save(self) -> None:
        """Write what was compiled since the caches were read or written. A disk that takes nothing only costs time."""
        with self._lock:
            for plan, cache in self._open.items():
                made = cache.serialize()
                content = b"" if made is None else bytes(made)
                if content and content != self._kept[plan]:
                    row = hashlib.sha256(content).digest() + content
                    if keep(self._folder / plan, lambda path, row=row: path.write_bytes(row)):  # type: ignore[misc]
                        self._kept[plan] = content

    def close(self) -> None:
        """Save, and let go of the caches; no context may use them any more."""
        self.save()
        self._open, self._kept = {}, {}

    def _read(self, plan: str) -> bytes:
        """The content of a file that is whole; else nothing."""
        with contextlib.suppress(OSError):
            row = (self._folder / plan).read_bytes()
            if hashlib.sha256(row[_DIGEST:]).digest() == row[:_DIGEST]:
                return row[_DIGEST:]
        return b""
