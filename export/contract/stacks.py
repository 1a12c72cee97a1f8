"""Stacks: weights of a layer in the order and the type in which a kernel reads them, in a file beside the checkpoint.

A checkpoint keeps the matrices of every expert apart. ONNX Runtime's QMoE takes those of all experts as one tensor, in which
the rows of w1 and w3 alternate. These are the same bytes in another order: nothing is converted. For e4m3 matrices ONNX Runtime has
no fast kernel. Their values in bfloat16 are exact, because the scale of a block is a power of two.

One copy serves every bundle of a checkpoint. Build says what a stack holds, and the runtime makes it. Standard library only.

A layer's stacks lie in one safetensors file, with a header of a fixed size. So the table of a bundle knows where every stack
begins before the file is made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

#: Bytes of a file before the first stack. It is a multiple of the alignment that kernels want.
HEADER = 4096
#: The key of a header's metadata with the sha256 of everything after the header.
DIGEST = "sha256"
#: Types of stacks, with their names in safetensors. Elements have one byte.
SAFETENSORS = {"uint8": "U8", "float8e8m0": "F8_E8M0"}
#: The type of decoded matrices.
DECODED = "bfloat16"
#: If the matrices of a model take more bytes than this in float32, they are read in bfloat16, in blocks of rows. Below it, each is
#: one product with float32: a step of a small model takes as long as it takes to start its nodes.
SMALL = 64 << 20
#: Bytes of a block of rows in float32, which the products of a step read from a processor's cache.
BLOCK_BYTES = 4 << 20
#: The first version of ONNX Runtime that was tried and whose QMoE computes with e2m1 on processors.
ONNX_RUNTIME = (1, 32)


@dataclass(frozen=True)
class Stack:
    """One input of a segment, made from a weight that has several matrices of each expert.

    Attributes:
        of: role of the weight. Its parts are those of the first expert, then those of the second, and so on.
        parts: which of an expert's parts; the rows of several alternate.
        dtype: of the input, a key of ``SAFETENSORS``.
        shape: [experts, rows, bytes of a row].
    """

    of: str
    parts: tuple[int, ...]
    dtype: str
    shape: tuple[int, int, int]

    @property
    def bytes(self) -> int:
        """Bytes of the stack."""
        return prod(self.shape)


@dataclass(frozen=True)
class Decoded:
    """One input of a segment, or several blocks of rows: the values of an e4m3 matrix in bfloat16.

    Attributes:
        of: role of the matrix.
        scale: role of its scales, which are e8m0.
        block: rows and columns that share a scale.
        shape: [rows, columns].
    """

    of: str
    scale: str
    block: tuple[int, int]
    shape: tuple[int, int]

    @property
    def dtype(self) -> str:
        """Of the input."""
        return DECODED

    @property
    def bytes(self) -> int:
        """Bytes of the values."""
        return 2 * prod(self.shape)


@dataclass(frozen=True)
class RowBlocks:
    """A matrix that a segment takes in blocks of rows, each an input of its own.

    Attributes:
        group: rows that meet one part of the activations; no block has rows of two groups.
        rows: of a block; the last one of a group may have less.
    """

    group: int
    rows: int

    def spans(self, rows: int) -> list[tuple[int, int]]:
        """First row and end of every block of a matrix."""
        return [
            (at, min(at + self.rows, start + self.group))
            for start in range(0, rows, self.group)
            for at in range(start, start + self.group, self.rows)
        ]


def block_name(role: str, number: int) -> str:
    """The input with a block of rows of a matrix."""
    return f"{role}.rows.{number}"


def reads_stacks(version: str) -> bool:
    """Whether an ONNX Runtime of this version ("1.32.0") computes with stacks."""
    return tuple(int(part) for part in version.split(".")[:2]) >= ONNX_RUNTIME


def offsets(stacks: Mapping[str, Stack | Decoded]) -> dict[str, int]:
    """Where every stack begins in the file of a layer, by role."""
    found, at = {}, HEADER
    for role, stack in stacks.items():
        found[role], at = at, at + stack.bytes
    return found


def file_bytes(stacks: Mapping[str, Stack | Decoded]) -> int:
    """Size of the file of a layer."""
    return HEADER + sum(stack.bytes for stack in stacks.values())


def header(stacks: Mapping[str, Stack | Decoded], facts: Mapping[str, str]) -> bytes:
    """The first ``HEADER`` bytes of the file of a layer: a header of safetensors with ``facts`` as its metadata.

    Raises:
        ValueError: the facts do not fit.
    """
    rows: dict[str, object] = {"__metadata__": dict(facts)}
    for role, at in offsets(stacks).items():
        stack, begin = stacks[role], at - HEADER
        rows[role] = {
            "dtype": "BF16" if isinstance(stack, Decoded) else SAFETENSORS[stack.dtype], "shape": list(stack.shape), "data_offsets": [begin, begin + stack.bytes],
        }  # fmt: skip
    text = json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) > HEADER - 8:
        raise ValueError(f"a header of {len(text)} bytes, of which {HEADER - 8} fit")
    return (HEADER - 8).to_bytes(8, "little") + text.ljust(HEADER - 8)


def facts_in(head: bytes) -> dict[str, str]:
    """The metadata of a header.

    Raises:
        ValueError: the bytes are no header that :func:`header` wrote.
    """
    if len(head) != HEADER or head[:8] != (HEADER - 8).to_bytes(8, "little"):
        raise ValueError("no header of that size")
    try:
        facts = json.loads(head[8:])["__metadata__"]
    except (KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from None
    if not isinstance(facts, dict) or not all(isinstance(value, str) for value in facts.values()):
        raise ValueError("metadata that is no table of texts")
    return facts
