"""The weights lock: where the weights of a model lie, to the byte, without a path that holds only on one machine.

A weight is what one segment takes as one input, in C order. Its bytes come from one or more ranges of the checkpoint's
files, its *parts*, one after the other: a matrix is one part, and the experts of a layer are one part for each matrix of
each expert. So a checkpoint can hold its experts in any order, in any number of files, or stacked, and the segment does
not change. Standard library only: export writes the lock, and the runtime reads it.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from ...errors import ArtifactError, InputError, listing

LOCK = "weights.lock.json"
VERSION = 1
#: Names folders with weights, separated like those of PATH.
VARIABLE = "FOLDKV_WEIGHTS"
#: Bits of an element, by the dtypes of safetensors that a segment takes.
BITS = {"F32": 32, "BF16": 16, "F16": 16, "I64": 64, "I32": 32, "F8_E4M3": 8, "F8_E8M0": 8, "U8": 8, "I8": 8}


@dataclass(frozen=True)
class Part:
    """A range of bytes of one of the lock's files."""

    file: str
    offset: int
    bytes: int


@dataclass(frozen=True)
class Weight:
    """One input of a segment: dtype as safetensors names it, shape, and the parts that make up its bytes."""

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        """Bytes of the whole weight."""
        return prod(self.shape) * BITS[self.dtype] // 8


@dataclass(frozen=True)
class LockedFile:
    """A file of the checkpoint.

    Attributes:
        bytes: its size.
        header_bytes: size of the header of safetensors, length included.
        header_sha256: of these first bytes; it tells other tensors, but not other values of the same tensors.
        sha256: of the whole file, or None if nobody has hashed it.
    """

    bytes: int
    header_bytes: int
    header_sha256: str
    sha256: str | None = None


@dataclass(frozen=True)
class WeightsLock:
    """Where every weight lies: files by name, and weights by owner (``embed``, ``layers.3``, ``head``) and role.

    Attributes:
        files: names relative to a folder that the lock does not know.
        weights: owner -> role -> weight.
        source: "repository" and "revision" of the checkpoint, where they are known.
    """

    files: dict[str, LockedFile]
    weights: dict[str, dict[str, Weight]]
    source: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[str, str, Weight]]:
        for owner, roles in self.weights.items():
            for role, weight in roles.items():
                yield owner, role, weight

    @property
    def bytes(self) -> int:
        """Bytes of all weights."""
        return sum(weight.bytes for _, _, weight in self)

    @property
    def verified(self) -> bool:
        """Whether the lock has the sha256 of every file."""
        return all(file.sha256 for file in self.files.values())

    def write(self, path: Path) -> None:
        """Write the lock as JSON. Parts are columns of numbers, so that 140,000 of them take a few megabytes."""
        names = {name: number for number, name in enumerate(self.files)}
        content = {
            "version": VERSION,
            "source": self.source,
            "files": {name: vars(file) for name, file in self.files.items()},
            "weights": {
                owner: {role: _row(weight, names) for role, weight in roles.items()}
                for owner, roles in self.weights.items()
            },
        }
        text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
        path.write_text(text.replace('"layers.', '\n"layers.') + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> WeightsLock:
        """Read and check a lock: every part lies in a file of the lock, and the parts fill their weight.

        Raises:
            ArtifactError: the file is missing, of another version or damaged; all findings are listed.
        """
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path} cannot be read as JSON ({error}). Export the checkpoint again.") from None
        version = content.get("version") if isinstance(content, dict) else None
        if version != VERSION:
            raise ArtifactError(
                f"{path} has version {version!r}; this foldkv reads {VERSION}. Export the checkpoint again."
            )
        try:
            files = {name: LockedFile(**facts) for name, facts in content["files"].items()}
            names = list(files)
            weights = {
                owner: {role: _weight(row, names) for role, row in roles.items()}
                for owner, roles in content["weights"].items()
            }
            lock = cls(files, weights, dict(content["source"]))
            findings = list(lock._findings())
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ArtifactError(
                f"{path} is damaged ({type(error).__name__}: {error}). Export the checkpoint again."
            ) from None
        if findings:
            raise ArtifactError(listing(f"{path} is damaged", findings, "Export the checkpoint again."))
        return lock

    def _findings(self) -> Iterator[str]:
        for name, file in self.files.items():
            parts = Path(name).parts
            if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name or "\\" in name:
                yield f"file name {name!r} leads out of the checkpoint"
            if type(file.bytes) is not int or type(file.header_bytes) is not int or file.header_bytes > file.bytes:
                yield f"file {name!r} has {file.bytes!r} bytes and a header of {file.header_bytes!r}"
        for owner, role, weight in self:
            if weight.dtype not in BITS or not all(type(size) is int and size >= 0 for size in weight.shape):
                yield f"{owner}: {role} has dtype {weight.dtype!r} and shape {list(weight.shape)}"
                continue
            if sum(part.bytes for part in weight.parts) != weight.bytes:
                found = sum(part.bytes for part in weight.parts)
                yield f"{owner}: {role} has parts of {found} bytes; {weight.dtype} {list(weight.shape)} takes {weight.bytes}"
            for part in weight.parts:
                end = self.files[part.file].bytes
                if not 0 <= part.offset <= part.offset + part.bytes <= end:
                    yield f"{owner}: {role} reads bytes {part.offset} to {part.offset + part.bytes} of {part.file}, which has {end}"
                    break

    def find(self, folders: Sequence[Path], *, advice: str = "") -> dict[str, Path]:
        """Find every file of the lock, by name, size and header, in the first of the folders that has it.

        Links are followed, so a folder of the Hugging Face cache works. Only headers are read.

        Args:
            folders: in the order of preference; folders that do not exist are skipped.
            advice: what to do if something is missing.

        Raises:
            InputError: files are missing, or only files of that name with other tensors are there; all are listed.
        """
        found: dict[str, Path] = {}
        problems = []
        for name, file in self.files.items():
            reasons = []
            for folder in folders:
                reason = misfit(Path(folder) / name, file)
                if reason is None:
                    found[name] = Path(folder) / name
                    break
                if reason:
                    reasons.append(reason)
            else:
                size = f"{name} ({file.bytes:,} bytes)"
                problems.append(f"{size}: {'; '.join(reasons)}" if reasons else size)
        if problems:
            where = ", ".join(str(folder) for folder in folders) or "no folder"
            known = " of ".join(filter(None, (self.source.get("revision"), self.source.get("repository"))))
            raise InputError(
                listing(
                    f"weights are missing; looked in {where}",
                    problems,
                    f"Fetch {known or 'the checkpoint'} and name its folder with --weights-from or FOLDKV_WEIGHTS. {advice}".strip(),
                )
            )
        return found


