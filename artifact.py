"""Artifacts: directories with a manifest, written in a staging folder and put in place by a rename.

A reader sees the old artifact or the new one, never half of one. The manifest lists every file with
its size and sha256, so that damage is found before a file is used. docs/artifacts.md describes the
format.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import ArtifactError, InputError, shown, system_failure
from .inputs import file_identity, refuse_unreadable_name, snapshot_hint
from .progress import Say, silent

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
_STAGING_MARK = ".foldkv-staging-"
_RETIRED_MARK = ".foldkv-retired-"
_POLL = 0.1  # seconds between two looks at a lock
_LONGEST_NAME = 255 - 64  # bytes of a name; file systems take 255, and marks need some
# What file managers and network file systems leave in a folder; nobody misses it.
_LITTER = (".DS_Store", ".nfs", "._", "Thumbs.db", "desktop.ini")
# Staging and scratch folders of this process, and a lock that keeps it from ending between two renames.
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
    left-over of an interrupted write: a user's own folder is never deleted. A link stays one: what it leads to is replaced.

    Raises:
        InputError: ``destination`` exists and is something else.
        SystemFailure: the operating system refused to write there, for example because the disk is full.
    """
    given, destination = destination, landing(destination)
    staging = beside(destination, f"{_STAGING_MARK}{os.getpid()}-{secrets.token_hex(4)}")
    try:
        _check_replaceable(destination, kind, replace)
        destination.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(destination)
        _unfinished.add(staging)
        staging.mkdir()
        yield staging
        with _commit:
            _put_in_place(staging, destination)
    except OSError as caught:
        error = _with_its_reason(caught)
        if error.filename is not None:  # users do not know the staging folder
            error.filename = shown(error.filename).replace(str(staging), str(destination))
        raise system_failure(error, Path.cwd() / given) from caught
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _unfinished.discard(staging)


@contextlib.contextmanager
def scratch_folder(name: str) -> Iterator[Path]:
    """A folder among the system's temporary files, for what is needed meanwhile. It also goes if a signal ends the process."""
    with tempfile.TemporaryDirectory(prefix=f"foldkv-{name}-") as folder:
        _unfinished.add(Path(folder))
        try:
            yield Path(folder)
        finally:
            _unfinished.discard(Path(folder))


def _with_its_reason(error: OSError) -> OSError:
    """numpy says how many elements it wrote, not why it stopped: the disk is full, or a quota or a limit is reached."""
    if error.errno is None and re.fullmatch(r"\d+ requested and \d+ written", str(error)):
        return OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, or a quota or `ulimit -f` is reached ({error})")
    return error


def abandon_unfinished() -> None:
    """Remove what this process has not put in place yet, and its scratch folders. For a process that must end at once, even while threads write.

    Nothing is put in place afterwards.
    """
    _commit.acquire(timeout=0.5)
    for staging in list(_unfinished):
        for path in _beginning_with(staging):
            shutil.rmtree(path, ignore_errors=True)


def landing(destination: Path) -> Path:
    """Where writing to ``destination`` ends: an absolute path without links. What links lead to need not exist yet.

    Raises:
        InputError: the path is not UTF-8.
        SystemFailure: links lead in a circle, or a folder on the way is forbidden.
    """
    path = Path.cwd() / destination
    refuse_unreadable_name(path)
    try:
        return Path(os.path.realpath(path, strict=True))
    except FileNotFoundError:
        return Path(os.path.realpath(path))
    except OSError as error:
        if error.errno == errno.ENOTDIR:  # said later, by what cannot make a folder there
            return Path(os.path.realpath(path))
        raise system_failure(error, path) from None


def beside(destination: Path, mark: str) -> Path:
    """A sibling of ``destination``: its name and ``mark``. A name without room for it is cut and keeps a digest."""
    name = os.fsencode(destination.name)
    if len(name) > _LONGEST_NAME:
        return destination.with_name(
            f"{name[:100].decode(errors='ignore')}-{hashlib.sha256(name).hexdigest()[:16]}{mark}"
        )
    return destination.with_name(destination.name + mark)


