"""Headers of safetensors files: where every tensor is, checked against the file's size. No weight is read.

A header is a JSON object after eight bytes of length. A tensor has a dtype, a shape and a range of the bytes that
follow. The ranges must fill those bytes, which finds files that were cut off or have a wrong header.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ...inputs import FileIdentity, file_identity

#: Bits of an element, by safetensors' dtype.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64,
}  # fmt: skip
# safetensors' own limit; a larger length means damage.
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: its name there, safetensors' dtype, shape, absolute offset and size in bytes."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True)
class Shard:
    """One file: its size in bytes, its header's sha256 and size, its tensors by name, and who it was when it was read."""

    file: Path
    bytes: int
    header_sha256: str
    header_bytes: int
    tensors: dict[str, Stored]
    identity: FileIdentity | None = None  # None if it could not be read


def read_shard(file: Path) -> tuple[Shard, list[str]]:
    """The header of a file and everything that is wrong with it; a shard with findings may lack tensors.

    Args:
        file: a safetensors file.
    """
    try:
        with file.open("rb") as handle:
            identity = file_identity(file, descriptor=handle.fileno())
            size = identity.bytes
            start = handle.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if start == b"version ":
                return Shard(file, size, "", 0, {}), [
                    f"{file.name} is a Git LFS pointer, not the file: run `git lfs pull`"
                ]
            if not 0 <= length <= min(_MAX_HEADER, size - 8):
                return Shard(file, size, "", 0, {}), [
                    f"{file.name} cannot be read: its {size} bytes contain no safetensors header"
                ]
            text = handle.read(length)
    except OSError as error:
        return Shard(file, 0, "", 0, {}), [f"{file.name} cannot be read: {error.strerror}"]
    digest = hashlib.sha256(start + text).hexdigest()
    repeated: list[str] = []

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            names = [name for name, _ in pairs]
            repeated.extend(sorted({name for name in names if names.count(name) > 1}))
        return table

    try:
        header = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError):
        return Shard(file, size, digest, 8 + length, {}), [f"{file.name} cannot be read: its header is not JSON"]
    if not isinstance(header, dict):
        return Shard(file, size, digest, 8 + length, {}), [
            f"{file.name} cannot be read: its header is not a JSON object"
        ]
    problems = [f"{file.name} names tensor {name} twice" for name in repeated]
    tensors: dict[str, Stored] = {}
    for name, facts in header.items():
        if name == "__metadata__":
            continue
        stored = _stored(name, facts, file, 8 + length)
        if isinstance(stored, str):
            problems.append(f"{file.name} cannot be read: tensor {name} {stored}")
        else:
            tensors[name] = stored
    if not problems:
        problems = _gaps(file, list(tensors.values()), 8 + length, size)
    return Shard(file, size, digest, 8 + length, tensors, identity), problems


def _stored(name: str, facts: Any, file: Path, start: int) -> Stored | str:
    """The tensor, or what is wrong with its entry."""
    if not isinstance(facts, dict):
        return f"is {facts!r}; expected dtype, shape and offsets"
    dtype, shape, ends = facts.get("dtype"), facts.get("shape"), facts.get("data_offsets")
    if dtype not in _BITS:
        return f"has dtype {dtype!r}, which is not known"
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        return f"has shape {shape!r}"
    if not isinstance(ends, list) or len(ends) != 2 or not all(type(end) is int and end >= 0 for end in ends):
        return f"has offsets {ends!r}"
    wanted = prod(shape) * _BITS[dtype]
    if ends[1] - ends[0] != wanted // 8 or wanted % 8:
        return f"has {ends[1] - ends[0]} bytes; {dtype} {shape} takes {wanted / 8:g}"
    return Stored(name, file, dtype, tuple(shape), start + ends[0], wanted // 8)


def _gaps(file: Path, tensors: list[Stored], start: int, size: int) -> list[str]:
    """The first place where the tensors do not fill the file."""
    at = start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.bytes)):
        if tensor.offset != at:
            return [f"{file.name} cannot be read: tensor {tensor.name} starts at byte {tensor.offset}; expected {at}"]
        at += tensor.bytes
    return [] if at == size else [f"{file.name} cannot be read: it has {size} bytes; its header describes {at}"]
