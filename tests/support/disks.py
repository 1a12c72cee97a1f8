"""What a disk does to its users: full ones, and permissions that also hold for root."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

_VERSION = 0x20080522  # of the interface of capget(2)
_DAC_OVERRIDE, _DAC_READ_SEARCH = 1 << 1, 1 << 2


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of ``size`` bytes in a folder; the test is skipped where none can be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small file system needs the right to mount one: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def permissions_hold() -> Iterator[None]:
    """Take from this thread root's right to open every file; others have no such right, so for them nothing changes."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_VERSION, 0)
    before, during = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0
    ctypes.memmove(during, before, ctypes.sizeof(before))
    during[0] &= ~(_DAC_OVERRIDE | _DAC_READ_SEARCH)
    assert libc.capset(header, during) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


def hub_cache(source: Path, repository: Path) -> Path:
    """The files of a folder as huggingface_hub keeps them: blobs named after their content, and a snapshot of links to them.

    Returns the snapshot.
    """
    import hashlib
    import os

    blobs, snapshot = repository / "blobs", repository / "snapshots" / ("0123abcd" * 5)
    blobs.mkdir(parents=True)
    for file in sorted(source.rglob("*")):
        if file.is_file():
            blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
            blob.write_bytes(file.read_bytes())
            link = snapshot / file.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def local_download(folder: Path) -> None:
    """What ``hf download --local-dir`` and a desktop leave beside the files that they were asked for."""
    (folder / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / ".gitignore").write_text("*")
    (folder / ".cache" / "huggingface" / "download" / "model.onnx.metadata").write_text("0123abcd\n")
    for name in ("README.md", "LICENSE", ".gitattributes", ".DS_Store", ".nfs0000000001"):
        (folder / name).write_text("stray")
