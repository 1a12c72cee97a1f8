"""Weights in the form that an engine takes, from the bytes that the lock names. numpy only.

numpy has neither bfloat16 nor 8-bit floats: integers hold their bits. Every conversion is exact, but the one from float32 to
bfloat16, which rounds to the nearest value, ties to even.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArtifactError
from ..export.contract.engine_set import DEQUANTISED, STORED, WORDS, Taken
from ..export.contract.lock import Weight
from .weight_files import WeightFiles

Array = npt.NDArray[Any]
_STORAGE = {
    "F32": np.float32, "BF16": np.uint16, "F16": np.float16, "I64": np.int64, "I32": np.int32, "F8_E4M3": np.uint8,
    "F8_E8M0": np.uint8, "U8": np.uint8, "I8": np.int8,
}  # fmt: skip
_INTEGERS = {"int64": np.int64, "int32": np.int32, "int8": np.int8}


def load_weight(taken: Taken, weight: Weight, files: WeightFiles, scale: Weight | None = None) -> Array:
    """A weight as an engine takes it: an array whose bytes are those of the input.

    Args:
        taken: the form.
        weight: where the bytes lie, and how they are stored.
        files: the mapped files.
        scale: of DEQUANTISED, the scales.

    Raises:
        ArtifactError: the table asks for a form that these bytes cannot have, or a file ends within the weight.
    """
    stored = _stored(weight, files)
    if taken.form == STORED:
        made = stored
    elif taken.form == WORDS:
        made = _words(taken, stored.view(np.uint8).reshape(weight.shape[0], -1))
    elif taken.form == DEQUANTISED:
        if scale is None:
            raise _wrong(taken, weight)
        made = _typed(_dequantised(stored, _stored(scale, files), scale.dtype, taken.block), taken, weight)
    else:
        made = _typed(stored if weight.dtype in ("I64", "I32") else _values(stored, weight), taken, weight)
    if made.nbytes != taken.bytes:
        raise _wrong(taken, weight)
    return made


def _wrong(taken: Taken, weight: Weight) -> ArtifactError:
    return ArtifactError(
        f"a weight of {list(weight.shape)} in {weight.dtype} cannot be taken as {taken.form} in {taken.dtype} of "
        f"{list(taken.shape)}. Make the bundle again."
    )


def _stored(weight: Weight, files: WeightFiles) -> Array:
    """The bytes of a weight: over the mapped file if it is one range there, else joined."""
    parts = [files.range(part.file, part.offset, part.bytes) for part in weight.parts]
    joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return joined.view(np.dtype(_STORAGE[weight.dtype])).reshape(weight.shape)


def _values(stored: Array, weight: Weight) -> Array:
    """Values in float32."""
    if weight.dtype == "BF16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if weight.dtype == "F8_E4M3":
        return _E4M3[stored]
    return stored.astype(np.float32, copy=False)


def _typed(values: Array, taken: Taken, weight: Weight) -> Array:
    """Values in the type of the input."""
    if taken.dtype == "float32":
        return values.astype(np.float32, copy=False)
    if taken.dtype == "bfloat16":
        return bfloat16_bits(values)
    if taken.dtype in _INTEGERS and values.dtype.kind == "i":
        return values.astype(_INTEGERS[taken.dtype], copy=False)
    raise _wrong(taken, weight)


def bfloat16_bits(values: Array) -> npt.NDArray[np.uint16]:
    """float32 rounded to bfloat16, as bits; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))


def exact_bfloat16(codes: Array, scales: Array, block: tuple[int, int]) -> npt.NDArray[np.uint16]:
    """Elements of e4m3 times the e8m0 scale of their block, in bfloat16, as bits.

    Args:
        codes: bytes [R, C].
        scales: bytes [ceil(R / block rows), ceil(C / block columns)].
        block: rows and columns that share a scale.

    Raises:
        ValueError: a value is not one of bfloat16, which needs a scale below 2^-124.
    """
    bits = _dequantised(codes, scales, "F8_E8M0", block).view(np.uint32)
    if (bits & np.uint32(0xFFFF)).any():
        raise ValueError("a value is too small for bfloat16")
    return (bits >> np.uint32(16)).astype(np.uint16)


def _dequantised(codes: Array, scales: Array, dtype: str, block: tuple[int, int]) -> Array:
    """Elements of e4m3 times the scale of their block, float32; the last blocks may be cut off."""
    factors = scales if dtype == "F32" else _E8M0[scales.view(np.uint8)]
    rows, columns = codes.shape
    wide = factors.repeat(block[0], axis=0)[:rows].repeat(block[1], axis=1)[:, :columns]
    with np.errstate(over="ignore"):  # a scale of 2^127 is a valid one
        product: Array = _E4M3[codes] * wide
    return product


def _words(taken: Taken, rows: Array) -> Array:
    if not taken.spans:
        return rows
    moved = np.zeros((len(rows), 4 * taken.shape[1]), np.uint8)
    for at, size, start in taken.spans:
        moved[:, start : start + size] = rows[:, at : at + size]
    return moved


def _e4m3() -> npt.NDArray[np.float32]:
    """The values of all bytes (OCP 8-bit floating point specification, 2023: E4M3 has no infinity, and one NaN per sign)."""
    byte = np.arange(256)
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    size[byte & 127 == 127] = np.nan
    return np.where(byte > 127, -size, size).astype(np.float32)


_E4M3 = _e4m3()
# OCP microscaling formats 1.0: e8m0 is a power of two from -127 on; 255 is NaN.
_E8M0 = np.append(2.0 ** (np.arange(255) - 127.0), np.nan).astype(np.float32)
