"""Makes the stacks that a bundle reads (export/contract/stacks.py), and finds those that were made before.

They hold experts in another order, and matrices in another type. Stacks of a small model are made in memory while it is opened. Larger ones are made once, in ``stacks/`` of ``FOLDKV_CACHE`` or of
~/.cache/foldkv: a folder for each checkpoint, and in it a file for each layer. A file is written beside its place and moved
there whole, so a run that was interrupted goes on with the next layer.

The name of the folder is a digest of who the checkpoint's files are (inputs.py) and of what the stacks hold. All bundles that need
the same stacks of the same files share them. If a checkpoint was written again, its old stacks are removed when new ones are made.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..artifact import free_bytes, only_writer, sha256_json, write_whole
from ..errors import InputError, SystemFailure, listing, system_failure
from ..export.contract.chain import CHAIN, ChainTable, stacks_file
from ..export.contract.lock import Weight, WeightsLock
from ..export.contract.stacks import DIGEST, HEADER, Decoded, Stack, facts_in, file_bytes, header
from ..inputs import file_identity
from ..progress import BYTES, Progress, Say, silent
from ..units import size_text
from .stacks_made import SOURCES, stacks_folder
from .weight_files import WeightFiles
from .weight_forms import exact_bfloat16

#: Stacks of this many bytes or fewer are made in memory.
IN_MEMORY = 64 << 20
_PART = ".part"
_BLOCK = 16 << 20
_JOBS = 4  # layers at once; more wait for the disk
_ADVICE = (
    "Let FOLDKV_CACHE name a folder on a disk with room, or leave the weights as they are (`generate --no-place`, "
    "`build --no-place`, or place=False in Python): every step then decodes them, which takes many times as long."
)


class Stacks:
    """The stacks of a bundle."""

    def __init__(self, table: ChainTable, lock: WeightsLock, paths: Mapping[str, Path], files: WeightFiles) -> None:
        """Find out which they are. Nothing is made yet.

        Args:
            table: of the bundle, in its first form.
            lock: of the bundle.
            paths: of the files of the lock that stacks are made from.
            files: has these files opened, and gets the stacks.
        """
        self._lock, self._files = lock, files
        self.by_owner = {
            call.owner: form.stacks
            for call in table.calls
            if (form := table.stacked.get(call.segment)) is not None and form.stacks
        }
        self._sources = {
            name: (Path.cwd() / paths[name], _who(paths[name])) for name in sorted(stack_sources(table, lock))
        }
        facts = {
            "files": {
                name: [lock.files[name].header_sha256, who] for name, (_, who) in self._sources.items()
            },
            "stacks": {
                owner: {role: [type(one).__name__, asdict(one)] for role, one in stacks.items()}
                for owner, stacks in self.by_owner.items()
            },
        }  # fmt: skip
        self.folder = stacks_folder() / sha256_json(facts)[:32]

    @property
    def bytes(self) -> int:
        """Bytes of all stacks."""
        return sum(map(file_bytes, self.by_owner.values()))

    def open(self, progress: Say = silent) -> list[Path]:
        """Give the stacks to ``files``; those that are not there are made.

        Returns:
            The files on disk that were opened.

        Raises:
            InputError: the disk has no room for them.
            SystemFailure: the folder cannot be read or written.
        """
        if self.bytes <= IN_MEMORY:
            for owner, stacks in self.by_owner.items():
                self._files.hold(stacks_file(owner), self._in_memory(owner, stacks))
            return []
        if self.missing():
            self._make(Progress.of(progress))
        for owner in self.by_owner:
            self._files.open(stacks_file(owner), self.path(owner))
        return [self.path(owner) for owner in self.by_owner]

    def path(self, owner: str) -> Path:
        """The file with the stacks of a call."""
        return self.folder / f"{owner}.safetensors"

    def missing(self) -> list[str]:
        """The calls without a file, or with one whose size or header is not that of their stacks."""
        return [owner for owner, stacks in self.by_owner.items() if not _whole(self.path(owner), stacks)]

    def verify(self, progress: Say = silent) -> list[Path]:
        """Hash the stacks on disk and compare them with what was hashed as they were written; returns the files.

        Raises:
            InputError: a file was damaged; all are listed.
            SystemFailure: a file cannot be read.
        """
        there = {owner: self.path(owner) for owner in self.by_owner if self.path(owner).is_file()}
        report, total, done, wrong = Progress.of(progress), sum(p.stat().st_size for p in there.values()), 0, []
        for owner, path in there.items():
            digest, expected = hashlib.sha256(), ""
            try:
                with path.open("rb", buffering=0) as file:
                    with contextlib.suppress(ValueError):
                        expected = facts_in(file.read(HEADER)).get(DIGEST, "")
                    while block := file.read(_BLOCK):
                        digest.update(block)
                        done += len(block)
                        report.steps(done, total, BYTES)
            except OSError as error:
                raise system_failure(error, path) from None
            if digest.hexdigest() != expected or not _whole(path, self.by_owner[owner]):
                wrong.append(f"{path} has sha256 {digest.hexdigest()}; its header says {expected or 'nothing'}")
        if wrong:
            title = "stacks of weights were changed or damaged after they were made"
            raise InputError(listing(title, wrong, "Delete these files; the next run makes them again."))
        return list(there.values())

    def _make(self, report: Progress) -> None:
        try:
            with only_writer(self.folder, report):
                missing = self.missing()  # another process may have made them while this one waited
                if missing:
                    self._write(missing, report)
        except OSError as error:
            raise _refused(system_failure(error, self.folder)) from None
        except SystemFailure as error:
            raise _refused(error) from None

    def _write(self, missing: list[str], report: Progress) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for part in self.folder.glob(f"*{_PART}"):  # of a writer that was killed: this is the only one now
            part.unlink()
        self._remove_outdated(report)
        total, done, counting = sum(file_bytes(self.by_owner[owner]) for owner in missing), [0], threading.Lock()
        free = free_bytes(self.folder)
        if total > free:
            raise InputError(
                f"the weights in the form in which ONNX Runtime reads them take {size_text(total)}; {stacks_folder()} has "
                f"{size_text(free)} of room. {_ADVICE}"
            )
        report(f"stacking {size_text(total)} of weights in {self.folder}, once for all bundles of this checkpoint")
        sources = {name: {"path": str(path), "who": who} for name, (path, who) in self._sources.items()}
        write_whole(self.folder / SOURCES, json.dumps({"sources": sources, "made": None}))

        def advance(size: int) -> None:
            with counting:
                done[0] += size
                report.steps(min(done[0], total), total, BYTES)

        start, stop = time.monotonic(), threading.Event()
        pool = ThreadPoolExecutor(min(_JOBS, len(os.sched_getaffinity(0))))
        try:
            for _ in pool.map(lambda owner: self._write_one(owner, advance, stop), missing):
                pass
        finally:
            stop.set()  # after an error or an interrupt, layers that are being written are given up
            pool.shutdown(cancel_futures=True)
        if len(missing) == len(self.by_owner):
            made = {"bytes": total, "seconds": round(time.monotonic() - start, 3)}
            write_whole(self.folder / SOURCES, json.dumps({"sources": sources, "made": made}))

    def _write_one(self, owner: str, advance: Callable[[int], None], stop: threading.Event) -> None:
        """Write the file of one call beside its place, and move it there."""
        path, stacks = self.path(owner), self.by_owner[owner]
        part = path.with_name(path.name + _PART)
        digest = hashlib.sha256()
        try:
            with part.open("wb") as out:
                out.write(bytes(HEADER))
                for block in self._blocks(owner, stacks):
                    if stop.is_set():
                        return
                    out.write(block.data)
                    digest.update(block.data)
                    advance(block.nbytes)
                out.seek(0)
                out.write(header(stacks, {"layer": owner, DIGEST: digest.hexdigest()}))
                out.flush()
                os.fsync(out.fileno())  # a file in its place is whole, also after a loss of power
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _in_memory(self, owner: str, stacks: Mapping[str, Stack | Decoded]) -> npt.NDArray[np.uint8]:
        made, at = np.zeros(file_bytes(stacks), np.uint8), HEADER
        for block in self._blocks(owner, stacks):
            made[at : at + block.nbytes] = block
            at += block.nbytes
        return made

    def _blocks(self, owner: str, stacks: Mapping[str, Stack | Decoded]) -> Iterator[npt.NDArray[np.uint8]]:
        """The bytes of the stacks one after the other, an expert or a row of scales at a time."""
        for stack in stacks.values():
            weight = self._lock.weights[owner][stack.of]
            if isinstance(stack, Decoded):
                yield from self._values(stack, owner)
                continue
            for expert in range(stack.shape[0]):
                yield self._rows(stack, weight, expert).reshape(-1)

    def _rows(self, stack: Stack, weight: Weight, expert: int) -> npt.NDArray[np.uint8]:
        """One expert of a stack: [rows, bytes of a row]."""
        _, rows, width = stack.shape
        first = expert * (len(weight.parts) // stack.shape[0])
        parts = [weight.parts[first + number] for number in stack.parts]
        matrices = [
            self._files.range(part.file, part.offset, part.bytes).reshape(rows // len(parts), width) for part in parts
        ]
        if len(matrices) == 1:
            return matrices[0]
        return np.stack(matrices, axis=1)

    def _values(self, stack: Decoded, owner: str) -> Iterator[npt.NDArray[np.uint8]]:
        """The values of a matrix."""
        codes, scales = (self._whole(self._lock.weights[owner][role]) for role in (stack.of, stack.scale))
        height = stack.block[0]
        for number, at in enumerate(range(0, stack.shape[0], height)):
            try:
                made = exact_bfloat16(codes[at : at + height], scales[number : number + 1], stack.block)
            except ValueError as error:
                raise InputError(f"{owner}.{stack.of}: {error}. Run without a copy (`--no-place`).") from None
            yield made.view(np.uint8).reshape(-1)

    def _whole(self, weight: Weight) -> npt.NDArray[np.uint8]:
        """The bytes of a weight [rows, bytes of a row]."""
        parts = [self._files.range(part.file, part.offset, part.bytes) for part in weight.parts]
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return joined.reshape(weight.shape[0], -1)

    def _remove_outdated(self, report: Progress) -> None:
        """Remove stacks of files that were written again since: nobody can use them any more."""
        for file in self.folder.parent.glob(f"*/{SOURCES}"):
            if file.parent == self.folder:
                continue
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                rows = json.loads(file.read_bytes())["sources"]
                if any(Path(row["path"]).exists() and _who(Path(row["path"])) != row["who"] for row in rows.values()):
                    report(f"removing {file.parent}: its checkpoint was written again")
                    shutil.rmtree(file.parent)


def verify_stacks(bundle: Path, lock: WeightsLock, paths: Mapping[str, Path], *, progress: Say = silent) -> list[Path]:
    """Check the stacks that runs of a bundle have made on this machine; see :meth:`Stacks.verify`. Nothing for other artifacts."""
    if not (bundle / CHAIN).is_file():
        return []
    return Stacks(ChainTable.read(bundle / CHAIN), lock, paths, WeightFiles()).verify(progress)


def stack_sources(table: ChainTable, lock: WeightsLock) -> set[str]:
    """Names of the files of the lock that stacks are made from."""
    return {
        part.file
        for call in table.calls
        if call.segment in table.stacked
        for stack in table.stacked[call.segment].stacks.values()
        for role in ((stack.of, stack.scale) if isinstance(stack, Decoded) else (stack.of,))
        for part in lock.weights[call.owner][role].parts
    }


def _who(path: Path) -> dict[str, Any]:
    """Who a file is, without the number of its disk, which can change when a machine starts again."""
    return {key: value for key, value in file_identity(path).facts(links_change=True).items() if key != "device"}


def _whole(path: Path, stacks: Mapping[str, Stack | Decoded]) -> bool:
    """Whether a file has the size and the header of stacks."""
    try:
        if path.stat().st_size != file_bytes(stacks):
            return False
        with path.open("rb") as file:
            head = file.read(HEADER)
        return head == header(stacks, facts_in(head))
    except (OSError, ValueError):  # what cannot be read is made again, or cannot be made, which says why
        return False


def _refused(error: SystemFailure) -> SystemFailure:
    return SystemFailure(f"{error} {_ADVICE}", path=error.path, reason=error.reason)
