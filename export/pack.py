"""Ship an artifact with its weights in one folder, and verify that weights are, byte for byte, those of a lock.

Export and build read only headers of weight files, because hashing 800 GiB takes minutes. Here whole files are read: when
they are packed, and when a user asks. A lock says which of its files have been hashed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from ..artifact import staged
from ..errors import ArtifactError, InputError, listing, system_failure
from ..manifests import BundleManifest, GraphManifest, read_any, write
from ..progress import BYTES, Progress, Say, silent
from .contract.lock import LOCK, WeightsLock
from .files import place_file
from .locate import find_weights

#: Folder of a packed artifact with the files of its lock.
FOLDER = "weights"
_CHUNK = 16 << 20
# A file of the Hugging Face cache that lies in the large-file storage is named by its sha256.
_BLOB = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Hashed:
    """The sha256 of a weight file, and what it should be; ``source`` says who says so ("" if nobody does)."""

    name: str
    bytes: int
    sha256: str
    expected: str | None
    source: str

    @property
    def holds(self) -> bool:
        """Whether the file is what it should be, as far as anyone says."""
        return self.expected in (None, self.sha256)


def read_locked(folder: Path) -> tuple[GraphManifest | BundleManifest, WeightsLock]:
    """Manifest and lock of a package or a bundle, after checking the hashes of its own files.

    Raises:
        ArtifactError: it is damaged or has no lock.
    """
    manifest = read_any(Path(folder), verify=True)
    if not isinstance(manifest, GraphManifest | BundleManifest) or LOCK not in manifest.files:
        raise ArtifactError(
            f"{folder} has no {LOCK}: it is no graph package or bundle, or is of an older form. There is nothing to fetch for it."
        )
    return manifest, WeightsLock.read(Path(folder) / LOCK)


def verify_weights(
    lock: WeightsLock, files: Mapping[str, Path], *, jobs: int | None = None, progress: Say = silent
) -> list[Hashed]:
    """Hash every file of a lock, several at once.

    What a file should be is what the lock says. Where it says nothing, it is the name of the file in the Hugging Face cache.

    Args:
        lock: of an artifact.
        files: path of every file.
        jobs: files at once; the default is the processors that this process may use.
        progress: a :class:`~foldkv.progress.Progress` gets the bytes.

    Raises:
        SystemFailure: a file cannot be read.
    """
    report, total, done, counting = (
        Progress.of(progress),
        sum(f.bytes for f in lock.files.values()),
        [0],
        threading.Lock(),
    )

    def advance(size: int) -> None:
        with counting:
            done[0] += size
            report.steps(done[0], total, BYTES)

    def one(name: str) -> Hashed:
        found, blob = _sha256(files[name], advance), files[name].resolve().name
        known = lock.files[name].sha256
        expected, source = (known, "lock") if known else (blob, "cache") if _BLOB.fullmatch(blob) else (None, "")
        return Hashed(name, lock.files[name].bytes, found, expected, source)

    with ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(one, lock.files))


def refuse_others(rows: list[Hashed]) -> None:
    """Refuse files that are not what they should be.

    Raises:
        InputError: there are some; all are listed.
    """
    wrong = [
        f"{row.name} has sha256 {row.sha256}; the {row.source} says {row.expected}" for row in rows if not row.holds
    ]
    if wrong:
        raise InputError(listing("weight files were changed or damaged", wrong, "Fetch these files again."))


def _sha256(path: Path, advance: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            while block := file.read(_CHUNK):
                digest.update(block)
                advance(len(block))
    except OSError as error:
        raise system_failure(error, path) from None
    return digest.hexdigest()


def pack(
    artifact: Path, out: Path, *, weights_from: Path | None = None, progress: Say = silent
) -> tuple[dict[str, str], list[Hashed]]:
    """Make one folder to ship: an artifact with the files of its lock in ``weights/``, and their sha256 in the lock.

    Files are shared with the file system's help where it can (reflink, hard link), else copied; holes stay holes. A copy
    that was interrupted is continued.

    Args:
        artifact: a graph package or a bundle.
        out: folder to write.
        weights_from: where the weight files are; see :func:`foldkv.export.locate.find_weights`.
        progress: called with one line per step; a :class:`~foldkv.progress.Progress` gets the bytes.

    Returns:
        How each file came there, and its digest.

    Raises:
        ArtifactError: the artifact is damaged or has no lock.
        InputError: weights are missing or are others, or ``out`` is something else.
        SystemFailure: the disk is full or cannot be written.
    """
    artifact, out = Path(artifact), Path(out)
    manifest, lock = read_locked(artifact)
    if out.resolve() == artifact.resolve():
        raise InputError(f"{out} is the artifact itself; give another output folder.")
    files = find_weights(artifact, lock, manifest.inputs.checkpoint, weights_from)
    report = Progress.of(progress)
    report(f"packing {len(files)} weight files, {lock_bytes(lock) / 2**30:.2f} GiB")
    # Large copies are kept beside the output until it is whole, so that an interrupted run goes on.
    store = out.absolute().with_name(f"{out.name}.foldkv-weights")
    total, done = lock_bytes(lock), 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        report.steps(done, total, BYTES)

    ways = {}
    for name, path in files.items():
        target = store / name
        if target.is_file() and target.stat().st_size == lock.files[name].bytes:
            ways[name] = "kept from before"
            advance(lock.files[name].bytes)
        else:
            ways[name] = place_file(path, target, advance=advance)
    report("hashing what was packed")
    rows = verify_weights(lock, {name: store / name for name in files}, progress=report)
    sources = verify_sources(lock, files, rows)
    refuse_others(sources)
    digests = {row.name: row.sha256 for row in rows}
    new = replace(lock, files={name: replace(file, sha256=digests[name]) for name, file in lock.files.items()})
    with staged(out, kind=manifest.KIND) as work:
        for name in manifest.files:
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artifact / name, work / name)
        new.write(work / LOCK)
        write(work, manifest, known={name: file.sha256 for name, file in manifest.files.items() if name != LOCK})
        store.rename(work / FOLDER)
    return ways, sources


def verify_sources(lock: WeightsLock, files: Mapping[str, Path], rows: list[Hashed]) -> list[Hashed]:
    """The digests of packed files, compared with what their sources should be."""
    found = []
    for row in rows:
        blob = files[row.name].resolve().name
        if row.expected is None and _BLOB.fullmatch(blob):
            row = replace(row, expected=blob, source="cache")
        found.append(row)
    return found


def lock_bytes(lock: WeightsLock) -> int:
    """Bytes of all files of a lock."""
    return sum(file.bytes for file in lock.files.values())
