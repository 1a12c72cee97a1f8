"""The meaning of a packed cache row: values to bytes and back, in torch. See export/contract/rows.py for the formats.

row_formats.py chooses among these functions by format, and checks and pads what they take and give.

A scale is the smallest power of two that brings a tile's largest magnitude into the format's range (at most 448 for
e4m3, 6 for e2m1). Largest magnitudes below 1e-4 count as 1e-4. Values are rounded to nearest even. For e4m3 the released
model's ``act_quant`` has this floor. For e2m1 DeepGEMM's ``per_token_cast_to_fp4`` has it; the released ``fp4_act_quant``
has its floor at 6 * 2**-126, so it differs for a tile whose largest magnitude is below 1e-4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checkpoint.formats import E2M1
from ..contract.rows import FP8_DS_MLA, INDEX_FP4, row_format_named

_FLOOR = 1e-4
# Halfway points between neighbours, and whether the upper one has the even code and so gets the tie.
_TIES = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))
_BIAS = 127  # of an e8m0 scale
_MAIN_TILE, _INDEX_TILE = row_format_named(FP8_DS_MLA).tile or 0, row_format_named(INDEX_FP4).tile or 0


def pack_fp8_ds_mla(values: Tensor, rope_dim: int) -> Tensor:
    """values [..., D] float32 -> codes, turned channels, scales [..., bytes] uint8, without padding."""
    plain = values.shape[-1] - rope_dim
    codes, exponents = _e4m3(values[..., :plain], _MAIN_TILE)
    turned = _viewed(values[..., plain:].bfloat16(), torch.uint8)
    return torch.cat((codes, turned, exponents), dim=-1)


def unpack_fp8_ds_mla(data: Tensor, width: int, rope_dim: int) -> Tensor:
    """data [..., bytes] uint8 -> values [..., D] float32, exactly."""
    plain = width - rope_dim
    exponents = data[..., plain + 2 * rope_dim :][..., : -(-plain // _MAIN_TILE)]
    turned = _viewed(data[..., plain : plain + 2 * rope_dim], torch.bfloat16).float()
    coded = data[..., :plain].view(torch.float8_e4m3fn).float() * _spread(exponents, _MAIN_TILE, plain)
    return torch.cat((coded, turned), dim=-1)


def pack_index_fp8(values: Tensor, rope_dim: int) -> Tensor:
    """values [..., D] float32 -> codes, then the scale as float32 [..., bytes] uint8."""
    codes, exponents = _e4m3(values, values.shape[-1])
    return torch.cat((codes, _viewed(torch.exp2(exponents.float() - _BIAS), torch.uint8)), dim=-1)


def unpack_index_fp8(data: Tensor, width: int, rope_dim: int) -> Tensor:
    """data [..., bytes] uint8 -> values [..., D] float32, exactly."""
    return data[..., :width].view(torch.float8_e4m3fn).float() * _viewed(data[..., width:], torch.float32)


def pack_index_fp4(values: Tensor, rope_dim: int) -> Tensor:
    """values [..., D] float32 -> pairs of codes, then scales [..., bytes] uint8."""
    exponents = _exponents(values, _INDEX_TILE, 6.0)
    scaled = values / _spread(exponents, _INDEX_TILE, values.shape[-1])
    magnitude = scaled.abs()
    code = sum((magnitude >= tie if even else magnitude > tie).to(torch.uint8) for tie, even in _TIES)
    code = code | (scaled.signbit().to(torch.uint8) << 3)
    return torch.cat((code[..., 0::2] | (code[..., 1::2] << 4), exponents), dim=-1)


def unpack_index_fp4(data: Tensor, width: int, rope_dim: int) -> Tensor:
    """data [..., bytes] uint8 -> values [..., D] float32, exactly."""
    packed = data[..., : width // 2]
    code = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).long()
    value = torch.tensor(E2M1, device=data.device)[code]
    return value * _spread(data[..., width // 2 :], _INDEX_TILE, width)


def _e4m3(values: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    exponents = _exponents(values, tile, 448.0)
    scaled = values / _spread(exponents, tile, values.shape[-1])
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8), exponents


def _exponents(values: Tensor, tile: int, largest: float) -> Tensor:
    """The e8m0 byte of every tile [..., ceil(D / tile)] uint8."""
    short = -values.shape[-1] % tile
    tiles = torch.nn.functional.pad(values.abs(), (0, short)).unflatten(-1, (-1, tile))
    # largest = m * 2^e: dividing by m is only exact enough in double, where no quotient of floats rounds to one.
    mantissa, exponent = torch.frexp(tiles.amax(-1).clamp(min=_FLOOR).double() / largest)
    return (torch.where(mantissa == 0.5, exponent - 1, exponent) + _BIAS).to(torch.uint8)


def _spread(exponents: Tensor, tile: int, width: int) -> Tensor:
    """Scales [..., D] float32 of e8m0 bytes."""
    return torch.exp2(exponents.float() - _BIAS).repeat_interleave(tile, dim=-1)[..., :width]


def _viewed(data: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of ``data`` [..., n] as another type.

    A copy of its own: one row out of longer ones counts as contiguous where it lies, at whatever byte.
    """
    return data.clone(memory_format=torch.contiguous_format).view(dtype)