def _beginning_with(start: Path) -> list[Path]:
    """What has a path that begins with ``start``. A name can have ``*`` or ``[`` in it, so it is no pattern."""
    there = start.parent.iterdir() if start.parent.is_dir() else ()
    return [path for path in there if path.name.startswith(start.name)]


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it is the old one or the new one, never half of one. A link stays one.

    Raises:
        SystemFailure: it cannot be written; an older file there is unchanged.
    """
    target = landing(path)
    try:
        if target.exists() and not target.is_file():  # a pipe or a device
            target.write_text(text, encoding="utf-8")
            return
        new = beside(target, f".foldkv-new-{os.getpid()}-{secrets.token_hex(4)}")
        try:
            new.write_text(text, encoding="utf-8")
            if target.exists():
                shutil.copymode(target, new)
            new.replace(target)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        error.filename = error.filename2 = None  # users do not know the new file
        raise system_failure(error, path) from None


@contextlib.contextmanager
def only_writer(destination: Path, progress: Say = silent) -> Iterator[None]:
    """Allow one writer per artifact at a time, across processes and threads. The lock ends with its process.

    While it waits, it says who holds the lock.

    Raises:
        SystemFailure: the folder that holds ``destination`` cannot be made or written.
    """
    destination = landing(destination)
    path = beside(destination.with_name(f".{destination.name}"), ".lock")
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
    destination = landing(destination)
    _check_replaceable(destination, kind, replace=True)
    folder = _existing(destination.parent)
    try:
        # Permissions do not show a read-only or special file system; creating a folder does.
        Path(tempfile.mkdtemp(prefix=".foldkv-check-", dir=folder)).rmdir()
    except OSError as error:
        error.filename = str(destination)  # not the folder that was to show it
        raise system_failure(error, destination.parent) from None


def artifact_kind(folder: Path) -> str | None:
    """The kind that the manifest of a folder states; None if it has no manifest that can be read."""
    try:
        kind = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8")).get("kind")
    except (OSError, ValueError, AttributeError):
        return None
    return kind if isinstance(kind, str) else None


def folder_hint(folder: Path) -> str:
    """`" It is …"` for a folder without a manifest that is a checkpoint or has artifacts in it; else ""."""
    if (Path(folder) / "config.json").is_file():
        return " It is a checkpoint: `foldkv export` makes a graph package from it."
    inside = sorted(path.parent.name for path in Path(folder).glob(f"*/{MANIFEST}"))
    return f" It holds the artifacts {', '.join(inside[:8])}: give one of them." if inside else ""


def free_bytes(folder: Path) -> int:
    """Bytes that can be written where a folder is or would be made."""
    return shutil.disk_usage(_existing(landing(folder))).free


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
    if all(path.name.startswith(_LITTER) for path in destination.iterdir()):
        return
    found = artifact_kind(destination)
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
        for path in _beginning_with(beside(destination, mark)):
            if _owner_is_alive(path.name.split(mark, 1)[1]):
                continue
            if mark == _RETIRED_MARK and not destination.exists():
                path.rename(destination)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _put_in_place(staging: Path, destination: Path) -> None:
    retired = beside(destination, f"{_RETIRED_MARK}{os.getpid()}-{secrets.token_hex(4)}")
    try:
        if destination.exists():
            destination.rename(retired)
        staging.rename(destination)
    except BaseException:  # an interrupt too
        if retired.exists() and not destination.exists():
            retired.rename(destination)
        raise
    if retired.exists():
        _keep_unlisted(retired, destination)
    shutil.rmtree(retired, ignore_errors=True)


def _keep_unlisted(old: Path, new: Path) -> None:
    """Move a user's own files from an artifact to the one that replaces it: what the old manifest does not list."""
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
        manifest = json.loads((old / MANIFEST).read_text(encoding="utf-8"))
        listed = {MANIFEST, *manifest["files"], *manifest.get("linked", {})}
        own = {PurePosixPath(name).parts[0] for name in listed}
        for path in old.iterdir():
            if path.name not in own and not path.name.startswith(_LITTER) and not (new / path.name).exists():
                path.rename(new / path.name)


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
            ``linked`` with their size, the sha256 of this many bytes at their start, and who they are (inputs.py).
    """
    known, heads = known or {}, heads or {}
    files, linked = {}, {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name == MANIFEST:
            continue
        if name in heads:
            linked[name] = {
                "head_sha256": _sha256_head(path, heads[name]), "head_bytes": heads[name], "bytes": path.stat().st_size,
                "file": file_identity(path).facts(links_change=True),
            }  # fmt: skip
        else:
            files[name] = {"sha256": known.get(name) or sha256_file(path), "bytes": path.stat().st_size}
    manifest = {"schema_version": SCHEMA_VERSION, "kind": kind, "files": files, **content}
    if linked:
        manifest["linked"] = linked
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def read_manifest(folder: Path, *, kind: str) -> dict[str, Any]:
    """The manifest of an artifact, after checking its kind and version and that its files exist.

    Links are followed, and files that the manifest does not list are nobody's business: the folder can be a snapshot of the
    Hugging Face cache, or have a README in it.

    Raises:
        InputError: the folder's path is not UTF-8.
        ArtifactError: no manifest, not JSON, another kind or version, a file missing or of another
            size, or a file name that leads out of the artifact.
    """
    path = Path(folder) / MANIFEST
    refuse_unreadable_name(Path(folder))
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(
            f"{folder} is not a {kind} artifact: {path} cannot be read ({error.strerror}). Give a folder that foldkv "
            f"wrote.{snapshot_hint(folder) or folder_hint(folder)}"
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
        if path.is_symlink() and not path.exists():
            raise ArtifactError(
                f"{path} is a link to {path.readlink()}, which is missing. Download the artifact again."
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
    """Compare the sha256 of every file with the manifest; for linked files, the sha256 of their start and when they were written.

    Raises:
        ArtifactError: a file's content does not match the manifest, or a linked file was written again.
        SystemFailure: a file cannot be read.
    """
    for name, facts in manifest["files"].items():
        try:
            found = sha256_file(confined(folder, name))
        except OSError as error:
            raise system_failure(error, folder / name) from None
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
        if _written_again(facts.get("file"), file_identity(folder / name).facts(links_change=True)):
            raise ArtifactError(
                f"{folder / name} was written again after the artifact was made, so its weights may be others. "
                "Make the artifact again."
            )


def _written_again(made: Any, now: dict[str, Any]) -> bool:
    """Whether a linked file is the very file of before with newer content. A copy is another file, with its own times."""
    if not isinstance(made, dict):
        return False
    where = ("device", "inode")
    return made != now and [made.get(name) for name in where] == [now.get(name) for name in where]


def _sha256_head(path: Path, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.sha256(file.read(size)).hexdigest()


def confined(folder: Path, name: str) -> Path:
    """``folder/name``, for a name that an artifact or an index gives. It stays below the folder, but links there are followed.

    Who made the folder made the links. What the files contain is checked by their digests.

    Raises:
        ArtifactError: an absolute path, a ``..``, or characters that no name of a file should have.
    """
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or not name or "\\" in name or "\0" in name or shown(name) != name:
        raise ArtifactError(f"{folder}: file name {name!r} leads out of the artifact; it is refused.")
    return folder / name
