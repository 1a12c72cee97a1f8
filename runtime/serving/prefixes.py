"""Snapshots of the state by the tokens that it is of, so that a prompt that begins with them need not be fed again.

The state of these models is compressed, and windows of it are overwritten as tokens come. So it cannot be cut at any token,
as a cache of keys and values by block can: what can be used again is the whole state after exactly the tokens of a snapshot.

Bits of the state depend on how tokens were fed: in which chunks, beside which other sequences, by which kernels. A snapshot is
*exact* if a cold run of this very producer would have made the same bits. Others give answers that are as good, but may differ.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ... import __version__
from ...errors import InputError, short
from ...packages import version_of
from ..bundle import StateMeaning
from ..model import Model
from ..snapshots import SlotSnapshot
from .prefix_files import Entry, Key, PrefixFolder, Tokens, new_digest


@dataclass(frozen=True)
class Hit:
    """A snapshot that a prompt begins with.

    Attributes:
        length: tokens that need not be fed.
        snapshot: the state after them.
        exact: whether a cold run would have made the same bits.
    """

    length: int
    snapshot: SlotSnapshot
    exact: bool


@dataclass(frozen=True)
class PrefixStats:
    """What an index holds and did.

    Attributes:
        entries: snapshots in memory, on disk, or both.
        memory_bytes: bytes of those in memory: rows and tokens.
        disk_bytes: bytes of files.
        hits, exact_hits: lookups that found one, and one that is exact.
        misses: lookups that found none.
        reused_tokens: tokens of all hits.
        evictions, disk_evictions: snapshots that left memory, or the disk, for lack of room.
        damaged: files that were deleted because they were damaged.
        unwritten: snapshots that were not written: the disk was full or too slow, or they are larger than all the room.
    """

    entries: int
    memory_bytes: int
    disk_bytes: int
    hits: int
    exact_hits: int
    misses: int
    reused_tokens: int
    evictions: int
    disk_evictions: int
    damaged: int
    unwritten: int


class PrefixIndex:
    """An index of snapshots. A context manager; ``close`` frees the folder. Threads can share it.

    A lookup takes as long as hashing the tokens, or as reading and hashing a file if the snapshot is only on disk. Who cannot wait
    for that asks :meth:`on_disk`, has another thread :meth:`fetch`, and gives what it got to :meth:`find`.
    """

    def __init__(
        self,
        meaning: StateMeaning,
        *,
        producer: str,
        memory_bytes: int,
        folder: Path | None = None,
        disk_bytes: int = 0,
    ) -> None:
        """Open an index, with what its folder has.

        Args:
            meaning: what rows mean: ``bundle.meaning``.
            producer: what computes the bits; engines want :func:`producer_of`. Snapshots of another producer are never exact.
            memory_bytes: the most bytes of rows and tokens in memory. The least recently used leave.
            folder: where snapshots are also written, and found after a restart. None for memory only.
            disk_bytes: the most bytes of the folder's files.

        Raises:
            InputError: an argument is wrong; or the folder is of another bundle, is something else or is in use.
            SystemFailure: the folder cannot be made, read or written.
            MissingDependencyError: there is a folder, and safetensors is not installed.
        """
        for name, value in (("memory_bytes", memory_bytes), ("disk_bytes", disk_bytes)):
            if type(value) is not int or value < 0:
                raise InputError(f"{name} must be an integer of 0 or more, got {short(value)}.")
        if (folder is None) != (disk_bytes == 0):
            raise InputError(
                f"disk_bytes is {disk_bytes} and folder is {folder}. Give both to keep prefixes on disk, or neither."
            )
        self._meaning, self._producer, self._most = meaning, producer, memory_bytes
        self._memory: OrderedDict[Key, Entry] = OrderedDict()  # the least recently used first
        self._bytes = self._hits = self._exact_hits = self._misses = self._reused = self._evictions = 0
        self._closed = False
        self._lock = threading.Lock()
        self._folder: PrefixFolder | None = None
        if folder is not None:
            self._folder = PrefixFolder(
                folder, meaning, producer=producer, most_bytes=disk_bytes, waiting_bytes=memory_bytes
            )

    @classmethod
    def of(
        cls, model: Model, *, chunk: int = 256, memory_bytes: int, folder: Path | None = None, disk_bytes: int = 0
    ) -> Self:
        """An index for the engines of a model that feed prompts in chunks of this size.

        Args:
            model: an open model.
            chunk: what the engines are opened with.
            memory_bytes, folder, disk_bytes: as of the class.

        Raises:
            InputError, SystemFailure, MissingDependencyError: as the class does.
        """
        return cls(
            model.bundle.meaning, producer=producer_of(model, chunk), memory_bytes=memory_bytes, folder=folder, disk_bytes=disk_bytes
        )  # fmt: skip

    @property
    def producer(self) -> str:
        """What computes the bits."""
        return self._producer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def put(self, tokens: Sequence[int] | npt.NDArray[Any], snapshot: SlotSnapshot, *, exact: bool) -> None:
        """Keep a snapshot. Nothing waits for the disk.

        An exact one takes the place of an inexact one of the same tokens, never the other way round. One that is larger than
        the room in memory is kept on disk only. A closed index keeps nothing.

        Args:
            tokens: all tokens in the caches, from the first.
            snapshot: the state after them. It is kept as it is, not copied.
            exact: whether it has the bits of a cold run: fed from the first token in whole chunks of this producer.

        Raises:
            InputError: the snapshot is of other tokens or of another bundle, or has a token that was not fed.
        """
        row = _row(tokens)
        if snapshot.meaning != self._meaning:
            raise InputError(
                f"the snapshot has the meaning {snapshot.meaning}; this index has {self._meaning}. Use one per bundle."
            )
        if snapshot.pending is not None:
            raise InputError(
                f"the snapshot has the token {snapshot.pending} pending. Feed it first, or take the snapshot earlier."
            )
        if len(row) != snapshot.position or not len(row):
            raise InputError(
                f"got {len(row)} tokens for a snapshot of {snapshot.position}; expected as many, and at least one."
            )
        if self._closed:
            return
        row.flags.writeable = False
        entry = Entry(row, snapshot, bool(exact), self._producer)
        key, folder = entry.key, self._folder
        on_disk = folder.exact(key) if folder else None
        with self._lock:
            held = self._memory.get(key)
            if held is not None and np.array_equal(held.tokens, row) and (self._exact(held) or not entry.exact):
                self._memory.move_to_end(key)
                entry = held
            elif entry.exact or not on_disk:
                self._remember(key, entry)
        if folder:
            if on_disk is None or (self._exact(entry) and not on_disk):
                folder.write(key, entry)
            else:
                folder.touch(key)

    def find(
        self, tokens: Sequence[int] | npt.NDArray[Any], *, exact: bool, read: bool = True, fetched: Hit | None = None
    ) -> Hit | None:
        """The longest snapshot of tokens that a prompt begins with and goes on after, so that at least one is left to feed.

        What is only on disk is read, checked and kept in memory. What is damaged there is deleted, and is not found.

        Args:
            tokens: the prompt.
            exact: look for exact ones only.
            read: whether what is only on disk is found. Who must not wait for a disk says False, and what :meth:`fetch` gave.
            fetched: a snapshot that is found if memory has no longer one. It need not be in memory any more.

        Raises:
            InputError: ``tokens`` are no token ids.
        """
        row = _row(tokens)
        hit = self._longest(row, exact, read=read)
        if fetched is not None and (hit is None or hit.length < fetched.length):
            hit = fetched
        with self._lock:
            if hit is None:
                self._misses += 1
            else:
                self._hits += 1
                self._exact_hits += hit.exact
                self._reused += hit.length
        return hit

    def on_disk(self, tokens: Sequence[int] | npt.NDArray[Any], *, exact: bool) -> Key | None:
        """What :meth:`find` would read from disk; None if it would read nothing.

        Args:
            tokens: the prompt.
            exact: look for exact ones only.

        Raises:
            InputError: ``tokens`` are no token ids.
        """
        if self._folder is None:
            return None
        row = _row(tokens)
        for key in reversed(self._begun_with(row)):
            if self._held(key, row[: key[0]], exact) is not None:
                return None
            if self._can_be_read(key, exact):
                return key
        return None

    def fetch(self, tokens: Sequence[int] | npt.NDArray[Any], *, exact: bool) -> Hit | None:
        """What :meth:`find` would find, for a thread that may wait for a disk. It does not count: whoever uses it gives it to ``find``.

        Args:
            tokens: the prompt.
            exact: look for exact ones only.

        Raises:
            InputError: ``tokens`` are no token ids.
        """
        return self._longest(_row(tokens), exact, read=True)

    def holds(self, tokens: Sequence[int] | npt.NDArray[Any], *, exact: bool) -> bool:
        """Whether :meth:`put` of these tokens would change nothing, so that no copy need be made; then it counts as used.

        Args:
            tokens: all tokens in the caches, from the first.
            exact: whether the state has the bits of a cold run.

        Raises:
            InputError: ``tokens`` are no token ids.
        """
        row = _row(tokens)
        digest = new_digest()
        digest.update(row.data)
        key, folder = (len(row), digest.digest()), self._folder
        with self._lock:
            held = self._memory.get(key)
            in_memory = held is not None and (self._exact(held) or not exact)
            if in_memory:
                self._memory.move_to_end(key)
        on_disk = folder.exact(key) if folder else None
        if not in_memory and (on_disk is None or (exact and not on_disk)):
            return False
        if folder and held is not None and in_memory and on_disk is None:
            folder.write(key, held)  # it was not written when it came: too much waited, or the disk was full
        elif folder:
            folder.touch(key)
        return True

    def stats(self) -> PrefixStats:
        """What it holds and did so far."""
        folder = self._folder
        on_disk = folder.keys() if folder else set()
        with self._lock:
            return PrefixStats(
                entries=len(on_disk | self._memory.keys()),
                memory_bytes=self._bytes,
                disk_bytes=folder.file_bytes if folder else 0,
                hits=self._hits,
                exact_hits=self._exact_hits,
                misses=self._misses,
                reused_tokens=self._reused,
                evictions=self._evictions,
                disk_evictions=folder.evictions if folder else 0,
                damaged=folder.damaged if folder else 0,
                unwritten=folder.unwritten if folder else 0,
            )

    def flush(self) -> None:
        """Wait until everything is on disk that is to be written."""
        if self._folder:
            self._folder.flush()

    def close(self) -> None:
        """Write what waits, free the folder, and drop what is in memory. Closing twice is fine.

        A closed index finds nothing and keeps nothing, so that whoever uses it can be closed later.
        """
        self._closed = True
        if self._folder:
            self._folder.close()
        with self._lock:
            self._memory.clear()
            self._bytes = 0

    def _begun_with(self, row: Tokens) -> list[Key]:
        """Entries, the shortest first, whose digest says that ``row`` begins with their tokens and goes on."""
        if self._closed:
            return []
        known = self._folder.keys() if self._folder else set()
        with self._lock:
            known |= self._memory.keys()
        digest, fed, found = new_digest(), 0, list[Key]()
        data = row.data
        for length in sorted({length for length, _ in known if length < len(row)}):
            digest.update(data[fed:length])
            fed = length
            if (key := (length, digest.copy().digest())) in known:
                found.append(key)
        return found

    def _longest(self, row: Tokens, exact: bool, *, read: bool) -> Hit | None:
        """The longest snapshot of tokens that ``row`` begins with and goes on after."""
        for key in reversed(self._begun_with(row)):
            entry = self._held(key, row[: key[0]], exact)
            if entry is None and read:
                entry = self._read(key, row[: key[0]], exact)
            elif entry is not None:
                self._use(key)
            if entry is not None:
                return Hit(key[0], entry.snapshot, self._exact(entry))
        return None

    def _held(self, key: Key, row: Tokens, exact: bool) -> Entry | None:
        """The entry from memory, if it is of these very tokens."""
        with self._lock:
            held = self._memory.get(key)
        fits = held is not None and np.array_equal(held.tokens, row) and (self._exact(held) or not exact)
        return held if fits else None

    def _use(self, key: Key) -> None:
        """Note a use of what is in memory."""
        with self._lock:
            if key in self._memory:
                self._memory.move_to_end(key)
        if self._folder:
            self._folder.touch(key)

    def _can_be_read(self, key: Key, exact: bool) -> bool:
        on_disk = self._folder.exact(key) if self._folder else None
        return on_disk is not None and (on_disk or not exact)

    def _read(self, key: Key, row: Tokens, exact: bool) -> Entry | None:
        """The entry from disk, if it is of these very tokens."""
        if self._folder is None or not self._can_be_read(key, exact):
            return None
        read = self._folder.read(key)
        if read is None or not np.array_equal(read.tokens, row) or (exact and not self._exact(read)):
            return None
        with self._lock:
            self._remember(key, read)
        return read

    def _remember(self, key: Key, entry: Entry) -> None:
        """Put an entry in memory as the one that was used last. Called with the lock held."""
        old = self._memory.pop(key, None)
        if old is not None:
            self._bytes -= old.bytes
        if self._closed or entry.bytes > self._most:
            return
        self._memory[key] = entry
        self._bytes += entry.bytes
        while self._bytes > self._most:
            _, left = self._memory.popitem(last=False)
            self._bytes -= left.bytes
            self._evictions += 1

    def _exact(self, entry: Entry) -> bool:
        return entry.exact and entry.producer == self._producer


def producer_of(model: Model, chunk: int) -> str:
    """Names what computes the bits of a prompt's state: the bundle, the versions and the way that run it, and the chunks it is fed in."""
    bundle = model.bundle
    library = f"{bundle.backend.library} {version_of(bundle.backend.module)}"
    way = "" if model.chain is None else f", {model.chain.way}"
    return f"{bundle.digest}, {library}, foldkv {__version__}, chunks of {chunk}{way}"


def _row(tokens: Sequence[int] | npt.NDArray[Any]) -> Tokens:
    """Token ids as int32 [n] in little endian, a copy.

    Raises:
        InputError: they are no token ids.
    """
    row = np.asarray(tokens)
    if row.ndim != 1 or (
        len(row) and (row.dtype.kind not in "iu" or row.min() < 0 or row.max() > np.iinfo(np.int32).max)
    ):
        raise InputError(f"tokens must be a list of token ids, got {short(tokens)}.")
    return np.array(row, "<i4")
