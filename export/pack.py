"""Ship an artifact with its weights in one folder, and their sha256 in its lock."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..artifact import check_destination, staged
from ..errors import ArtifactError, InputError
from ..manifests import BundleManifest, GraphManifest, read_any, write
from ..progress import BYTES, Progress, Say, silent
from ..units import size_text
from .contract.lock import LOCK, WeightsLock
from .files import place_file
from .locate import find_weights
from .weight_digests import Hashed, expectation, refuse_others, verify_weights

#: Folder of a packed artifact with the files of its lock.
FOLDER = "weights"


def read_locked(folder: Path) -> tuple[GraphManifest | BundleManifest, WeightsLock]:
    """Manifest and lock of a package or a bundle, after checking the hashes of its own files.

    Raises:
        ArtifactError: it is damaged or has no lock.
    """
    manifest = read_any(Path(folder), verify=True)
    if not isinstance(manifest, GraphManifest | BundleManifest) or LOCK not in manifest.files:
        raise ArtifactError(
            f"{folder} is a {manifest.KIND} artifact without {LOCK}; expected a graph package or a bundle that this version made. "
            "Give one, or make it again."
        )
    return manifest, WeightsLock.read(Path(folder) / LOCK)


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
    check_destination(out, kind=manifest.KIND)
    files = find_weights(artifact, lock, manifest.inputs.checkpoint, weights_from)
    report = Progress.of(progress)
    report(f"packing {len(files)} weight files, {size_text(lock_bytes(lock))}")
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
        expected, source = expectation(lock.files[row.name], files[row.name])
        found.append(replace(row, expected=expected, source=source))
    return found


def lock_bytes(lock: WeightsLock) -> int:
    """Bytes of all files of a lock."""
    return sum(file.bytes for file in lock.files.values())
