"""The weights of a model by owner and role, with how each is stored: from a checkpoint's headers, no weight is read.

An owner is a call of a segment: ``embed``, ``layers.3``, ``head``. A role is an input of that segment, named as released
checkpoints name the tensor within a layer (``attn.wq_a.weight``, ``attn.wq_a.scale``). The routed experts of a layer are
few roles, whatever the checkpoint calls them and however it spreads them over files:

- plain ones: ``ffn.experts.w13`` [E, 2I, C], gate over up, and ``ffn.experts.w2`` [E, C, I];
- quantised ones: ``ffn.experts.codes`` and ``ffn.experts.scales`` [E, bytes]; a row has w1, w2 and w3 one after the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import onnx_ir as ir

from ..errors import CheckpointError, listing
from .checkpoint.formats import PLAIN, Format
from .checkpoint.names import scale_name
from .checkpoint.reader import Checkpoint
from .checkpoint.shards import Stored
from .contract.lock import BITS, LockedFile, Part, Weight, WeightsLock
from .contract.weights import EXPERTS
from .model.decoder import parameter_shapes
from .operators.packed import PARTS, Matrix
from .tensor_table import expert_parts

EMBED, HEAD = "embed", "head"
# Exponents are looked up, so their type must cast to Gather's index in every backend: int8 (operators/packed.py).
_DTYPES = {
    "F32": ir.DataType.FLOAT, "BF16": ir.DataType.BFLOAT16, "F16": ir.DataType.FLOAT16, "I64": ir.DataType.INT64,
    "I32": ir.DataType.INT32, "F8_E4M3": ir.DataType.FLOAT8E4M3FN, "F8_E8M0": ir.DataType.INT8, "U8": ir.DataType.INT8,
    "I8": ir.DataType.INT8,
}  # fmt: skip

#: Names of types in the tables of bundles (contract/chain.py).
DTYPE_NAMES = {
    ir.DataType.FLOAT: "float32", ir.DataType.BFLOAT16: "bfloat16", ir.DataType.FLOAT16: "float16",
    ir.DataType.INT64: "int64", ir.DataType.INT32: "int32", ir.DataType.INT8: "int8",
    ir.DataType.FLOAT8E4M3FN: "float8e4m3fn",
}  # fmt: skip


def onnx_dtype(weight: Weight) -> ir.DataType:
    """The type in which a graph takes a weight."""
    return _DTYPES[weight.dtype]


@dataclass(frozen=True)
class Plain:
    """A tensor whose elements are its values."""

    weight: Weight

    @property
    def signature(self) -> object:
        """What the graph that reads it depends on."""
        return (self.weight.dtype, self.weight.shape)


@dataclass(frozen=True)
class Quantised:
    """An e4m3 matrix with a scale per block; the scale is float32, or bytes of e8m0."""

    weight: Weight
    scale: Weight
    block: tuple[int, int]

    @property
    def signature(self) -> object:
        """What the graph that reads it depends on."""
        return (self.weight.dtype, self.weight.shape, onnx_dtype(self.scale).name, self.scale.shape, self.block)


@dataclass(frozen=True)
class Packed:
    """The routed experts of a layer: codes and scales [E, bytes], and where the matrices are in a row."""

    format: str
    codes: Weight
    scales: Weight
    matrices: tuple[tuple[str, Matrix], ...]

    @property
    def signature(self) -> object:
        """What the graph that reads it depends on."""
        return (self.format, self.codes.shape, self.scales.dtype, self.scales.shape, self.matrices)


Source = Plain | Quantised | Packed
#: owner -> role -> how the weight is stored; packed experts are one role.
Sources = dict[str, dict[str, Source]]


def owner_and_role(name: str) -> tuple[str, str]:
    """The owner and the role of a tensor by its released name."""
    if name.startswith("layers."):
        _, layer, role = name.split(".", 2)
        return f"layers.{layer}", role
    return (EMBED, name) if name.startswith("embed.") else (HEAD, name)


def sources_of(checkpoint: Checkpoint) -> Sources:
    """How every weight of a checkpoint is stored. Its headers must have been checked.

    Raises:
        CheckpointError: some have a form that no graph reads; all are listed.
    """
    sources: Sources = {}
    problems: list[str] = []
    for name, shape in parameter_shapes(checkpoint.spec).items():
        owner, role = owner_and_role(name)
        if role == f"{EXPERTS}.w2" and EXPERTS in sources.get(owner, {}):
            continue  # packed together with w13
        found = _experts(checkpoint, name, shape) if role.startswith(f"{EXPERTS}.") else _single(checkpoint, name)
        if isinstance(found, str):
            problems.append(found)
        else:
            sources.setdefault(owner, {})[EXPERTS if isinstance(found, Packed) else role] = found
    if problems:
        raise CheckpointError(
            listing(
                f"weights of {checkpoint.folder} have a form that no graph reads",
                problems,
                "Convert them to bfloat16, or to a form of the released checkpoints (docs/artifacts.md lists what is read).",
            )
        )
    return sources


def lock_of(checkpoint: Checkpoint, sources: Sources) -> WeightsLock:
    """The lock of a checkpoint's weights; no weight is read, so no file has a sha256."""
    used = {part.file for roles in sources.values() for source in roles.values() for part in _parts_of(source)}
    files = {
        checkpoint.names[shard.file]: LockedFile(shard.bytes, shard.header_bytes, shard.header_sha256)
        for shard in checkpoint.shards
    }
    return WeightsLock(
        {name: file for name, file in files.items() if name in used},
        {
            owner: {role: weight for name, source in roles.items() for role, weight in inputs_of(name, source).items()}
            for owner, roles in sources.items()
        },
        hub_source(checkpoint.folder),
    )


