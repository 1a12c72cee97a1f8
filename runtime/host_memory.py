"""How much memory this process may still take. Standard library only."""

from __future__ import annotations

from pathlib import Path

_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes that can be allocated without swapping: the system's estimate, or what a container's limit leaves, if that is less.

    Pages of files count as free, because the system drops them first. 0 if the system does not say (only Linux does).
    """
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError, IndexError):
        return 0
    return max(0, min([free, *_left_in_groups()]))


def _left_in_groups() -> list[int]:
    """What the limits of the process's control group (version 2) and of those around it leave."""
    try:
        [own] = [line[3:] for line in _CGROUP.read_text().splitlines() if line.startswith("0::")]
    except (OSError, ValueError):
        return []
    group, found = _CGROUPS / own.strip("/"), []
    # In a container the path of the own group is the root, or one that is not mounted there.
    for folder in (group, *(one for one in group.parents if one.is_relative_to(_CGROUPS)), _CGROUPS):
        try:
            limit = int((folder / "memory.max").read_text())  # "max" where there is none
            used = int((folder / "memory.current").read_text())
            kinds = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            found.append(limit - used + int(kinds.get("inactive_file", 0)) + int(kinds.get("active_file", 0)))
        except (OSError, ValueError):
            continue
    return found
