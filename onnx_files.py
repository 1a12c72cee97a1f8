"""The files that an ONNX model names for its weights, read from the model without the package onnx.

A model names these files itself. So an artifact could name one file in its manifest, with a digest, and read another. Here
every name in the model is compared with the manifest before anything opens the model. The reader knows just enough of
protobuf: it visits every message that can hold a tensor and steps over everything else.
https://protobuf.dev/programming-guides/encoding/ and onnx.proto have the numbers.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterator
from pathlib import Path

from .errors import ArtifactError, listing, short

# Message -> number of a field -> the message in it, for all fields that lead to a tensor.
FIELDS: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto", 6: "GraphProto", 10: "TensorProto", 11: "GraphProto", 22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {13: "StringStringEntryProto"},
}  # fmt: skip
_ENTRY, _KEY, _VALUE = "StringStringEntryProto", 1, 2
_LOCATION = b"location"  # the key of a file's name
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_TAG = 5  # bytes of the longest tag that readers accept


def external_files(model: Path) -> set[str]:
    """The names of all files that a model's tensors lie in, as the model spells them.

    Raises:
        ArtifactError: the file is not an ONNX model.
        OSError: it cannot be read.
    """
    with model.open("rb") as file:
        if not model.stat().st_size:
            raise ArtifactError(f"{model} is empty; expected an ONNX model. Make the artifact again.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                return set(_locations(content))
            except (IndexError, ValueError) as error:
                raise ArtifactError(f"{model} is not an ONNX model ({error}). Make the artifact again.") from None


def check_external_files(folder: Path, listed: Collection[str], model: str) -> tuple[str, ...]:
    """Check that a model of an artifact names only files that the manifest lists; returns the names, as the model has them.

    Args:
        folder: of the artifact.
        listed: names of the files that the manifest lists.
        model: the model's name in the manifest. It names files relative to its own folder.

    Raises:
        ArtifactError: it names another file, wherever that is; or it is not an ONNX model.
    """
    named = sorted(external_files(Path(folder) / model))
    prefix = model[: model.rfind("/") + 1]
    others = [short(name) for name in named if prefix + name not in listed]
    if others:
        raise ArtifactError(
            listing(f"{Path(folder) / model} names files for its weights that the manifest does not list", others,
                    "The artifact is damaged or was changed: make it again.")
        )  # fmt: skip
    return tuple(named)


def _locations(content: mmap.mmap) -> Iterator[str]:
    waiting = [("ModelProto", 0, len(content))]
    while waiting:
        message, start, end = waiting.pop()
        fields = FIELDS[message]
        for number, at, stop in _parts(content, start, end):
            inner = fields.get(number)
            if inner == _ENTRY:
                # An entry can repeat its fields; readers take the last one, and this one takes all.
                entry = [(field, content[first:last]) for field, first, last in _parts(content, at, stop)]
                if (_KEY, _LOCATION) in entry:
                    yield from (value.decode() for field, value in entry if field == _VALUE)
            elif inner is not None and content.find(_LOCATION, at, stop) >= 0:  # most messages need no visit
                waiting.append((inner, at, stop))


def _parts(content: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The fields of a message that hold bytes: number, start and end."""
    while at < end:
        start = at
        tag, at = (content[at], at + 1) if content[at] < 0x80 else _varint(content, at, end)
        if at - start > _TAG:
            raise ValueError(f"the tag at byte {start} is too long")
        tag &= 0xFFFFFFFF  # as readers in C++ cut it
        kind = tag & 7
        if kind == _BYTES:
            size, at = _varint(content, at, end)
            if at + size > end:
                raise ValueError(f"a field at byte {at} is longer than its message")
            yield tag >> 3, at, at + size
            at += size
        elif kind == _VARINT:
            _, at = _varint(content, at, end)
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:  # groups, which onnx.proto does not use
            raise ValueError(f"byte {at} begins a field of the kind {kind}")
    if at != end:
        raise ValueError(f"a message ends within a field, at byte {end}")


def _varint(content: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError(f"a number ends at byte {at}")
