"""How much memory this process may still take. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")
#: Of control groups of version 2 and of version 1: files with limits and with what is taken, and what of that are pages of files.
_FILES = {
    2: (("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")),
    1: (("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
}


def available_memory() -> int:
    """Bytes that can be allocated without swapping: the system's estimate, or what the limits of a container leave, if that is less.

    Pages of files count as free, because the system drops them first. 0 if the system does not say (only Linux does).
    """
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError, IndexError):
        return 0
    return max(0, min([free, *_left_in_groups()]))


def _left_in_groups() -> list[int]:
    """What the limits of the process's control groups, and of those around them, leave."""
    found = []
    for version, root, group in _groups():
        limits, taken, pages = _FILES[version]
        # In a container the path of the own group can be one that is not mounted there: the root is its own then.
        for folder in dict.fromkeys([group, *(one for one in group.parents if one.is_relative_to(root)), root]):
            for limit in limits:
                try:
                    most = int((folder / limit).read_text())  # "max" where there is none
                    used = int((folder / taken).read_text())
                    kinds = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    found.append(most - used + sum(int(kinds.get(kind, 0)) for kind in pages))
                except (OSError, ValueError):
                    continue
    return found


def _groups() -> Iterator[tuple[int, Path, Path]]:
    """Version, root and folder of the control groups that count this process's memory."""
    try:
        lines = [line.split(":", 2) for line in _CGROUP.read_text().splitlines()]
    except OSError:
        return
    for number, controllers, path in (line for line in lines if len(line) == 3):
        if number == "0" and not controllers:
            yield 2, _CGROUPS, _CGROUPS / path.strip("/")
        elif "memory" in controllers.split(","):
            yield 1, _CGROUPS / "memory", _CGROUPS / "memory" / path.strip("/")