def hub_source(folder: Path) -> dict[str, str]:
    """Repository and revision of a folder in the cache of the Hugging Face hub; nothing elsewhere."""
    found = re.search(r"/models--([^/]+)/snapshots/([0-9a-f]{40})$", folder.absolute().as_posix())
    return {"repository": found[1].replace("--", "/", 1), "revision": found[2]} if found else {}


def inputs_of(role: str, source: Source) -> dict[str, Weight]:
    """The segment's inputs that one role stands for, by name."""
    if isinstance(source, Plain):
        return {role: source.weight}
    if isinstance(source, Quantised):
        return {role: source.weight, scale_name(role): source.scale}
    return {f"{role}.codes": source.codes, f"{role}.scales": source.scales}


def _parts_of(source: Source) -> list[Part]:
    return [part for weight in inputs_of("", source).values() for part in weight.parts]


def _part(checkpoint: Checkpoint, stored: Stored, start: int = 0, size: int | None = None) -> Part:
    return Part(checkpoint.names[stored.file], stored.offset + start, stored.bytes if size is None else size)


def _whole(checkpoint: Checkpoint, stored: Stored) -> Weight:
    return Weight(stored.dtype, stored.shape, (_part(checkpoint, stored),))


def _single(checkpoint: Checkpoint, name: str) -> Source | str:
    stored, format_ = checkpoint.headers[name], checkpoint.format(name)
    if stored.dtype not in BITS:
        return f"tensor {name} has dtype {stored.dtype}; a graph takes {', '.join(BITS)}"
    if format_ is None or format_.name == PLAIN:
        return Plain(_whole(checkpoint, stored))
    if stored.dtype != "F8_E4M3":
        return f"tensor {name} is {format_.name}; only routed experts can have this format"
    rows, columns = stored.shape
    block = (min(format_.block[0], rows), min(format_.block[1], columns))
    return Quantised(_whole(checkpoint, stored), _whole(checkpoint, checkpoint.headers[scale_name(name)]), block)


