"""Where stacks are kept (runtime/stacks.py), and how long those that are there took to make. Standard library only: plans need it."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

from ..caches import cache_folder

#: File of a folder of stacks with what they were made from, and how long that took.
SOURCES = "sources.json"


@dataclass(frozen=True)
class Made:
    """Stacks that were made on this machine: their bytes, and the seconds that it took."""

    bytes: int
    seconds: float


def stacks_folder() -> Path:
    """Where stacks are kept."""
    return cache_folder() / "stacks"


def made_here() -> list[Made]:
    """The stacks that were made on this machine in one go and are still there."""
    found = []
    for file in sorted(stacks_folder().glob(f"*/{SOURCES}")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            row = json.loads(file.read_bytes())["made"]
            found.append(Made(int(row["bytes"]), float(row["seconds"])))
    return [one for one in found if one.bytes > 0 and one.seconds > 0]
