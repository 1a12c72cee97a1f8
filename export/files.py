"""Large files at a second place: shared with the file system's help where it can, else copied; holes stay holes.

A copy that is interrupted is continued, if its source is still the same file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from ..errors import system_failure

# ioctl of Linux: let two files share their blocks until one is written (btrfs, xfs, bcachefs).
_FICLONE = 0x40049409
_CHUNK = 16 << 20


def place_file(source: Path, target: Path, *, advance: Callable[[int], object] = lambda _: None) -> str:
    """Put a file at a second place; returns how: "reflink", "hard link" or "copy".

    Args:
        source: links are followed.
        target: is replaced; its folder is made.
        advance: called with the number of bytes that were done.

    Raises:
        SystemFailure: the file cannot be read or written, or the disk is full.
    """
    source, size = source.resolve(), 0
    try:
        size = source.stat().st_size
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        for name, attempt in (("reflink", _reflink), ("hard link", os.link)):
            with contextlib.suppress(OSError):
                attempt(source, target)
                advance(size)
                return name
        _copy(source, target, advance)
    except OSError as error:
        raise system_failure(error, target) from None
    return "copy"


def _reflink(source: Path, target: Path) -> None:
    made = False
    try:
        with source.open("rb") as read, target.open("xb") as write:
            made = True
            fcntl.ioctl(write.fileno(), _FICLONE, read.fileno())
    except OSError:
        if made:
            target.unlink(missing_ok=True)
        raise


def _copy(source: Path, target: Path, advance: Callable[[int], object]) -> None:
    part, note = target.with_name(f"{target.name}.part"), target.with_name(f"{target.name}.part.json")
    status = source.stat()
    identity = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]
    known = None
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(note.read_text())
    if known != identity:
        part.unlink(missing_ok=True)
        note.write_text(json.dumps(identity))
    with source.open("rb") as read, part.open("ab") as write:
        at = min(write.tell(), status.st_size)
        advance(at)
        while at < status.st_size:
            start, end = _next_data(read.fileno(), at, status.st_size)
            advance(start - at)
            at = start
            if at >= status.st_size:
                break
            read.seek(at)
            data = read.read(min(_CHUNK, end - at))
            if not data:
                raise OSError(errno.EIO, "the file ends before its size", str(source))
            write.truncate(at)  # the hole before this piece
            write.seek(at)
            write.write(data)
            at += len(data)
            advance(len(data))
        write.truncate(status.st_size)
        write.flush()
        os.fsync(write.fileno())
    shutil.copymode(source, part)
    part.replace(target)
    note.unlink(missing_ok=True)


def _next_data(descriptor: int, at: int, size: int) -> tuple[int, int]:
    """The first byte from ``at`` on that is not in a hole, and where the next hole begins."""
    try:
        start = os.lseek(descriptor, at, os.SEEK_DATA)
        return start, min(size, os.lseek(descriptor, start, os.SEEK_HOLE))
    except OSError as error:
        return (size if error.errno == errno.ENXIO else at), size  # ENXIO: only a hole is left
