"""Artifacts: directories with a manifest, written in a staging folder and put in place by a rename.

A reader sees the old artifact or the new one, never half of one. The manifest lists every file with
its size and sha256, so that damage is found before a file is used. docs/artifacts.md describes the
format.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import ArtifactError, InputError, system_failure
from .progress import Say, silent

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
_STAGING_MARK = ".foldkv-staging-"
_RETIRED_MARK = ".foldkv-retired-"
_POLL = 0.1  # seconds between two looks at a lock
# Staging folders of this process, and a lock that keeps it from ending between two renames.
_unfinished: set[Path] = set()
_commit = threading.Lock()


def sha256_file(path: Path) -> str:
    """The hex sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """The hex sha256 of a JSON value in its canonical spelling (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def staged(destination: Path, *, kind: str, replace: bool = True) -> Iterator[Path]:
    """A folder to write an artifact in; on success it becomes ``destination``, else it is removed.

    ``destination`` is replaced only if it is an artifact of the same ``kind``, an empty folder or a
    left-over of an interrupted write: a user's own folder is never deleted.

    Raises:
        InputError: ``destination`` exists and is something else.
        SystemFailure: the operating system refused to write there, for example because the disk is full.
    """
    destination = Path.cwd() / destination
    staging = destination.parent / f"{destination.name}{_STAGING_MARK}{os.getpid()}-{secrets.token_hex(4)}"
    try:
        _check_replaceable(destination, kind, replace)
        destination.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(destination)
        _unfinished.add(staging)
        staging.mkdir()
        yield staging
        with _commit:
            _put_in_place(staging, destination)
    except OSError as error:
        if error.filename is not None:  # users do not know the staging folder
            error.filename = str(error.filename).replace(str(staging), str(destination))
        raise system_failure(error, destination) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _unfinished.discard(staging)


def abandon_unfinished() -> None:
    """Remove what this process has not put in place yet. For a process that must end at once, even while threads write.

    Nothing is put in place afterwards.
    """
    _commit.acquire(timeout=0.5)
    for staging in list(_unfinished):
        for path in staging.parent.glob(f"{staging.name}*"):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def only_writer(destination: Path, progress: Say = silent) -> Iterator[None]:
    """Allow one writer per artifact at a time, across processes and threads. The lock ends with its process.

    While it waits, it says who holds the lock.

    Raises:
        SystemFailure: the folder that holds ``destination`` cannot be made or written.
    """
    destination = Path.cwd() / destination
    path = destination.parent / f".{destination.name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("a+")
    except OSError as error:
        raise system_failure(error, path) from None
    with lock:
        if not _locked(lock.fileno()):
            progress(f"waiting for {_holder(path)}, which writes {destination}")
            while not _locked(lock.fileno()):
                time.sleep(_POLL)
        with contextlib.suppress(OSError):  # for those who wait; the lock works without it
            lock.truncate(0)
            lock.write(json.dumps({"pid": os.getpid(), "since": int(time.time())}))
            lock.flush()
        yield


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        row = json.loads(path.read_text())
        return f"process {int(row['pid'])} (since {time.strftime('%H:%M:%S', time.localtime(row['since']))})"
    return "another process"


def check_destination(destination: Path, *, kind: str) -> None:
    """Check, without changing anything, that :func:`staged` could write an artifact there.

    Raises:
        InputError: ``destination`` is not an artifact of that kind.
        SystemFailure: its folder cannot be written.
    """
    destination = Path.cwd() / destination
    _check_replaceable(destination, kind, replace=True)
    folder = _existing(destination.parent)
    try:
        # Permissions do not show a read-only or special file system; creating a folder does.
        Path(tempfile.mkdtemp(prefix=".foldkv-check-", dir=folder)).rmdir()
    except OSError as error:
        error.filename = str(destination)  # not the folder that was to show it
        raise system_failure(error, destination.parent) from None


def free_bytes(folder: Path) -> int:
    """Bytes that can be written where a folder is or would be made."""
    return shutil.disk_usage(_existing(Path.cwd() / folder)).free


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    while not folder.exists():
        folder = folder.parent
    return folder


def reason_to_replace(folder: Path, *, kind: str) -> tuple[str, dict[str, Any] | None]:
    """Why a folder has no complete artifact of a kind, "" if it has one; and the manifest if it has one."""
    if not (Path(folder) / MANIFEST).exists():
        return f"{folder} does not exist", None
    try:
        manifest = read_manifest(folder, kind=kind)
        verify_files(folder, manifest)
    except ArtifactError as error:
        return f"damaged: {str(error).removesuffix('.')}", None
    return "", manifest


def _check_replaceable(destination: Path, kind: str, replace: bool) -> None:
    if not destination.exists():
        return
    if not destination.is_dir():
        raise InputError(f"{destination} is a file; expected a folder to write the {kind} artifact to. Choose another.")
    if not any(destination.iterdir()):
        return
    try:
        found = json.loads((destination / MANIFEST).read_text()).get("kind")
    except (OSError, ValueError, AttributeError):
        found = None
    if found != kind:
        raise InputError(
            f"{destination} is not empty and is not a {kind} artifact"
            f"{f' but a {found} artifact' if found else ''}; nothing was changed. Choose another output folder."
        )
    if not replace:
        raise InputError(f"{destination} already is a {kind} artifact; nothing was changed.")


def _owner_is_alive(mark: str) -> bool:
    with contextlib.suppress(ValueError, ProcessLookupError):
        os.kill(int(mark.split("-", 1)[0]), 0)
        return True
    return False


def _remove_leftovers(destination: Path) -> None:
    """Remove what killed writers left beside ``destination``; restore a retired artifact."""
    for mark in (_RETIRED_MARK, _STAGING_MARK):
        for path in destination.parent.glob(f"{destination.name}{mark}*"):
            if _owner_is_alive(path.name.split(mark, 1)[1]):
                continue
            if mark == _RETIRED_MARK and not destination.exists():
                path.rename(destination)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _put_in_place(staging: Path, destination: Path) -> None:
    retired = destination.parent / f"{destination.name}{_RETIRED_MARK}{os.getpid()}-{secrets.token_hex(4)}"
    try:
        if destination.exists():
            destination.rename(retired)
        staging.rename(destination)
    except BaseException:  # an interrupt too
        if retired.exists() and not destination.exists():
            retired.rename(destination)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def write_manifest(
    folder: Path,
    *,
    kind: str,
    content: dict[str, Any],
    known: dict[str, str] | None = None,
    heads: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Hash every file of ``folder`` and write its manifest; returns the manifest.

    Args:
        folder: the artifact's folder.
        kind: the artifact's kind.
        content: stored beside ``schema_version``, ``kind`` and ``files``.
        known: sha256 of files that were hashed as they were written.
        heads: files of someone else that are too large to hash, such as a checkpoint's shards. They are listed under
            ``linked`` with their size and the sha256 of this many bytes at their start.
    """
    known, heads = known or {}, heads or {}
    files, linked = {}, {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name == MANIFEST:
            continue
        if name in heads:
            linked[name] = {
                "head_sha256": _sha256_head(path, heads[name]), "head_bytes": heads[name], "bytes": path.stat().st_size
            }  # fmt: skip
        else:
            files[name] = {"sha256": known.get(name) or sha256_file(path), "bytes": path.stat().st_size}
    manifest = {"schema_version": SCHEMA_VERSION, "kind": kind, "files": files, **content}
    if linked:
        manifest["linked"] = linked
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return manifest


def read_manifest(folder: Path, *, kind: str) -> dict[str, Any]:
    """The manifest of an artifact, after checking its kind and version and that its files exist.

    Raises:
        ArtifactError: no manifest, not JSON, another kind or version, a file missing or of another
            size, or a file name that leads out of the artifact.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except OSError:
        raise ArtifactError(
            f"{folder} is not a {kind} artifact: {path} cannot be read. Give a folder that foldkv wrote."
        ) from None
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON ({error}). The artifact is damaged: make it again.") from None
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        found = manifest.get("kind") if isinstance(manifest, dict) else type(manifest).__name__
        raise ArtifactError(f"{path} has kind {found!r}; expected {kind!r}. Give a folder of the right kind.")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} has schema_version {manifest.get('schema_version')!r}; this foldkv reads {SCHEMA_VERSION}. "
            "Make the artifact again with this version."
        )
    _check_files(Path(folder), manifest.get("files"))
    _check_files(Path(folder), manifest.get("linked", {}))
    return manifest


def _check_files(folder: Path, files: Any) -> None:
    if not isinstance(files, dict):
        raise ArtifactError(f"{folder / MANIFEST}: 'files' is {type(files).__name__}; expected a table of files.")
    for name, facts in files.items():
        path = confined(folder, name)
        if not isinstance(facts, dict) or not isinstance(facts.get("bytes"), int):
            raise ArtifactError(
                f"{folder / MANIFEST}: file {name!r} has no size. The manifest is damaged: make the artifact again."
            )
        if not path.is_file():
            raise ArtifactError(
                f"{path} is missing, but the manifest lists it. Copy the whole artifact or make it again."
            )
        if path.stat().st_size != facts["bytes"]:
            raise ArtifactError(
                f"{path} has {path.stat().st_size} bytes; the manifest says {facts['bytes']}. "
                "The copy is incomplete or damaged: copy or make it again."
            )


def verify_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Compare the sha256 of every file with the manifest; for linked files, the sha256 of their start.

    Raises:
        ArtifactError: a file's content does not match the manifest.
    """
    for name, facts in manifest["files"].items():
        found = sha256_file(confined(folder, name))
        if found != facts.get("sha256"):
            raise ArtifactError(
                f"{folder / name} has sha256 {found[:16]}...; the manifest says {str(facts.get('sha256'))[:16]}... "
                "The file was changed after it was made: make the artifact again."
            )
    for name, facts in manifest.get("linked", {}).items():
        size = facts.get("head_bytes")
        if type(size) is not int or _sha256_head(confined(folder, name), size) != facts.get("head_sha256"):
            raise ArtifactError(
                f"{folder / name} is not the file that the artifact was made with. Make the artifact again."
            )


def _sha256_head(path: Path, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.sha256(file.read(size)).hexdigest()


def confined(folder: Path, name: str, *, follow_links: bool = False) -> Path:
    """``folder/name``, if that stays inside ``folder``; with ``follow_links`` a link may lead out.

    Raises:
        ArtifactError: an absolute path, a ``..`` or a link that leads out.
    """
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or not name or "\\" in name or "\0" in name:
        raise ArtifactError(f"{folder}: file name {name!r} leads out of the artifact; it is refused.")
    path = folder / name
    if not follow_links and not path.resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(f"{path} is a link out of the artifact; it is refused.")
    return path
