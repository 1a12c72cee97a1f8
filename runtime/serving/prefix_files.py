"""Snapshots of prefixes on disk: one safetensors file for each, in a folder that one process uses at a time.

A file is written in the folder ``new``, brought to the disk, and only then moved to its place. So a process that is killed
leaves whole entries, and in ``new`` what the next opening removes. Each file has a digest of all its bytes, which every read
checks: a damaged or cut file is deleted and is a miss. Opening reads headers only.

State holds what users wrote: only the owner can read the files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ...errors import InputError, system_failure
from ...packages import require
from ..bundle import StateMeaning
from ..snapshots import SlotSnapshot

log = logging.getLogger(__name__)

#: What a folder is of. A folder of another meaning is refused.
IDENTITY = "index.json"
FORMAT = 1
_KIND = "foldkv prefixes"
_LOCK, _NEW = ".lock", "new"
_NAME = re.compile(r"prefix-([0-9a-f]{32})\.safetensors")
_TOKENS = "tokens"
#: The largest header that safetensors reads.
_LARGEST_HEADER = 100_000_000
#: The most snapshots that wait for being written, and the bytes that more than one of them may hold.
_MOST_WAITING = 16
_LEAST_WAITING_BYTES = 256 << 20

Tokens = npt.NDArray[np.int32]
#: The number of tokens, and their digest.
Key = tuple[int, bytes]


def new_digest() -> hashlib.blake2b:
    """The digest of tokens, which are int32 in little endian."""
    return hashlib.blake2b(digest_size=16)


@dataclass(frozen=True, eq=False)
class Entry:
    """A snapshot and the tokens that it is of.

    Attributes:
        tokens: int32 [position].
        snapshot: the state after them.
        exact: whether it has the bits of a cold run of its producer.
        producer: what computed it.
    """

    tokens: Tokens
    snapshot: SlotSnapshot
    exact: bool
    producer: str

    @property
    def bytes(self) -> int:
        """Bytes of the rows and of the tokens."""
        return self.snapshot.bytes + self.tokens.nbytes

    @property
    def key(self) -> Key:
        """What it is found by."""
        digest = new_digest()
        digest.update(self.tokens.data)
        return len(self.tokens), digest.digest()


class _Damaged(Exception):
    """A file is not what was written."""


@dataclass(frozen=True, eq=False)
class _Head:
    """What the beginning of a file says."""

    raw: bytes  # with the length of the header
    size: int  # of the whole file
    tensors: dict[str, Any]  # as safetensors describes them
    key: Key
    exact: bool
    producer: str
    digest: str


@dataclass(frozen=True, eq=False)
class _File:
    """What is known of a file without reading it."""

    path: Path
    bytes: int
    exact: bool  # and of this folder's producer


class PrefixFolder:
    """The entries of one folder. Threads can share it; one of its own writes.

    Attributes:
        path: the folder.
        evictions: files that were deleted for lack of room.
        damaged: files that were deleted because they were damaged.
        unwritten: entries that were not written: the disk was full or too slow, or they are larger than all the room.
    """

    def __init__(
        self, path: Path, meaning: StateMeaning, *, producer: str, most_bytes: int, waiting_bytes: int
    ) -> None:
        """Open a folder, or make it.

        Args:
            path: the folder. It may be missing or empty.
            meaning: what rows mean. All entries of a folder have the same meaning.
            producer: what computes snapshots here.
            most_bytes: the most bytes of all files. The one that is being written comes on top of it.
            waiting_bytes: the most bytes of entries that wait for being written; 256 MiB if it is less.

        Raises:
            InputError: the folder is of another meaning, is something else, belongs to another user, or is in use. Nothing
                was changed.
            SystemFailure: it cannot be made, read or written.
            MissingDependencyError: safetensors is not installed.
        """
        require("prefixes on disk", otherwise="or keep prefixes in memory only")
        self.path = Path(path)
        self.evictions = self.damaged = self.unwritten = 0
        self._meaning, self._producer, self._most = meaning, producer, most_bytes
        self._most_waiting = max(waiting_bytes, _LEAST_WAITING_BYTES)
        self._files: OrderedDict[Key, _File] = OrderedDict()  # the least recently used first
        self._bytes = 0
        self._waiting: OrderedDict[Key, Entry] = OrderedDict()  # with the one that is being written
        self._failing = self._closing = False
        self._last_use = 0
        self._changed = threading.Condition()
        try:
            self._check()
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = self._locked()
        except OSError as error:
            raise system_failure(error, self.path) from None
        try:
            self._open()
        except BaseException as error:
            os.close(self._lock)
            if isinstance(error, OSError):
                raise system_failure(error, self.path) from None
            raise
        self._writer = threading.Thread(target=self._run, name="foldkv prefixes", daemon=True)
        self._writer.start()

    # What is there

    @property
    def file_bytes(self) -> int:
        """Bytes of all files."""
        return self._bytes

    def keys(self) -> set[Key]:
        """Entries that are there or wait for being written."""
        with self._changed:
            return {*self._files, *self._waiting}

    def exact(self, key: Key) -> bool | None:
        """Whether an entry is exact and of this producer; None if it is not there."""
        with self._changed:
            waiting, file = self._waiting.get(key), self._files.get(key)
        if waiting is None:
            return None if file is None else file.exact
        return self._is_exact(waiting.exact, waiting.producer) or (file is not None and file.exact)

    def touch(self, key: Key) -> None:
        """Note a use: other entries leave before this one, after the folder was closed and opened, too."""
        with self._changed:
            file = self._files.get(key)
            if file is not None:
                self._files.move_to_end(key)
                with contextlib.suppress(OSError):
                    os.utime(file.path, ns=(self._now(), self._last_use))

    def read(self, key: Key) -> Entry | None:
        """An entry, whole and checked. None if it is not there, is damaged, or cannot be read; never an error."""
        with self._changed:
            waiting, file = self._waiting.get(key), self._files.get(key)
        if file is None or (
            waiting is not None and (not file.exact or self._is_exact(waiting.exact, waiting.producer))
        ):
            return waiting
        try:
            entry = self._load(file.path, key)
        except FileNotFoundError:  # left for lack of room meanwhile, or was deleted by someone
            self._forget(key, file)
            return None
        except (OSError, MemoryError) as error:
            log.warning("%s cannot be read (%s); it is a miss.", file.path, error)
            return None
        except Exception as error:  # noqa: BLE001 - whatever a damaged file leads to
            self._forget(key, file, damage=str(error))
            return None
        self.touch(key)
        return entry

    # Writing

    def write(self, key: Key, entry: Entry) -> None:
        """Have an entry written by the other thread, in place of an older one of the same tokens.

        It is dropped if too many wait already: whoever calls this must not wait for a disk.
        """
        with self._changed:
            others = [one.bytes for at, one in self._waiting.items() if at != key]
            full = len(others) >= _MOST_WAITING or sum(others) + entry.bytes > self._most_waiting
            if self._closing or entry.bytes > self._most or (others and full):
                self.unwritten += 1
                return
            self._waiting[key] = entry
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until nothing waits for being written."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting)

    def close(self) -> None:
        """Write what waits, and let others use the folder. Closing twice is fine."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._changed.notify_all()
        self._writer.join()
        os.close(self._lock)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                key, entry = next(iter(self._waiting.items()))
            new = self.path / _NEW / _name(key)
            try:
                self._write(new, key, entry)
                self._failing = False
            except Exception as error:  # noqa: BLE001 - safetensors has an error of its own for a full disk
                self.unwritten += 1
                if not self._failing:
                    log.warning(
                        "%s: snapshots of prefixes cannot be written (%s). Answers do not need them. Free some room on the "
                        "disk, or give another folder.", self.path, error,
                    )  # fmt: skip
                self._failing = True
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)
            with self._changed:
                if self._waiting.get(key) is entry:  # else a better one came meanwhile
                    del self._waiting[key]
                self._changed.notify_all()

    def _write(self, new: Path, key: Key, entry: Entry) -> None:
        from safetensors.numpy import save_file

        tensors = {_TOKENS: entry.tokens} | {
            f"rows.{index}": np.ascontiguousarray(rows) for index, rows in enumerate(entry.snapshot.rows)
        }
        mark = secrets.token_hex(32)  # stands for the digest, which takes its place
        metadata = {
            "format": str(FORMAT), "meaning": _meaning_text(self._meaning), "producer": entry.producer, "position": str(key[0]),
            "exact": str(entry.exact).lower(), "tokens": key[1].hex(), "digest": mark,
        }  # fmt: skip
        new.parent.mkdir(mode=0o700, exist_ok=True)
        save_file(tensors, new, metadata=metadata)
        with new.open("r+b") as file:
            os.fchmod(file.fileno(), 0o600)
            head = _read_head(file)
            digest = hashlib.file_digest(file, lambda: _file_digest(head, mark)).hexdigest()
            file.seek(head.index(mark.encode()))
            file.write(digest.encode())
            file.flush()
            os.fsync(file.fileno())
            size = file.seek(0, os.SEEK_END)
        if size > self._most:
            self.unwritten += 1
            return
        with self._changed:
            old = self._files.get(key)
            if old is not None:
                self._files.move_to_end(key)  # it leaves last, when its place is taken
            less = old.bytes if old is not None else 0
            self._make_room(size - less)
            os.utime(new, ns=(self._now(), self._last_use))
            row = _File(self.path / new.name, size, self._is_exact(entry.exact, entry.producer))
            new.replace(row.path)
            self._files[key] = row
            self._bytes += size - less

    def _make_room(self, more: int) -> None:
        """Delete what was not used for longest, until there is room for ``more`` bytes."""
        while self._files and self._bytes + more > self._most:
            _, file = self._files.popitem(last=False)
            self._bytes -= file.bytes
            self.evictions += 1
            with contextlib.suppress(OSError):
                file.path.unlink(missing_ok=True)

    def _now(self) -> int:
        """Nanoseconds, later than at every use before."""
        self._last_use = max(time.time_ns(), self._last_use + 1)
        return self._last_use

    def _is_exact(self, exact: bool, producer: str) -> bool:
        return exact and producer == self._producer

    # Reading

    def _load(self, path: Path, key: Key) -> Entry:
        # Not by safetensors, which copies the bytes once more and keeps all other threads waiting meanwhile.
        with path.open("rb") as file:
            head = self._head(path, file)
            data = np.empty(head.size - len(head.raw), np.uint8)  # a bytearray would be filled with zeros first
            if file.readinto(data.data) != len(data):
                raise _Damaged("it was cut")
        digest = _file_digest(head.raw, head.digest)
        digest.update(data.data)
        if digest.hexdigest() != head.digest:
            raise _Damaged("its digest is another")
        tensors = {name: _tensor(data, facts) for name, facts in head.tensors.items()}
        rows = tuple(tensors[f"rows.{index}"] for index in range(len(tensors) - 1))
        return Entry(tensors[_TOKENS], SlotSnapshot(self._meaning, key[0], None, rows), head.exact, head.producer)

    def _head(self, path: Path, file: BinaryIO) -> _Head:
        """The beginning of an open file, whose name and size agree with it."""
        raw, size = _read_head(file), os.fstat(file.fileno()).st_size
        try:
            tensors = json.loads(raw[8:])
            metadata = tensors.pop("__metadata__")
            length = len(raw) + max(facts["data_offsets"][1] for facts in tensors.values())
            key = tensors[_TOKENS]["shape"][0], bytes.fromhex(metadata["tokens"])
            wanted = {"format": str(FORMAT), "position": str(key[0]), "meaning": _meaning_text(self._meaning)}
            agrees = all(metadata[name] == value for name, value in wanted.items()) and _name(key) == path.name
            head = _Head(
                raw, size, tensors, key, metadata["exact"] == "true", metadata["producer"], str(metadata["digest"])
            )
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise _Damaged("its header is wrong") from None
        if length != size:
            raise _Damaged(f"it has {size} bytes, and should have {length}")
        if not agrees:
            raise _Damaged("its header is that of another file")
        return head

    def _forget(self, key: Key, file: _File, damage: str = "") -> None:
        with self._changed:
            if self._files.get(key) is not file:  # was replaced meanwhile
                return
            del self._files[key]
            self._bytes -= file.bytes
            if damage:
                self._drop(file.path, damage)

    def _drop(self, path: Path, damage: str) -> None:
        self.damaged += 1
        log.warning("%s is damaged (%s). It is deleted.", path, damage)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)

    # Opening

    def _check(self) -> bool:
        """Whether the folder has its identity already. Reads only.

        Raises:
            InputError: it is of another meaning, or is something else.
        """
        if not self.path.exists():
            return False
        if not self.path.is_dir():
            raise InputError(f"{self.path} is a file; expected a folder for snapshots of prefixes. Choose another.")
        try:
            found = json.loads((self.path / IDENTITY).read_bytes())
        except FileNotFoundError:
            if other := sorted({one.name for one in self.path.iterdir()} - {_LOCK, _NEW}):
                raise InputError(
                    f"{self.path} is not empty ({other[0]!r}) and is not a folder of prefixes; nothing was changed. Give an "
                    "empty folder, or one that does not exist."
                ) from None
            return False
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or found.get("kind") != _KIND:
            raise InputError(
                f"{self.path / IDENTITY} is not that of a folder of prefixes; nothing was changed. Give an empty folder, or one "
                "that does not exist."
            )
        ours, theirs = {"format": FORMAT} | dataclasses.asdict(self._meaning), {"format": found.get("format")}
        if isinstance(meaning := found.get("meaning"), dict):
            theirs |= meaning
        if ours != theirs:
            differ = ", ".join(
                f"{name} {theirs.get(name)!r}, here {ours.get(name)!r}"
                for name in dict.fromkeys([*ours, *theirs])
                if ours.get(name) != theirs.get(name)
            )
            raise InputError(
                f"{self.path} has snapshots of another bundle ({differ}); nothing was changed. Give a folder for each bundle, or "
                "delete this one if that bundle is not used any more."
            )
        return True

    def _locked(self) -> int:
        """The descriptor of the lock, which ends with the process."""
        lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(lock, 0)
            os.write(lock, str(os.getpid()).encode())
        except BlockingIOError:
            holder = os.read(lock, 20).decode(errors="replace")
            os.close(lock)
            raise InputError(
                f"{self.path} is used by another server{f' (process {holder})' if holder.isdigit() else ''}. Give each a folder of "
                "its own, or stop the other one."
            ) from None
        except OSError:
            os.close(lock)
            raise
        return lock

    def _open(self) -> None:
        known = self._check()  # again: another process may have had the lock until now
        if self.path.stat().st_mode & 0o077:
            try:
                self.path.chmod(0o700)
            except PermissionError:
                raise InputError(
                    f"{self.path} belongs to another user, who could read what users wrote. Give a folder below it, which is then "
                    "made for this user only."
                ) from None
        shutil.rmtree(self.path / _NEW, ignore_errors=True)
        (self.path / _NEW).mkdir(mode=0o700, exist_ok=True)
        if not known:
            new = self.path / _NEW / IDENTITY
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                json.dump(
                    {"kind": _KIND, "format": FORMAT, "meaning": dataclasses.asdict(self._meaning)}, file, indent=2
                )
                file.flush()
                os.fsync(file.fileno())
            new.replace(self.path / IDENTITY)
        found = list[tuple[int, Key, _File]]()
        for path in sorted(self.path.iterdir()):
            if _NAME.fullmatch(path.name) and path.is_file():
                try:
                    found.append(self._known(path))
                except _Damaged as error:
                    self._drop(path, str(error))
                except OSError as error:
                    log.warning("%s cannot be read (%s); it is left out.", path, error)
        for used, key, row in sorted(found, key=lambda one: one[0]):
            self._files[key], self._last_use = row, used
            self._bytes += row.bytes
        self._make_room(0)

    def _known(self, path: Path) -> tuple[int, Key, _File]:
        """When a file was used last, and what its header says."""
        with path.open("rb") as file:
            head = self._head(path, file)
            used = os.fstat(file.fileno()).st_mtime_ns
        return used, head.key, _File(path, head.size, self._is_exact(head.exact, head.producer))


