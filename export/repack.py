"""Copy tensors of a checkpoint into a package's own weight files: streamed, resumable.

A file is written under another name and renamed when it is complete and on disk. After an interruption, files that the
journal lists with the same plan are kept, and the rest is written again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from ..artifact import sha256_json
from ..errors import CheckpointError, InputError, system_failure
from ..progress import BYTES, Progress, Say, silent
from .weights import Copy

JOURNAL = "journal.json"
_CHUNK = 16 << 20


def repack(
    copies: Sequence[Copy],
    work: Path,
    *,
    identity: str,
    progress: Say = silent,
) -> dict[str, str]:
    """Write the files of ``copies`` below ``work``; returns their sha256 by name.

    Never more than one chunk of 16 MiB is in memory.

    Args:
        copies: what goes where; gaps in the files are zero.
        work: folder, kept between attempts.
        identity: of the checkpoint; files of another checkpoint are written again.
        progress: called with one line; a :class:`~foldkv.progress.Progress` also gets the bytes.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        InputError: the disk is too full, or cannot be written.
    """
    files: dict[str, list[Copy]] = {}
    for copy in copies:
        files.setdefault(copy.location, []).append(copy)
    plans = {name: _plan(parts, identity) for name, parts in files.items()}
    sizes = {name: max(part.offset + part.stored.bytes for part in parts) for name, parts in files.items()}
    work.mkdir(parents=True, exist_ok=True)
    done = _finished(work, plans, sizes)
    copied = _Copied(sum(sizes.values()), sum(sizes[name] for name in done), Progress.of(progress))
    _require_room(work, copied.total - copied.at)
    for name, parts in files.items():
        if name not in done:
            digest = _write(work / name, sorted(parts, key=lambda part: part.offset), copied)
            done[name] = {"plan": plans[name], "sha256": digest}
            _record(work, done)
    return {name: facts["sha256"] for name, facts in done.items()}


def _plan(parts: Sequence[Copy], identity: str) -> str:
    rows = [[p.stored.file.name, p.stored.offset, p.stored.bytes, p.offset] for p in parts]
    return sha256_json([identity, rows])


def _finished(work: Path, plans: dict[str, str], sizes: dict[str, int]) -> dict[str, dict[str, str]]:
    """The journal's files that exist, are complete, and belong to this plan."""
    try:
        journal = json.loads((work / JOURNAL).read_text())
    except (OSError, ValueError):
        return {}
    return {
        name: facts
        for name, facts in journal.items()
        if plans.get(name) == facts.get("plan")
        and (work / name).is_file()
        and (work / name).stat().st_size == sizes[name]
    }


def _record(work: Path, done: dict[str, dict[str, str]]) -> None:
    new = work / f"{JOURNAL}.new"
    new.write_text(json.dumps(done))
    new.replace(work / JOURNAL)


def _require_room(work: Path, needed: int) -> None:
    free = shutil.disk_usage(work).free
    if needed > free:
        raise InputError(
            f"{work.parent} has {free / 2**30:.1f} GiB free; the weights take {needed / 2**30:.1f} GiB more. "
            "Choose another output folder, or export with --weights reference, which copies nothing."
        )


def _write(path: Path, parts: Sequence[Copy], copied: _Copied) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    part_file = path.with_name(f"{path.name}.part")
    digest, at = hashlib.sha256(), 0
    try:
        with part_file.open("wb") as out:
            for part in parts:
                gap = bytes(part.offset - at)
                out.write(gap)
                digest.update(gap)
                _stream(part, out.write, digest.update, copied)
                at = part.offset + part.stored.bytes
                copied.advance(len(gap))
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        raise system_failure(error, part_file) from None
    part_file.replace(path)
    return digest.hexdigest()


def _stream(part: Copy, write: Callable[[bytes], object], update: Callable[[bytes], object], copied: _Copied) -> None:
    left = part.stored.bytes
    with part.stored.file.open("rb") as source:
        source.seek(part.stored.offset)
        while left:
            chunk = source.read(min(_CHUNK, left))
            if not chunk:
                raise CheckpointError(f"{part.stored.file} ends within tensor {part.stored.name}. Download it again.")
            write(chunk)
            update(chunk)
            left -= len(chunk)
            copied.advance(len(chunk))


class _Copied:
    """How many bytes are copied, including those kept from before."""

    def __init__(self, total: int, kept: int, progress: Progress) -> None:
        self.total, self.at, self._progress = total, kept, progress
        before = f" ({kept / 2**30:.1f} GiB kept from before)" if kept else ""
        progress(f"copying {total / 2**30:.1f} GiB of weights{before}")

    def advance(self, size: int) -> None:
        self.at += size
        self._progress.steps(self.at, self.total, BYTES)