def _experts(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Source | str:
    """The source of a stacked tensor of experts, ``….w13`` or ``….w2``; packed ones come with ``w13``."""
    parts = expert_parts(name, checkpoint)
    found = {checkpoint.format(part) for part in (parts or {name: ()})}
    dtypes = {checkpoint.headers[part].dtype for part in (parts or {name: ()})}
    if len(found) != 1 or len(dtypes) != 1 or (format_ := found.pop()) is None:
        return f"{name.rpartition('.')[0]} have several dtypes: {', '.join(sorted(dtypes))}"
    if format_.name != PLAIN:
        return _packed(checkpoint, name.rpartition(".")[0], format_)
    dtype = dtypes.pop()
    if not parts:
        return Plain(_whole(checkpoint, checkpoint.headers[name]))
    return Plain(Weight(dtype, shape, tuple(_part(checkpoint, checkpoint.headers[part]) for part in _in_order(parts))))


def _in_order(parts: Mapping[str, tuple[int | slice, ...]]) -> list[str]:
    """The single experts' tensors in the order of the stacked tensor's bytes."""

    def place(name: str) -> tuple[int, int]:
        expert, rows = parts[name]
        assert isinstance(expert, int) and isinstance(rows, slice)
        return expert, rows.start or 0

    return sorted(parts, key=place)


def _same(name: str) -> str:
    return name


def _packed(checkpoint: Checkpoint, prefix: str, format_: Format) -> Source | str:
    spec = checkpoint.spec
    stacked = f"{prefix}.w13" in checkpoint.headers
    shapes = dict.fromkeys(("w1", "w3"), (spec.moe_intermediate_size, spec.hidden_size))
    shapes["w2"] = (spec.hidden_size, spec.moe_intermediate_size)
    grids = {part: format_.scale_shape(shape) for part, shape in shapes.items()}
    for part, shape in shapes.items():
        for size, count, block in zip(shape, grids[part], format_.block, strict=True):
            if (count > 1 or (stacked and part != "w2")) and size % block:
                return f"{prefix} are {list(shape)}, which is not a multiple of the {list(format_.block)} that share a scale"
    names = (
        [f"{prefix}.w13", f"{prefix}.w2"] if stacked
        else [f"{prefix}.{expert}.{part}.weight" for expert in range(spec.num_experts) for part in PARTS]
    )  # fmt: skip
    other = {checkpoint.headers[name].dtype for name in names}
    scale_types = {checkpoint.headers[scale_name(name)].dtype for name in names}
    if len(other) > 1 or len({checkpoint.format(name) for name in names}) > 1:
        return f"{prefix} have several dtypes: {', '.join(sorted(other))}"
    if len({onnx_type for dtype in scale_types if (onnx_type := _DTYPES.get(dtype))}) != 1 or not scale_types <= {
        "F8_E8M0", "U8", "F32",
    }:  # fmt: skip
        return f"{prefix} have scales in {', '.join(sorted(scale_types))}; expected e8m0, or float32, for all"
    scale_dtype = "F32" if "F32" in scale_types else "I8"
    tables: list[list[Part]] = [[], []]
    for expert in range(spec.num_experts):
        for part in PARTS:
            sizes = (prod(format_.stored_shape(shapes[part])), prod(grids[part]) * BITS[scale_dtype] // 8)
            for table, name_of, size in zip(tables, (_same, scale_name), sizes, strict=True):
                if stacked:
                    stored = checkpoint.headers[name_of(f"{prefix}.{'w2' if part == 'w2' else 'w13'}")]
                    start = expert * size if part == "w2" else (2 * expert + (part == "w3")) * size
                    table.append(_part(checkpoint, stored, start, size))
                else:
                    table.append(_part(checkpoint, checkpoint.headers[name_of(f"{prefix}.{expert}.{part}.weight")]))
    matrices: dict[str, Matrix] = {}
    code, scale = 0, 0
    for part in PARTS:
        rows, columns = grids[part]
        matrices[part] = Matrix(code, scale, shapes[part], (rows, columns))
        code, scale = code + prod(format_.stored_shape(shapes[part])), scale + rows * columns
    return Packed(
        format_.name,
        Weight("I8", (spec.num_experts, code), tuple(tables[0])),
        Weight(scale_dtype, (spec.num_experts, scale), tuple(tables[1])),
        tuple(matrices.items()),
    )