def _name(key: Key) -> str:
    return f"prefix-{key[1].hex()}.safetensors"


def _meaning_text(meaning: StateMeaning) -> str:
    return json.dumps(dataclasses.asdict(meaning), sort_keys=True)


def _read_head(file: BinaryIO) -> bytes:
    """The length of the header, 8 bytes, and the header."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > _LARGEST_HEADER:
        raise _Damaged("its header is wrong")
    head = start + file.read(length)
    if len(head) < 8 + length:
        raise _Damaged("it was cut")
    return head


def _tensor(data: npt.NDArray[np.uint8], facts: dict[str, Any]) -> npt.NDArray[Any]:
    """A tensor in the bytes after the header, read-only: U8, I32, F16, ... as safetensors names types."""
    code = facts["dtype"]
    kind = np.dtype(f"<{code[0].lower()}{int(code[1:]) // 8}")
    tensor: npt.NDArray[Any] = np.ndarray(facts["shape"], kind, data, facts["data_offsets"][0])
    tensor.flags.writeable = False
    return tensor


def _file_digest(head: bytes, mark: str) -> hashlib.blake2b:
    """The digest of a file's bytes, begun with its head. The digest itself, ``mark`` there, counts as zeros."""
    text = mark.encode()
    if len(text) != 64 or head.count(text) != 1:
        raise _Damaged("its header is wrong")
    digest = hashlib.blake2b(digest_size=32)
    digest.update(head.replace(text, bytes(64)))
    return digest
