"""Copy tensors of a checkpoint into a package's own weight files: streamed, with a progress line, resumable.

A file is written under another name and renamed when it is whole and on disk. After an interruption, files that a
journal names with the same plan are kept, and the rest is written again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from foldkv.artifact import sha256_json
from foldkv.errors import CheckpointError, InputError
from foldkv.export.weights import Copy

JOURNAL = "journal.json"
_CHUNK = 16 << 20
_EVERY = 2.0  # seconds between progress lines


def repack(
    copies: Sequence[Copy],
    work: Path,
    *,
    identity: str,
    progress: Callable[[str], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, str]:
    """Write every file that ``copies`` name below ``work``; returns their sha256 by name.

    Never more than one chunk of 16 MiB is in memory.

    Args:
        copies: what goes where; the files' gaps are zero.
        work: folder, kept between attempts.
        identity: of the checkpoint; files of another one are written again.
        progress: called with a line of bytes, speed and time left every two seconds.
        clock: seconds, for tests.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        InputError: the disk has no room, or cannot be written.
    """
    files: dict[str, list[Copy]] = {}
    for copy in copies:
        files.setdefault(copy.location, []).append(copy)
    plans = {name: _plan(parts, identity) for name, parts in files.items()}
    sizes = {name: max(part.offset + part.stored.bytes for part in parts) for name, parts in files.items()}
    work.mkdir(parents=True, exist_ok=True)
    done = _finished(work, plans, sizes)
    report = _Progress(sum(sizes.values()), sum(sizes[name] for name in done), progress, clock)
    _require_room(work, report.total - report.kept)
    for name, parts in files.items():
        if name not in done:
            digest = _write(work / name, sorted(parts, key=lambda part: part.offset), report)
            done[name] = {"plan": plans[name], "sha256": digest}
            _record(work, done)
    report.line()
    return {name: facts["sha256"] for name, facts in done.items()}


def _plan(parts: Sequence[Copy], identity: str) -> str:
    rows = [[p.stored.file.name, p.stored.offset, p.stored.bytes, p.offset] for p in parts]
    return sha256_json([identity, rows])


def _finished(work: Path, plans: dict[str, str], sizes: dict[str, int]) -> dict[str, dict[str, str]]:
    """The journal's files that are here, whole, and belong to this plan."""
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


def _write(path: Path, parts: Sequence[Copy], report: _Progress) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    part_file = path.with_name(f"{path.name}.part")
    digest, at = hashlib.sha256(), 0
    try:
        with part_file.open("wb") as out:
            for part in parts:
                gap = bytes(part.offset - at)
                out.write(gap)
                digest.update(gap)
                _stream(part, out.write, digest.update, report)
                at = part.offset + part.stored.bytes
                report.advance(len(gap))
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        raise InputError(f"{part_file} cannot be written: {error.strerror}. Free some room and run it again.") from None
    part_file.replace(path)
    return digest.hexdigest()


def _stream(part: Copy, write: Callable[[bytes], object], update: Callable[[bytes], object], report: _Progress) -> None:
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
            report.advance(len(chunk))


class _Progress:
    """Bytes, speed and time left, one line every two seconds."""

    def __init__(self, total: int, kept: int, progress: Callable[[str], None], clock: Callable[[], float]) -> None:
        self.total, self.kept, self.at = total, kept, kept
        self._progress, self._clock = progress, clock
        self._start = self._last = clock()

    def advance(self, size: int) -> None:
        self.at += size
        if self._clock() - self._last >= _EVERY:
            self.line()

    def line(self) -> None:
        self._last = self._clock()
        speed = (self.at - self.kept) / max(1e-9, self._last - self._start)
        left = f", {(self.total - self.at) / speed:.0f} s left" if speed and self.at < self.total else ""
        kept = f" ({self.kept / 2**30:.1f} GiB kept from before)" if self.kept else ""
        self._progress(
            f"weights: {self.at / 2**30:.1f} of {self.total / 2**30:.1f} GiB{kept}, {speed / 2**20:.0f} MiB/s{left}"
        )
