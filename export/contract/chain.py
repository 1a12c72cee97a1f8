"""The chain of a bundle: which segment every call runs, and where its weights lie as the segment takes them.

A call is one run of a segment: ``embed``, ``layers.0`` and so on, ``head``; the segment ``step`` runs before them and makes
what all layers share. A segment can have a second form, which takes its weights in another order and type (stacks.py).
Build writes the table, and the runtime reads it. Standard library only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from ...errors import ArtifactError
from .stacks import SAFETENSORS, Decoded, RowBlocks, Stack, block_name, offsets

CHAIN, PLACED = "chain.json", "placed.bin"
STEP = "step"
VERSION = 5
#: Between the float32 matrices of a call, for the processor's caches and vectors.
_ALIGNMENT = 64
#: Bytes of an element, by the names of types in a chain.
ITEM_BYTES = {
    "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "int8": 1, "float8e4m3fn": 1,
    "uint8": 1, "float8e8m0": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Bound:
    """One range of bytes that a segment takes as a weight.

    Attributes:
        file: of the checkpoint, as its lock names it, or of the bundle; or the stacks of a layer, as :func:`stacks_file` names them.
        placed: whether the file is none of the checkpoint.
        offset: of the first byte.
        dtype: a key of ``ITEM_BYTES``.
        shape: of the tensor.
    """

    file: str
    placed: bool
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of the range."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Call:
    """One run of a segment with one layer's weights: ``embed``, ``layers.3`` or ``head``."""

    owner: str
    segment: str

    @property
    def layer(self) -> int | None:
        """The number of the layer, or None for the ends."""
        return int(self.owner.removeprefix("layers.")) if self.owner.startswith("layers.") else None


def stacks_file(owner: str) -> str:
    """The name under which the weights of a call name the file with its stacks."""
    return f"stacks/{owner}"


def wide_file(owner: str) -> str:
    """The name under which the weights of a call name its matrices in float32, which lie in memory alone."""
    return f"wide/{owner}"


@dataclass(frozen=True)
class Stacked:
    """The second form of a segment, and the third.

    Attributes:
        file: its graph.
        stacks: what it takes by role.
        instead_of: the roles of the first form that it does not take.
        blocks: the roles that it takes in blocks of rows, whether they are stacks or as in the first form.
        wide: the graph of the third form, which takes the roles of ``blocks`` whole, in float32; empty if there are none.
    """

    file: str
    stacks: dict[str, Stack | Decoded]
    instead_of: tuple[str, ...]
    blocks: dict[str, RowBlocks] = field(default_factory=dict)
    wide: str = ""


@dataclass(frozen=True)
class ChainTable:
    """The chain: file of every segment, calls in order, and the weights of every call by the segment's input.

    ``stacked`` has the second form of the segments that have one; ``chosen`` is how many parameters the experts of a layer have with
    which a step multiplies one token.
    """

    segments: dict[str, str]
    calls: tuple[Call, ...]
    weights: dict[str, dict[str, Bound]]
    stacked: dict[str, Stacked] = field(default_factory=dict)
    chosen: int = 0

    def in_stacks(self, *, wide: bool = False) -> ChainTable:
        """The same chain with the second form of every segment that has one; ``wide`` with the third where there is one."""
        weights = dict(self.weights)
        for call in self.calls:
            form = self.stacked.get(call.segment)
            if form is not None:
                roles = self._whole(call.owner, form)
                places = _wide_places(roles, form) if wide else {}
                weights[call.owner] = {
                    name: bound
                    for role, whole in roles.items()
                    for name, bound in (
                        {role: Bound(wide_file(call.owner), True, places[role], "float32", whole.shape)}
                        if role in places
                        else _in_blocks(role, whole, form.blocks.get(role))
                    ).items()
                }
        files = self.segments | {
            name: form.wide if wide and form.wide else form.file for name, form in self.stacked.items()
        }
        return replace(self, segments=files, weights=weights, stacked={})

    def matrices(self) -> dict[str, dict[str, Bound]]:
        """What the third form of segments has in float32: by call and role, where the values lie in bfloat16 or float16."""
        return {
            call.owner: {role: bound for role, bound in self._whole(call.owner, form).items() if role in form.blocks}
            for call in self.calls
            if (form := self.stacked.get(call.segment)) is not None and form.blocks
        }

    def _whole(self, owner: str, form: Stacked) -> dict[str, Bound]:
        """The weights of a call's second form, with none in blocks."""
        kept = {role: bound for role, bound in self.weights[owner].items() if role not in form.instead_of}
        made = {
            role: Bound(stacks_file(owner), True, at, form.stacks[role].dtype, form.stacks[role].shape)
            for role, at in offsets(form.stacks).items()
        }
        return kept | made

    @property
    def files(self) -> set[str]:
        """The files of the checkpoint that are read."""
        return {bound.file for roles in self.weights.values() for bound in roles.values() if not bound.placed}

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(bound.bytes for roles in self.weights.values() for bound in roles.values())

    def write(self, path: Path) -> None:
        """Write the table as JSON, one call per line."""
        weights = {
            owner: {role: [b.file, b.placed, b.offset, b.dtype, list(b.shape)] for role, b in roles.items()}
            for owner, roles in self.weights.items()
        }
        content = {
            "version": VERSION,
            "chosen": self.chosen,
            "segments": self.segments,
            "calls": [[call.owner, call.segment] for call in self.calls],
            "weights": weights,
            "stacked": {
                name: [
                    form.file,
                    {role: _stack_row(stack) for role, stack in form.stacks.items()},
                    list(form.instead_of),
                    {role: [one.group, one.rows] for role, one in form.blocks.items()},
                    form.wide,
                ]
                for name, form in self.stacked.items()
            },
        }
        text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
        path.write_text(text.replace('"layers.', '\n"layers.') + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> ChainTable:
        """Read and check a table.

        Raises:
            ArtifactError: it is missing, of another version or damaged.
        """
        try:
            content = json.loads(path.read_bytes())
            if content["version"] != VERSION:
                raise ValueError(f"version {content['version']!r}, expected {VERSION}")
            table = cls(
                {str(name): str(file) for name, file in content["segments"].items()},
                tuple(Call(str(owner), str(segment)) for owner, segment in content["calls"]),
                {
                    owner: {role: _bound(*row) for role, row in roles.items()}
                    for owner, roles in content["weights"].items()
                },
                {str(name): _stacked(*row) for name, row in content["stacked"].items()},
                int(content["chosen"]),
            )
            unknown = {*(call.segment for call in table.calls), *table.stacked} - table.segments.keys()
            if unknown or STEP not in table.segments:
                raise ValueError(f"no segment {', '.join(sorted(unknown)) or STEP}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(
                f"{path} is no table of a chain ({type(error).__name__}: {error}). Make the bundle again."
            ) from None
        return table


def _bound(file: Any, placed: Any, offset: Any, dtype: Any, shape: Any) -> Bound:
    if type(file) is not str or type(placed) is not bool or type(offset) is not int or offset < 0:
        raise ValueError(f"a weight lies in {file!r} at {offset!r}")
    if dtype not in ITEM_BYTES or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"a weight has dtype {dtype!r} and shape {shape!r}")
    return Bound(file, placed, offset, dtype, tuple(shape))


