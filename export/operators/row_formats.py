"""What a row format does: values to bytes and back in torch, and the same in standard ONNX operators, by the format's name.

The torch functions define the bytes. The ONNX bodies are written independently and are compared with them. ``index_fp8``
has no bodies: only plugins read it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnxscript
import torch
from torch import Tensor

from ...errors import InputError
from ..contract.rows import FP8_DS_MLA, INDEX_FP4, INDEX_FP8, RowFormat, row_format_named
from .quantize import (
    FoldkvPackFp4,
    FoldkvPackFp8,
    FoldkvQuantizeFp4,
    FoldkvQuantizeFp8,
    FoldkvUnpackFp4,
    FoldkvUnpackFp8,
)
from .rows import (
    pack_fp8_ds_mla,
    pack_index_fp4,
    pack_index_fp8,
    unpack_fp8_ds_mla,
    unpack_index_fp4,
    unpack_index_fp8,
)


@dataclass(frozen=True)
class RowBodies:
    """A format's functions in ONNX. If the format keeps turned channels apart, all of them have the attribute ``rope_dim``.

    Attributes:
        quantize: x [..., D] float32 -> the values of its packed rows, [..., D] float32.
        pack: x [..., D] float32 -> rows [..., bytes] int8.
        unpack: rows [..., bytes] int8, attribute ``width`` -> [..., D] float32.
    """

    quantize: onnxscript.OnnxFunction
    pack: onnxscript.OnnxFunction
    unpack: onnxscript.OnnxFunction


@dataclass(frozen=True)
class RowPacker:
    """A format's functions.

    Attributes:
        pack: values [..., D] float32, number of turned channels kept apart -> bytes uint8; padding is added by the caller.
        unpack: bytes uint8, width D, number of turned channels kept apart -> values [..., D] float32.
        bodies: in ONNX; None if graphs cannot read the format.
    """

    pack: Callable[[Tensor, int], Tensor]
    unpack: Callable[[Tensor, int, int], Tensor]
    bodies: RowBodies | None = None


_PACKERS: dict[str, RowPacker] = {}


def register_row_packer(name: str, packer: RowPacker) -> None:
    """Give a declared row format its functions.

    Raises:
        InputError: the format is not declared, or has other functions.
    """
    row_format_named(name)
    if _PACKERS.setdefault(name, packer) != packer:
        raise InputError(f"row format {name!r} has two packers. Give one of the formats another name.")


def row_packer(name: str) -> RowPacker:
    """The functions of a packed row format.

    Raises:
        InputError: the format is not known, or cannot be packed by this version.
    """
    row_format_named(name)
    if name not in _PACKERS:
        raise InputError(
            f"rows cannot be packed as {name!r}: nothing packs it; expected one of {', '.join(_PACKERS)}. "
            "A packer of your own is registered with export.operators.row_formats.register_row_packer."
        )
    return _PACKERS[name]


def row_bodies(name: str) -> RowBodies:
    """The ONNX functions of a packed row format.

    Raises:
        InputError: the format is not known, or has none.
    """
    bodies = row_packer(name).bodies
    if bodies is None:
        raise InputError(f"graphs cannot read rows in {name!r}: the format has no ONNX bodies. Choose another layout.")
    return bodies


def body_attributes(format_: RowFormat, rope_dim: int) -> dict[str, int]:
    """The attributes that a format's bodies take, besides ``width``."""
    return {"rope_dim": rope_dim} if format_.keeps_rope else {}


def pack(values: Tensor, name: str, rope_dim: int = 0) -> Tensor:
    """values [..., D] floating -> rows [..., bytes] int8 (raw bytes). Unused bytes are zero.

    Args:
        values: of rows.
        name: of the row format.
        rope_dim: channels at the end of a row that RoPE turned.

    Raises:
        InputError: the format is not known, cannot be packed or does not fit the width.
    """
    packer, format_ = row_packer(name), row_format_named(name)
    size = format_.row_bytes(values.shape[-1], rope_dim)
    rows = packer.pack(values.float(), format_.kept(rope_dim))
    return torch.nn.functional.pad(rows, (0, size - rows.shape[-1])).view(torch.int8)


def unpack(rows: Tensor, name: str, width: int, rope_dim: int = 0) -> Tensor:
    """rows [..., bytes] int8 -> values [..., D] float32, exactly.

    Raises:
        InputError: the format is not known, cannot be unpacked, or its rows of that width have another number of bytes.
    """
    packer, format_ = row_packer(name), row_format_named(name)
    size = format_.row_bytes(width, rope_dim)
    if rows.shape[-1] != size:
        raise InputError(f"rows have {rows.shape[-1]} bytes; {width} channels in {name} take {size}.")
    return packer.unpack(rows.contiguous().view(torch.uint8), width, format_.kept(rope_dim))


register_row_packer(
    FP8_DS_MLA,
    RowPacker(pack_fp8_ds_mla, unpack_fp8_ds_mla, RowBodies(FoldkvQuantizeFp8, FoldkvPackFp8, FoldkvUnpackFp8)),
)
register_row_packer(INDEX_FP8, RowPacker(pack_index_fp8, unpack_index_fp8))
register_row_packer(
    INDEX_FP4, RowPacker(pack_index_fp4, unpack_index_fp4, RowBodies(FoldkvQuantizeFp4, FoldkvPackFp4, FoldkvUnpackFp4))
)
