"""Stacks: the experts of a layer in the order in which a kernel reads them, in a file beside the checkpoint.

A checkpoint keeps the matrices of every expert apart. ONNX Runtime's QMoE takes those of all experts as one tensor, in which
the rows of w1 and w3 alternate. These are the same bytes in another order: nothing is converted. So one copy of a checkpoint's
experts serves every bundle that reads them so. Build says what a stack holds, and the runtime makes it. Standard library only.

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


def reads_stacks(version: str) -> bool:
    """Whether an ONNX Runtime of this version ("1.32.0") computes with stacks."""
    return tuple(int(part) for part in version.split(".")[:2]) >= ONNX_RUNTIME


def offsets(stacks: Mapping[str, Stack]) -> dict[str, int]:
    """Where every stack begins in the file of a layer, by role."""
    found, at = {}, HEADER
    for role, stack in stacks.items():
        found[role], at = at, at + stack.bytes
    return found


def file_bytes(stacks: Mapping[str, Stack]) -> int:
    """Size of the file of a layer."""
    return HEADER + sum(stack.bytes for stack in stacks.values())


def header(stacks: Mapping[str, Stack], facts: Mapping[str, str]) -> bytes:
    """The first ``HEADER`` bytes of the file of a layer: a header of safetensors with ``facts`` as its metadata.

    Raises:
        ValueError: the facts do not fit.
    """
    rows: dict[str, object] = {"__metadata__": dict(facts)}
    for role, at in offsets(stacks).items():
        stack, begin = stacks[role], at - HEADER
        rows[role] = {
            "dtype": SAFETENSORS[stack.dtype], "shape": list(stack.shape), "data_offsets": [begin, begin + stack.bytes],
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