def _in_blocks(role: str, whole: Bound, blocks: RowBlocks | None) -> dict[str, Bound]:
    """The inputs that take a weight."""
    if blocks is None:
        return {role: whole}
    rows, *others = whole.shape
    width = prod(others) * ITEM_BYTES[whole.dtype]
    return {
        block_name(role, number): replace(whole, offset=whole.offset + at * width, shape=(end - at, *others))
        for number, (at, end) in enumerate(blocks.spans(rows))
    }


def _wide_places(roles: dict[str, Bound], form: Stacked) -> dict[str, int]:
    """Where every float32 matrix of a call begins in :func:`wide_file`, by role."""
    found, at = {}, 0
    for role, whole in roles.items():
        if role in form.blocks:
            found[role] = at
            at += -(-4 * prod(whole.shape) // _ALIGNMENT) * _ALIGNMENT
    return found


def _stack_row(stack: Stack | Decoded) -> list[Any]:
    if isinstance(stack, Decoded):
        return [stack.of, stack.scale, list(stack.block), list(stack.shape)]
    return [stack.of, list(stack.parts), stack.dtype, list(stack.shape)]


def _stacked(file: Any, stacks: Any, instead_of: Any, blocks: Any, wide: Any) -> Stacked:
    if type(wide) is not str or bool(wide) != bool(blocks):
        raise ValueError(f"the third form of a segment is {wide!r} and has {len(blocks)} matrices")
    return Stacked(
        str(file), {str(role): _stack(*row) for role, row in stacks.items()}, tuple(map(str, instead_of)),
        {str(role): _row_blocks(*row) for role, row in blocks.items()}, wide,
    )  # fmt: skip


def _row_blocks(group: Any, rows: Any) -> RowBlocks:
    if not all(type(size) is int and size > 0 for size in (group, rows)):
        raise ValueError(f"blocks have {rows!r} of {group!r} rows")
    return RowBlocks(group, rows)


def _stack(of: Any, parts: Any, dtype: Any, shape: Any) -> Stack | Decoded:
    if type(parts) is str:
        return _decoded(str(of), parts, dtype, shape)
    if dtype not in SAFETENSORS or len(shape) != 3 or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"a stack has dtype {dtype!r} and shape {shape!r}")
    if not parts or not all(type(part) is int and part >= 0 for part in parts) or shape[1] % len(parts):
        raise ValueError(f"a stack of {shape!r} has the parts {parts!r}")
    return Stack(str(of), tuple(parts), dtype, (shape[0], shape[1], shape[2]))


def _decoded(of: str, scale: str, block: Any, shape: Any) -> Decoded:
    for sizes in (block, shape):
        if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"a decoded matrix has blocks of {block!r} and the shape {shape!r}")
    return Decoded(of, scale, (block[0], block[1]), (shape[0], shape[1]))
