"""What a run that goes a layer at a time keeps on disk, so that another goes on where it was interrupted."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import system_failure
from .jobs import Job
from .selection import Selection

_NOW = "now.safetensors"
#: Says whose the files of a folder are.
_RUN = "run.json"
_MOUNTS = Path("/proc/mounts")
#: File systems whose files are in memory.
_IN_MEMORY = ("tmpfs", "ramfs")
_LAYER = re.compile(r"layer-(\d+)\.safetensors")


class Kept:
    """A folder with the streams of jobs after the last layer that is done, and a file for each layer with what jobs keep of it.

    A file is written beside its place and moved there whole. What a layer added is written once, so the bytes grow with the
    layers and not with their square. What is written is mapped from its file and no longer in memory, so that what a run holds does not
    grow with the layers.
    """

    def __init__(self, folder: Path, key: str) -> None:
        """Args: folder: is made when there is something to keep. key: of the jobs; files of other jobs are not read."""
        self._folder, self._key = folder / key[:32], key
        #: What the layers' files have, mapped from there.
        self._tensors: dict[str, Tensor] = {}

    def read(self, jobs: Sequence[Job]) -> tuple[int, list[Tensor] | None]:
        """The last layer that is done and the streams after it; jobs get what they had kept. -1 and None if there is nothing of these
        jobs, or a file is damaged.
        """
        try:
            facts, now = _read(self._folder / _NOW)
            if facts.get("key") != self._key:
                return -1, None
            layer = int(facts["layer"])
            streams = [now[f"{number}.now"] for number in range(len(jobs))]
            tensors: dict[str, Tensor] = {}
            for file in self._folder.iterdir():
                if (match := _LAYER.fullmatch(file.name)) and int(match[1]) <= layer:
                    tensors |= _read(file)[1]
            _give(jobs, tensors, layer)
        except (OSError, SafetensorError, KeyError, ValueError):
            return -1, None
        self._tensors = tensors
        return layer, streams

    def write(self, layer: int, jobs: Sequence[Job], streams: Sequence[Tensor]) -> list[Tensor]:
        """Keep what there is after a layer. Jobs get what they keep of it, and the caller the streams, mapped from the files.

        Raises:
            SystemFailure: the disk is full or cannot be written.
        """
        new = {
            name: torch.from_numpy(np.array(value))
            for number, job in enumerate(jobs)
            for name, value in _named(number, job)
            if name not in self._tensors
        }
        now = {f"{number}.now": one.contiguous() for number, one in enumerate(streams)}
        if new:
            self._tensors |= self._save(f"layer-{layer}.safetensors", new, {})
            _give(jobs, self._tensors, layer)
        after = self._save(_NOW, now, {"key": self._key, "layer": json.dumps(layer)})
        return [after[name] for name in now]

    def _save(self, name: str, tensors: dict[str, Tensor], facts: dict[str, str]) -> dict[str, Tensor]:
        """Write a file; what is in it, mapped."""
        file = self._folder / name
        part = file.with_suffix(".part")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, part, facts)
            part.replace(file)
            return _read(file)[1]
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            failure = error if isinstance(error, OSError) else OSError(errno.EIO, str(error))
            raise system_failure(failure, file) from None


def begin_run(folder: Path, run: str) -> None:
    """Give a folder to a run: what the same run kept before it was interrupted stays, and what another kept is removed.

    Args:
        folder: is made if there is none.
        run: a digest of all that decides what is kept.

    Raises:
        SystemFailure: the folder cannot be written.
    """
    file, ours = folder / _RUN, {"run": run}
    with contextlib.suppress(OSError, ValueError):
        if json.loads(file.read_text(encoding="utf-8")) == ours:
            return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for one in folder.iterdir():
            if one.is_dir() and not one.is_symlink():
                shutil.rmtree(one)
            else:
                one.unlink()
        file.write_text(json.dumps(ours), encoding="utf-8")
    except OSError as error:
        raise system_failure(error, folder) from None


def bytes_below(folder: Path) -> int:
    """Bytes of what an earlier run has kept in a folder and the folders in it."""
    found = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):  # another process may have removed it
            found += file.stat().st_size if file.is_file() else 0
    return found


def free_disk(folder: Path) -> int:
    """Bytes that are free where a folder is, or will be."""
    there = next(one for one in (folder, *folder.absolute().parents) if one.is_dir())
    usage = shutil.disk_usage(there)
    return usage.free if usage.total else 1 << 62  # ramfs has no size


def in_memory(folder: Path) -> str | None:
    """The file system of a folder, if it keeps files in memory; None if it does not, or the system does not say (only Linux does)."""
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    place, longest, kind = folder.resolve(), -1, ""
    for line in lines:
        _, mounted, type_, *_ = [*line.split(" "), "", ""]
        # Spaces and the like are octal numbers there.
        point = Path(re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), mounted))
        # Of several on one place the last one is seen.
        if place.is_relative_to(point) and len(point.parts) >= longest:
            longest, kind = len(point.parts), type_
    return kind if kind in _IN_MEMORY else None


def _read(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The facts and the tensors of a file, mapped: the system reads a tensor when it is used, and may drop it again."""
    with safe_open(file, "pt") as opened:
        return opened.metadata() or {}, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping


def _named(number: int, job: Job) -> Iterator[tuple[str, Any]]:
    for layer, streams in enumerate(job.streams):
        yield f"{number}.streams.{layer}", streams
    for layer, one in job.selections.items():
        for name in ("chosen", "mass", "tied"):
            yield f"{number}.selection.{layer}.{name}", getattr(one, name)
    for layer, entries in job.entries.items():
        yield f"{number}.entries.{layer}", entries
    for name, rows in job.rows.items():
        yield f"{number}.rows.{name}", rows


def _give(jobs: Sequence[Job], tensors: dict[str, Tensor], layer: int) -> None:
    """Give jobs what they had kept up to a layer.

    Raises:
        KeyError: something of one is not there; no job was changed.
    """
    found = [_Parts(tensors, number, job, layer) for number, job in enumerate(jobs)]
    for parts, job in zip(found, jobs, strict=True):
        job.streams[:], job.selections, job.entries = parts.streams, parts.selections, parts.entries
        job.rows = parts.rows


class _Parts:
    """What a job had kept."""

    def __init__(self, tensors: dict[str, Tensor], number: int, job: Job, layer: int) -> None:
        count = layer + 1 if job.keep_streams else 0
        self.streams = [tensors[f"{number}.streams.{at}"].numpy() for at in range(count)]
        layers = {int(name.split(".")[2]) for name in tensors if name.startswith(f"{number}.selection.")}
        self.selections = {
            at: Selection(**{n: tensors[f"{number}.selection.{at}.{n}"].numpy() for n in ("chosen", "mass", "tied")})
            for at in sorted(layers)
        }
        at_entries = {int(name.split(".")[2]) for name in tensors if name.startswith(f"{number}.entries.")}
        self.entries = {at: tensors[f"{number}.entries.{at}"].numpy() for at in sorted(at_entries)}
        rows = f"{number}.rows."
        self.rows = {name.removeprefix(rows): value.numpy() for name, value in tensors.items() if name.startswith(rows)}
