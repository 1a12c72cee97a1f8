"""Values of stored tensors, in torch: read from a file, and decoded if they are quantised (formats.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import CheckpointError
from .formats import E2M1, FP4, Format
from .shards import Stored

_DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64, "I32": torch.int32,
    "I8": torch.int8, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


def read_tensor(stored: Stored) -> Tensor:
    """A tensor as stored; no other bytes are read.

    Raises:
        CheckpointError: the file cannot be read that far, or torch has no such dtype.
    """
    if stored.dtype not in _DTYPES:
        raise CheckpointError(
            f"tensor {stored.name} in {stored.file.name} has dtype {stored.dtype}, which foldkv does not read."
        )
    data = bytearray(stored.bytes)
    try:
        with stored.file.open("rb") as file:
            file.seek(stored.offset)
            found = file.readinto(data)
    except OSError as error:
        raise CheckpointError(f"{stored.file} cannot be read: {error.strerror}. Download it again.") from None
    if found != stored.bytes:
        raise CheckpointError(f"{stored.file} ends within tensor {stored.name}. Download it again.")
    if not data:
        return torch.empty(stored.shape, dtype=_DTYPES[stored.dtype])
    return torch.frombuffer(data, dtype=_DTYPES[stored.dtype]).reshape(stored.shape)


def scale_values(scale: Tensor) -> Tensor:
    """Scales as float32, from exponents (e8m0, or the same as uint8) or from float32. NaN stays NaN."""
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.to(torch.float32)


def dequantised(weight: Tensor, scale: Tensor, format_: Format) -> Tensor:
    """The values of a quantised weight, float32 [..., R, C].

    Args:
        weight: as stored: e4m3 [..., R, C], or bytes [..., R, C / 2].
        scale: as stored, in the format's shape.
        format_: of the weight, not plain.
    """
    values = unpacked(weight) if format_.name == FP4 else weight.to(torch.float32)
    factors = scale_values(scale)
    for axis, size in ((-2, format_.block[0]), (-1, format_.block[1])):
        if size > 1:
            factors = factors.repeat_interleave(size, dim=axis).narrow(axis, 0, values.shape[axis])
    return values.mul_(factors)


def unpacked(packed: Tensor) -> Tensor:
    """Two e2m1 values per byte, the lower half first: bytes [..., N] -> float32 [..., 2 N]."""
    return byte_pairs()[packed.contiguous().view(torch.uint8).to(torch.int32)].flatten(-2)


def byte_pairs() -> Tensor:
    """The two e2m1 values of every byte: float32 [256, 2]."""
    table = torch.tensor(E2M1)
    return torch.stack([table.repeat(16), table.repeat_interleave(16)], dim=-1)


def byte_values(dtype: torch.dtype) -> Tensor:
    """The value of every byte in an eight-bit format: float32 [256]."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float32)
