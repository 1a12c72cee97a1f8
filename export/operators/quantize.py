"""FoldkvQuantizeFp8 and FoldkvQuantizeFp4: rows as a packed cache returns them; and the packing itself.

``rows.py`` defines the values: a quantised row is a row packed and unpacked, as ``fp8_ds_mla`` (main rows) or ``index_fp4``
(rows and queries of the indexer). The ONNX bodies use only arithmetic, because standard operators cannot read a float's
bits. The exponent is the logarithm's floor, corrected by comparing with exact powers of two. A small float is an integer
times a power of two, and ``Round`` rounds it to nearest even. A table decodes a byte. All of this is exact.
``FoldkvPack...`` and ``FoldkvUnpack...`` have no torch operator: they are for graphs with packed state.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from onnx import numpy_helper
from onnxscript import FLOAT, INT8, script
from onnxscript import opset20 as op
from torch import Tensor

from ..checkpoint.values import byte_pairs
from ..contract.rows import FP8_DS_MLA, INDEX_FP4, row_format_named
from .registry import OPSET, operator
from .rows import pack_fp8_ds_mla, pack_index_fp4, unpack_fp8_ds_mla, unpack_index_fp4

# 2 ** (i - 149): every power of two that float32 has.
_POWERS = numpy_helper.from_array(np.ldexp(np.float32(1), np.arange(-149, 128)).astype(np.float32))
# Values by byte. Gather reads a byte as int8 and counts negative indices from the end.
_E4M3 = numpy_helper.from_array(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32))
_E8M0 = numpy_helper.from_array(np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.float32(np.inf)))
_BF16 = numpy_helper.from_array(np.arange(65536, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32))
_E2M1_PAIRS = numpy_helper.from_array(byte_pairs().numpy())


def quantized_fp8(x: Tensor, rope_dim: int) -> Tensor:
    """x [..., D] float -> [..., D] float32, the values of its ``fp8_ds_mla`` rows."""
    row_format_named(FP8_DS_MLA).row_bytes(x.shape[-1], rope_dim)  # raises if it does not fit
    return unpack_fp8_ds_mla(pack_fp8_ds_mla(x.float(), rope_dim), x.shape[-1], rope_dim)


def quantized_fp4(x: Tensor) -> Tensor:
    """x [..., D] float -> [..., D] float32, the values of its ``index_fp4`` rows."""
    row_format_named(INDEX_FP4).row_bytes(x.shape[-1])  # raises if it does not fit
    return unpack_index_fp4(pack_index_fp4(x.float(), 0), x.shape[-1], 0)


@script(OPSET, default_opset=op)
def FoldkvPower(exponent: FLOAT):  # type: ignore[no-untyped-def]
    return op.Gather(op.Constant(value=_POWERS), exponent + 149, axis=0)


@script(OPSET, default_opset=op)
def FoldkvExponent(x: FLOAT, least: int):  # type: ignore[no-untyped-def]
    # floor(log2 x) of x >= 0, but at least `least`. The logarithm is only wrong next to a power of two, by one.
    lowest = op.Constant(value_int=1) * least
    guess = op.Cast(op.Max(op.Floor(op.Log(x) * 1.4426950408889634), op.Cast(lowest, to=1)), to=7)
    power = FoldkvPower(guess)
    return op.Max(guess + op.Cast(x >= power * 2.0, to=7) - op.Cast(x < power, to=7), lowest)


@script(OPSET, default_opset=op)
def FoldkvRounded(x: FLOAT, least: int, mantissa: int):  # type: ignore[no-untyped-def]
    # Rounded to nearest even with that many bits of mantissa, and subnormals below 2 ** least.
    step = FoldkvPower(FoldkvExponent(op.Abs(x), least=least) - mantissa)
    return op.Round(x / step) * step


@script(OPSET, default_opset=op)
def FoldkvCode(x: FLOAT, least: int, mantissa: int):  # type: ignore[no-untyped-def]
    # The bits of the magnitude: exponents count from `least`, and a mantissa that overflows adds one to them.
    exponent = FoldkvExponent(op.Abs(x), least=least)
    digits = op.Cast(op.Round(op.Abs(x) / FoldkvPower(exponent - mantissa)), to=7)
    each = op.Cast(FoldkvPower(op.Constant(value_int=1) * mantissa), to=7)
    return (exponent - least) * each + digits


@script(OPSET, default_opset=op)
def FoldkvNegative(x: FLOAT):  # type: ignore[no-untyped-def]
    # The sign bit as a number, also for -0.0.
    return op.Cast(op.Or(x < 0.0, op.Reciprocal(x) < 0.0), to=7)


@script(OPSET, default_opset=op)
def FoldkvTiles(x: FLOAT, tile: int):  # type: ignore[no-untyped-def]
    size = op.Reshape(op.Constant(value_int=1) * tile, [1])
    # Both operands of Mod stay positive: backends differ on negative ones.
    short = op.Mod(size - op.Mod(op.Shape(x, start=-1), size), size)
    padded = op.Pad(x, op.Concat([0], short, axis=0), 0.0, [-1])
    return op.Reshape(padded, op.Concat(op.Shape(x, start=0, end=-1), [-1], size, axis=0))


@script(OPSET, default_opset=op)
def FoldkvScaleExponents(tiles: FLOAT, top: float, shift: int):  # type: ignore[no-untyped-def]
    # The smallest power of two that brings the largest magnitude to top * 2 ** shift or below.
    largest = op.Max(op.ReduceMax(op.Abs(tiles), [-1], keepdims=1), 1e-4)
    exponent = FoldkvExponent(largest, least=-126)
    return exponent - shift + op.Cast(largest > FoldkvPower(exponent) * top, to=7)


@script(OPSET, default_opset=op)
def FoldkvFlat(tiles: FLOAT, like: FLOAT):  # type: ignore[no-untyped-def]
    # Tiles side by side again, without the padding of the last one.
    flat = op.Reshape(tiles, op.Concat(op.Shape(like, start=0, end=-1), [-1], axis=0))
    return op.Slice(flat, [0], op.Shape(like, start=-1), [-1])


@script(OPSET, default_opset=op)
def FoldkvQuantizeFp8(x: FLOAT, rope_dim: int):  # type: ignore[no-untyped-def]
    edge = op.Shape(x, start=-1) - rope_dim
    plain = op.Slice(x, [0], edge, [-1])
    turned = op.Slice(x, edge, [9223372036854775807], [-1])
    tiles = FoldkvTiles(plain, tile=64)
    scale = FoldkvPower(FoldkvScaleExponents(tiles, top=1.75, shift=8))
    rounded = FoldkvFlat(FoldkvRounded(tiles / scale, least=-6, mantissa=3) * scale, plain)
    return op.Concat(rounded, op.Cast(op.Cast(turned, to=16), to=1), axis=-1)


@script(OPSET, default_opset=op)
def FoldkvQuantizeFp4(x: FLOAT):  # type: ignore[no-untyped-def]
    tiles = FoldkvTiles(x, tile=32)
    scale = FoldkvPower(FoldkvScaleExponents(tiles, top=1.5, shift=2))
    return FoldkvFlat(FoldkvRounded(tiles / scale, least=0, mantissa=1) * scale, x)


@script(OPSET, default_opset=op)
def FoldkvBytes(codes: FLOAT):  # type: ignore[no-untyped-def]
    return op.Cast(codes - op.Cast(codes > 127, to=7) * 256, to=3)


@script(OPSET, default_opset=op)
def FoldkvPackFp8(x: FLOAT, rope_dim: int):  # type: ignore[no-untyped-def]
    edge = op.Shape(x, start=-1) - rope_dim
    plain = op.Slice(x, [0], edge, [-1])
    turned = op.Slice(x, edge, [9223372036854775807], [-1])
    tiles = FoldkvTiles(plain, tile=64)
    exponents = FoldkvScaleExponents(tiles, top=1.75, shift=8)
    codes = FoldkvFlat(FoldkvCode(tiles / FoldkvPower(exponents), least=-6, mantissa=3), plain)
    codes = codes + FoldkvNegative(plain) * 128
    wide = FoldkvCode(turned, least=-126, mantissa=7) + FoldkvNegative(turned) * 32768
    halves = op.Concat(op.Unsqueeze(op.Mod(wide, 256), [-1]), op.Unsqueeze(wide / 256, [-1]), axis=-1)
    halves = op.Reshape(halves, op.Concat(op.Shape(x, start=0, end=-1), [-1], axis=0))
    row = op.Concat(codes, halves, op.Squeeze(exponents, [-1]) + 127, axis=-1)
    short = op.Mod(0 - op.Shape(row, start=-1), 8)
    return FoldkvBytes(op.Pad(row, op.Concat([0], short, axis=0), 0, [-1]))


@script(OPSET, default_opset=op)
def FoldkvUnpackFp8(rows: INT8, width: int, rope_dim: int):  # type: ignore[no-untyped-def]
    edge = op.Reshape(op.Constant(value_int=1) * width - rope_dim, [1])
    end = edge + 2 * rope_dim
    count = (edge + 63) / 64
    plain = op.Gather(op.Constant(value=_E4M3), op.Cast(op.Slice(rows, [0], edge, [-1]), to=6), axis=0)
    scale = op.Gather(op.Constant(value=_E8M0), op.Cast(op.Slice(rows, end, end + count, [-1]), to=6), axis=0)
    spread = op.Expand(op.Unsqueeze(scale, [-1]), op.Concat(op.Shape(scale), [64], axis=0))
    halves = op.Cast(op.Slice(rows, edge, end, [-1]), to=7)
    pairs = op.Reshape(halves, op.Concat(op.Shape(rows, start=0, end=-1), [-1, 2], axis=0))
    low, high = op.Split(pairs, num_outputs=2, axis=-1)
    turned = op.Gather(op.Constant(value=_BF16), op.Squeeze(high * 256 + op.Mod(low, 256), [-1]), axis=0)
    return op.Concat(plain * FoldkvFlat(spread, plain), turned, axis=-1)


@script(OPSET, default_opset=op)
def FoldkvPackFp4(x: FLOAT):  # type: ignore[no-untyped-def]
    tiles = FoldkvTiles(x, tile=32)
    exponents = FoldkvScaleExponents(tiles, top=1.5, shift=2)
    codes = FoldkvFlat(FoldkvCode(tiles / FoldkvPower(exponents), least=0, mantissa=1), x) + FoldkvNegative(x) * 8
    pairs = op.Reshape(codes, op.Concat(op.Shape(x, start=0, end=-1), [-1, 2], axis=0))
    low, high = op.Split(pairs, num_outputs=2, axis=-1)
    return FoldkvBytes(op.Concat(op.Squeeze(low + high * 16, [-1]), op.Squeeze(exponents, [-1]) + 127, axis=-1))


@script(OPSET, default_opset=op)
def FoldkvUnpackFp4(rows: INT8, width: int):  # type: ignore[no-untyped-def]
    edge = op.Reshape((op.Constant(value_int=1) * width) / 2, [1])
    pairs = op.Gather(op.Constant(value=_E2M1_PAIRS), op.Cast(op.Slice(rows, [0], edge, [-1]), to=6), axis=0)
    scale = op.Gather(
        op.Constant(value=_E8M0), op.Cast(op.Slice(rows, edge, [9223372036854775807], [-1]), to=6), axis=0
    )
    lead = op.Shape(rows, start=0, end=-1)
    values = op.Reshape(pairs, op.Concat(lead, [-1, 32], axis=0)) * op.Unsqueeze(scale, [-1])
    return op.Reshape(values, op.Concat(lead, 2 * edge, axis=0))


quantize_fp8 = operator("FoldkvQuantizeFp8", eager=quantized_fp8, function=FoldkvQuantizeFp8)
quantize_fp4 = operator("FoldkvQuantizeFp4", eager=quantized_fp4, function=FoldkvQuantizeFp4)
