"""Which arrays are in files that are mapped, and which in memory that no file backs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def in_files(values: Any, folder: Path) -> bool:
    """Whether an array or a CPU tensor is mapped from a file that is, or was, in a folder."""
    at = values.data_ptr() if isinstance(values, torch.Tensor) else values.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, inode, name = [*line.split(maxsplit=5), ""][:6]
        start, end = (int(one, 16) for one in span.split("-"))
        if start <= at < end:
            return inode != "0" and Path(name.removesuffix(" (deleted)")).is_relative_to(folder)
    return False
