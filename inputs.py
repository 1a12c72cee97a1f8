"""Folders and files as they lie on disk: who a file is, without reading it, and whether it is still the one that was read.

What a user names can be a link, a snapshot of the Hugging Face cache (``snapshots/REV/* -> ../../blobs/*``) or a folder with
other files in it. Links are followed, and nobody asks for what was not named. Standard library only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import InputError, shown

# A file of the Hugging Face cache is named after its content: sha256 for large files, git's sha1 for others.
_BLOB = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")


def cache_folder() -> Path:
    """Where everything is kept that can be made again: ``FOLDKV_CACHE``, or ~/.cache/foldkv."""
    return Path(os.environ.get("FOLDKV_CACHE", Path.home() / ".cache" / "foldkv"))


@dataclass(frozen=True)
class FileIdentity:
    """Which file this is and when it was last written. Two writes of equal names and sizes have two identities.

    Attributes:
        device, inode: where the file is.
        bytes: its size.
        modified_ns: when its content was written. Tools can set this time.
        changed_ns: when its content, permissions or number of links changed. Only the system sets this time.
        blob: its name in the Hugging Face cache, which stands for its content; else empty.
    """

    device: int
    inode: int
    bytes: int
    modified_ns: int
    changed_ns: int
    blob: str = ""

    def facts(self, *, links_change: bool = False) -> dict[str, Any]:
        """What must be equal for the file to count as unchanged, as JSON values.

        Args:
            links_change: hard links to the file are made and removed, which sets ``changed_ns``; leave it out.
        """
        if self.blob:
            return {"blob": self.blob, "bytes": self.bytes}
        unequal = {"blob"} | ({"changed_ns"} if links_change else set())
        return {name: value for name, value in asdict(self).items() if name not in unequal}


def file_identity(path: Path, *, descriptor: int | None = None) -> FileIdentity:
    """The identity of the file that a path leads to, or of the file that was opened there.

    Raises:
        OSError: the file is gone or its folder cannot be read.
    """
    info = path.stat() if descriptor is None else os.fstat(descriptor)
    return FileIdentity(
        info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns, _blob(path, info.st_mtime_ns)
    )


def _blob(path: Path, modified_ns: int) -> str:
    """The name of a blob of the Hugging Face cache.

    The cache makes the link after the blob. A blob that is younger than the link was written again, so it is not what its name
    says.
    """
    if not path.is_symlink():
        return ""
    target = Path(os.path.realpath(path))
    known = target.parent.name == "blobs" and _BLOB.fullmatch(target.name)
    return target.name if known and modified_ns <= path.lstat().st_mtime_ns else ""


class OpenedFiles:
    """The files that a process opened or checked, to notice later that one was written again, replaced or removed."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Note who the files are now. Do it before they are read, so that no change is missed.

        Raises:
            OSError: a file is gone or its folder cannot be read.
        """
        # Absolute, because the process may go to another folder.
        self._opened = {Path.cwd() / path: file_identity(path) for path in files}

    def changes(self) -> tuple[str, ...]:
        """What happened to the files since; empty if nothing did. Reads no content, so it takes microseconds per file."""
        return tuple(change for path, opened in self._opened.items() if (change := _change(path, opened)))


def _change(path: Path, opened: FileIdentity) -> str:
    try:
        now = file_identity(path)
    except OSError as error:
        return f"{path} is gone ({error.strerror})"
    if (now.device, now.inode) != (opened.device, opened.inode):
        return f"{path} was replaced"
    # Backups and other bundles make hard links to a file, and that sets changed_ns although nothing was written.
    if (now.bytes, now.modified_ns) != (opened.bytes, opened.modified_ns):
        return f"{path} was written again"
    return ""


def refuse_unreadable_name(path: Path) -> None:
    """Refuse a path with bytes that are not UTF-8: ONNX, ONNX Runtime, tokenizers and JSON cannot name it.

    Raises:
        InputError: always the same, before anything is read or written.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{shown(path)}: the path has bytes that are not UTF-8, which the libraries for graphs and weights cannot open. "
            "Rename it, or give another path."
        ) from None


def snapshot_hint(folder: Path) -> str:
    """`" It is …"` with the snapshot to give instead, if a folder is a repository of the Hugging Face cache; else ""."""
    folder = Path(folder)
    found = [path for path in folder.glob("snapshots/*") if path.is_dir()] if (folder / "blobs").is_dir() else []
    newest = max(found, key=lambda path: path.stat().st_mtime_ns, default=None)
    return f" It is a repository of the Hugging Face cache: give its snapshot {newest}." if newest else ""