def weight_folders(artifact: Path, given: Path | None, before: str | None) -> list[Path]:
    """Where weights are looked for: where the caller says, ``FOLDKV_WEIGHTS``, ``weights/`` in the artifact, where they were.

    If the caller says where, nowhere else: other weights than those that were meant must not stand in for them.
    """
    if given is not None:
        return [given]
    variable = [Path(part) for part in os.environ.get(VARIABLE, "").split(os.pathsep) if part]
    return [*variable, artifact / "weights", *([Path(before)] if before else [])]


def misfit(path: Path, file: LockedFile) -> str | None:
    """Why a path is not the locked file; "" if there is nothing, None if it is that file. Only the header is read."""
    try:
        size = path.stat().st_size
        if size != file.bytes:
            return f"{path} has {size} bytes, expected {file.bytes}"
        with path.open("rb") as handle:
            head = handle.read(file.header_bytes)
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if hashlib.sha256(head).hexdigest() != file.header_sha256:
        return f"{path} has other tensors (its header differs)"
    return None


def header_length(path: Path) -> int:
    """Bytes of the header of a safetensors file, its length field included."""
    with path.open("rb") as handle:
        return 8 + int(struct.unpack("<Q", handle.read(8))[0])


def _row(weight: Weight, names: Mapping[str, int]) -> dict[str, Any]:
    sizes = [part.bytes for part in weight.parts]
    period = next((n for n in range(1, len(sizes) + 1) if sizes == _cycle(sizes[:n], len(sizes))), 0)
    files = [names[part.file] for part in weight.parts]
    return {
        "dtype": weight.dtype,
        "shape": list(weight.shape),
        "file": files[0] if len(set(files)) == 1 else files,
        "offset": [part.offset for part in weight.parts],
        "bytes": sizes[:period],
    }


def _cycle(values: Sequence[int], count: int) -> list[int]:
    return [values[i % len(values)] for i in range(count)] if values else []


def _weight(row: Mapping[str, Any], names: Sequence[str]) -> Weight:
    offsets = row["offset"]
    sizes = _cycle(row["bytes"], len(offsets))
    files = row["file"] if isinstance(row["file"], list) else [row["file"]] * len(offsets)
    parts = tuple(
        Part(names[_index(file)], int(offset), int(size))
        for file, offset, size in zip(files, offsets, sizes, strict=True)
    )
    return Weight(str(row["dtype"]), tuple(row["shape"]), parts)


def _index(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(f"file number {number!r}")
    return number
