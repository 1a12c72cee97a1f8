"""A manifest that remembers which of its keys were asked for and are not there."""

from __future__ import annotations

from typing import Any


class Recorded(dict[str, Any]):
    """A table of a manifest; ``read`` and ``missing`` are paths such as ``model.vocab_size`` and ``state[].width``."""

    def __init__(
        self, table: dict[str, Any], path: str = "", read: set[str] | None = None, missing: set[str] | None = None
    ) -> None:
        self.path = path
        self.read: set[str] = set() if read is None else read
        self.missing: set[str] = set() if missing is None else missing
        super().__init__({key: self._wrapped(value, f"{path}{key}") for key, value in table.items()})

    def _wrapped(self, value: Any, path: str) -> Any:
        if isinstance(value, dict):
            return Recorded(value, f"{path}.", self.read, self.missing)
        if isinstance(value, list):
            return [self._wrapped(item, f"{path}[]") for item in value]
        return value

    def _note(self, key: object) -> None:
        (self.read if super().__contains__(key) else self.missing).add(f"{self.path}{key}")

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._note(key)
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As a dict's; the key counts as read."""
        self._note(key)
        return super().get(key, default)
