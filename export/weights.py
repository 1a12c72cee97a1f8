"""Where a graph's weights are and how they are stored: in the checkpoint's own files, or repacked. No weight is read here.

``reference`` points into the safetensors files. It needs a dtype that ONNX has for every tensor. It also needs the routed
experts of a layer in one file at a regular distance, in any order: then they are the rows of one tensor.
``repack`` plans files per layer with the experts in that form; :mod:`foldkv.export.repack` writes them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from ..errors import CheckpointError, listing
from .checkpoint.formats import PLAIN
from .checkpoint.reader import Checkpoint, parameter_shapes, scale_name
from .checkpoint.shards import Stored
from .operators.packed import PARTS, Matrix

EXPERTS = "ffn.experts"
#: Folder of the package with the weights, linked or repacked.
FOLDER = "weights"
_ALIGNMENT = 64
# Exponents are looked up, so their type must cast to Gather's index in every backend: int8 (operators/packed.py).
_DTYPES = {
    "F32": ir.DataType.FLOAT, "BF16": ir.DataType.BFLOAT16, "F16": ir.DataType.FLOAT16, "I64": ir.DataType.INT64,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN, "F8_E8M0": ir.DataType.INT8, "U8": ir.DataType.INT8, "I8": ir.DataType.INT8,
}  # fmt: skip


@dataclass(frozen=True)
class Data:
    """A range of bytes of a file of the package, as a tensor."""

    location: str
    offset: int
    length: int
    dtype: ir.DataType
    shape: tuple[int, ...]

    def tensor(self, name: str) -> ir.ExternalTensor:
        """The tensor as external data of a graph; its file is not opened."""
        return ir.ExternalTensor(
            self.location, self.offset, self.length, self.dtype, shape=ir.Shape(self.shape), name=name, base_dir=""
        )


@dataclass(frozen=True)
class Plain:
    """A tensor whose elements are its values."""

    data: Data

    @property
    def signature(self) -> object:
        """What the graph that reads it depends on."""
        return (self.data.dtype.name, self.data.shape)


@dataclass(frozen=True)
class Quantised:
    """An e4m3 matrix with a scale per block; the scale is float32, or bytes of e8m0."""

    data: Data
    scale: Data
    block: tuple[int, int]

    @property
    def signature(self) -> object:
        """What the graph that reads it depends on."""
        return (self.data.dtype.name, self.data.shape, self.scale.dtype.name, self.scale.shape, self.block)


@dataclass(frozen=True)
class Packed:
    """The routed experts of a layer: codes and scales [E, bytes], the row of every expert, and where its matrices are."""

    format: str
    codes: Data
    scales: Data
    slots: tuple[int, ...]
    matrices: tuple[tuple[str, Matrix], ...]

    @property
    def signature(self) -> object:
        """What the graph that reads it depends on."""
        return (self.format, self.codes.shape, self.scales.shape, self.matrices)


Source = Plain | Quantised | Packed


class Weights(Mapping[str, Source]):
    """Every weight by its released name; the experts of layer 3 are ``layers.3.ffn.experts``."""

    def __init__(self, sources: dict[str, Source]) -> None:
        self._sources = sources
        self._layers: dict[int, dict[str, Source]] = {}
        for name, source in sources.items():
            if name.startswith("layers."):
                self._layers.setdefault(int(name.split(".", 2)[1]), {})[name] = source

    def __getitem__(self, name: str) -> Source:
        return self._sources[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def layer(self, layer: int) -> dict[str, Source]:
        """The weights of one layer."""
        return self._layers[layer]


@dataclass(frozen=True)
class Copy:
    """Bytes that repacking moves: a tensor of the checkpoint to a place in a file of the package."""

    stored: Stored
    location: str
    offset: int


def referenced(checkpoint: Checkpoint) -> Weights:
    """The weights in the checkpoint's own files, under ``weights/`` of the package.

    Raises:
        CheckpointError: some cannot be used in place; all are listed.
    """
    problems: list[str] = []
    sources: dict[str, Source] = {}
    layouts: set[object] = set()
    for name in parameter_shapes(checkpoint.spec):
        if name.endswith(".experts.w2"):
            continue
        if name.endswith(".experts.w13"):
            found: Source | str = _rows_in_place(checkpoint, name.removesuffix(".w13"))
            if isinstance(found, Packed):
                layouts.add(found.matrices)
        else:
            found = _single(checkpoint, name, {})
        if isinstance(found, str):
            problems.append(found)
        else:
            sources[name.removesuffix(".w13")] = found
    if len(layouts) > 1:
        problems.append(f"experts are in {len(layouts)} different orders; expected one")
    if problems:
        raise CheckpointError(
            listing(
                f"weights of {checkpoint.folder} cannot be used in place",
                problems,
                "Export with --weights repack, or float32.",
            )
        )
    return Weights(sources)


def repacked(checkpoint: Checkpoint) -> tuple[Weights, list[Copy]]:
    """The weights in the package's own files, one per layer and one for the rest, and what to copy into them.

    Raises:
        CheckpointError: some have a format that no graph reads; all are listed.
    """
    problems: list[str] = []
    sources: dict[str, Source] = {}
    copies: list[Copy] = []
    ends: dict[str, int] = {}
    for name in parameter_shapes(checkpoint.spec):
        if name.endswith(".experts.w2"):
            continue
        layer = name.split(".")[1] if name.startswith("layers.") else ""
        location = f"{FOLDER}/layer-{int(layer):03}.bin" if layer else f"{FOLDER}/ends.bin"
        if name.endswith(".experts.w13"):
            found: Source | str = _rows_repacked(checkpoint, name.removesuffix(".w13"), location, ends, copies)
        else:
            placed = {}
            for stored in _parts(checkpoint, name):
                placed[stored.name] = (location, _place(ends, location, stored.bytes))
                copies.append(Copy(stored, *placed[stored.name]))
            found = _single(checkpoint, name, placed)
        if isinstance(found, str):
            problems.append(found)
        else:
            sources[name.removesuffix(".w13")] = found
    if problems:
        raise CheckpointError(
            listing(f"weights of {checkpoint.folder} cannot be repacked", problems, "Export with --weights float32.")
        )
    return Weights(sources), copies


def _place(ends: dict[str, int], location: str, size: int) -> int:
    """Room for that many bytes at the aligned end of a file."""
    at = -(-ends.get(location, 0) // _ALIGNMENT) * _ALIGNMENT
    ends[location] = at + size
    return at


def _parts(checkpoint: Checkpoint, name: str) -> list[Stored]:
    stored = [checkpoint.headers[name]]
    format_ = checkpoint.format(name)
    return stored if format_ is None or format_.name == PLAIN else [*stored, checkpoint.headers[scale_name(name)]]


def _data(stored: Stored, checkpoint: Checkpoint, placed: Mapping[str, tuple[str, int]]) -> Data:
    inside = stored.file.relative_to(checkpoint.folder).as_posix()
    location, offset = placed.get(stored.name, (f"{FOLDER}/{inside}", stored.offset))
    return Data(location, offset, stored.bytes, _DTYPES[stored.dtype], stored.shape)


def _single(checkpoint: Checkpoint, name: str, placed: Mapping[str, tuple[str, int]]) -> Source | str:
    parts = _parts(checkpoint, name)
    for stored in parts:
        if stored.dtype not in _DTYPES:
            return f"tensor {name} has dtype {stored.dtype}; the graph takes {', '.join(_DTYPES)}"
    data = [_data(stored, checkpoint, placed) for stored in parts]
    if len(data) == 1:
        return Plain(data[0])
    format_ = checkpoint.format(name)
    assert format_ is not None
    if data[0].dtype != ir.DataType.FLOAT8E4M3FN:
        return f"tensor {name} is {format_.name}; only routed experts can be used in this format"
    rows, columns = data[0].shape
    block = (min(format_.block[0], rows), min(format_.block[1], columns))
    return Quantised(data[0], data[1], block)


def _experts(checkpoint: Checkpoint, prefix: str) -> tuple[str, list[dict[str, tuple[Stored, Stored]]]] | str:
    """The format of a layer's experts, and every expert's weight and scale by part; or why they cannot be used."""
    if f"{prefix}.w13" in checkpoint.headers:
        return f"{prefix} are stacked in the checkpoint; single experts are expected"
    rows = [
        {part: f"{prefix}.{expert}.{part}.weight" for part in PARTS} for expert in range(checkpoint.spec.num_experts)
    ]
    formats = {checkpoint.format(name) for row in rows for name in row.values()}
    if len(formats) != 1 or (format_ := formats.pop()) is None or format_.name == PLAIN:
        return f"{prefix} are not all e4m3, or all e2m1"
    parts = [
        {part: (checkpoint.headers[name], checkpoint.headers[scale_name(name)]) for part, name in row.items()}
        for row in rows
    ]
    for name, scale in parts[0].values():
        if scale.dtype not in ("F8_E8M0", "U8"):
            return f"{prefix} have scales in {scale.dtype}; e8m0 is expected"
        shape = _matrix_shape(name)
        for size, count, block in zip(shape, scale.shape, format_.block, strict=True):
            if count > 1 and size % block:
                return f"{prefix} are {list(shape)}, which is not a multiple of the {list(format_.block)} that share a scale"
    return format_.name, parts


def _matrix_shape(stored: Stored) -> tuple[int, int]:
    rows, columns = stored.shape
    return (rows, columns) if stored.dtype == "F8_E4M3" else (rows, 2 * columns)


def _rows_in_place(checkpoint: Checkpoint, prefix: str) -> Packed | str:
    found = _experts(checkpoint, prefix)
    if isinstance(found, str):
        return found
    format_, parts = found
    tables = []
    for kind in (0, 1):
        table = _Rows.of([{part: pair[kind] for part, pair in row.items()} for row in parts])
        if isinstance(table, str):
            return f"{prefix}: {'scales' if kind else 'weights'} {table}"
        tables.append(table)
    codes, scales = tables
    if codes.slots != scales.slots:
        return f"{prefix}: weights and scales are in different orders"
    matrices = _matrices(parts[0], codes.offsets, scales.offsets)
    return Packed(format_, codes.data(checkpoint), scales.data(checkpoint), codes.slots, matrices)


def _rows_repacked(
    checkpoint: Checkpoint, prefix: str, location: str, ends: dict[str, int], copies: list[Copy]
) -> Packed | str:
    found = _experts(checkpoint, prefix)
    if isinstance(found, str):
        return found
    format_, parts = found
    count, data, offsets = len(parts), [], []
    for kind in (0, 1):
        sizes = {part: pair[kind].bytes for part, pair in parts[0].items()}
        row = sum(sizes.values())
        start = _place(ends, location, count * row)
        within = {part: sum(sizes[other] for other in PARTS[: PARTS.index(part)]) for part in PARTS}
        copies += [
            Copy(pair[kind], location, start + expert * row + within[part])
            for expert, pairs in enumerate(parts)
            for part, pair in pairs.items()
        ]
        data.append(Data(location, start, count * row, ir.DataType.INT8, (count, row)))
        offsets.append(within)
    matrices = _matrices(parts[0], offsets[0], offsets[1])
    return Packed(format_, data[0], data[1], tuple(range(count)), matrices)


def _matrices(row: dict[str, tuple[Stored, Stored]], codes: dict[str, int], scales: dict[str, int]) -> tuple[Any, ...]:
    return tuple(
        (part, Matrix(codes[part], scales[part], _matrix_shape(weight), (scale.shape[0], scale.shape[1])))
        for part, (weight, scale) in row.items()
    )


@dataclass(frozen=True)
class _Rows:
    """Tensors of all experts, in one file at a regular distance."""

    first: Stored
    start: int
    stride: int
    slots: tuple[int, ...]
    offsets: dict[str, int]

    @classmethod
    def of(cls, experts: list[dict[str, Stored]]) -> _Rows | str:
        files = {stored.file for row in experts for stored in row.values()}
        if len(files) > 1:
            return f"are in {len(files)} files"
        starts = [min(stored.offset for stored in row.values()) for row in experts]
        offsets = {part: stored.offset - starts[0] for part, stored in experts[0].items()}
        for row, start in zip(experts, starts, strict=True):
            if {part: stored.offset - start for part, stored in row.items()} != offsets:
                return "are not at the same offsets in every expert"
        order = sorted(starts)
        extent = max(offsets[part] + stored.bytes for part, stored in experts[0].items())
        stride = order[1] - order[0] if len(order) > 1 else extent
        if stride < extent or any(b - a != stride for a, b in itertools.pairwise(order)):
            return "are not at a regular distance"
        file = next(iter(files))
        if order[0] + len(order) * stride > file.stat().st_size:
            return "are at a distance that leads out of the file"
        place = {start: slot for slot, start in enumerate(order)}
        return cls(next(iter(experts[0].values())), order[0], stride, tuple(place[start] for start in starts), offsets)

    def data(self, checkpoint: Checkpoint) -> Data:
        """All rows as one tensor, in their file."""
        inside = self.first.file.relative_to(checkpoint.folder).as_posix()
        count = len(self.slots)
        return Data(f"{FOLDER}/{inside}", self.start, count * self.stride, ir.DataType.INT8, (count, self.stride))
