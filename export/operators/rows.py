"""The meaning of a packed cache row: values to bytes and back, in torch. See export/contract/layouts.py for the formats.

A scale is the smallest power of two that brings a tile's largest magnitude into the format's range (at most 448 for
e4m3, 6 for e2m1). Largest magnitudes below 1e-4 count as 1e-4. Values are rounded to nearest even. For e4m3 the released
model's ``act_quant`` has this floor. For e2m1 DeepGEMM's ``per_token_cast_to_fp4`` has it; the released ``fp4_act_quant``
has its floor at 6 * 2**-126, so it differs for a tile whose largest magnitude is below 1e-4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract.layouts import FP8_DS_MLA, INDEX_FP4, INDEX_FP8, TILES, row_bytes

_FLOOR = 1e-4
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Halfway points between neighbours, and whether the upper one has the even code and so gets the tie.
_TIES = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))
_BIAS = 127  # of an e8m0 scale


def pack(values: Tensor, format_: str, rotary: int = 0) -> Tensor:
    """values [..., D] floating -> rows [..., bytes] int8 (raw bytes). Unused bytes are zero.

    Raises:
        InputError: the format does not fit the width.
    """
    width = values.shape[-1]
    size, values = row_bytes(format_, width, rotary), values.float()
    if format_ == FP8_DS_MLA:
        plain = width - rotary
        codes, exponents = _e4m3(values[..., :plain], TILES[FP8_DS_MLA])
        parts = [codes, values[..., plain:].bfloat16().contiguous().view(torch.uint8), exponents]
    elif format_ == INDEX_FP8:
        codes, exponents = _e4m3(values, width)
        parts = [codes, torch.exp2(exponents.float() - _BIAS).contiguous().view(torch.uint8)]
    else:
        exponents = _exponents(values, TILES[INDEX_FP4], 6.0)
        scaled = values / _spread(exponents, TILES[INDEX_FP4], width)
        magnitude = scaled.abs()
        code = sum((magnitude >= tie if even else magnitude > tie).to(torch.uint8) for tie, even in _TIES)
        code = code | (scaled.signbit().to(torch.uint8) << 3)
        parts = [code[..., 0::2] | (code[..., 1::2] << 4), exponents]
    rows = torch.cat(parts, dim=-1)
    return torch.nn.functional.pad(rows, (0, size - rows.shape[-1])).view(torch.int8)


def unpack(rows: Tensor, format_: str, width: int, rotary: int = 0) -> Tensor:
    """rows [..., bytes] int8 -> values [..., D] float32, exactly."""
    data = rows.contiguous().view(torch.uint8)
    if format_ == FP8_DS_MLA:
        plain = width - rotary
        scale = _spread(
            data[..., plain + 2 * rotary :][..., : -(-plain // TILES[FP8_DS_MLA])], TILES[FP8_DS_MLA], plain
        )
        turned = data[..., plain : plain + 2 * rotary].contiguous().view(torch.bfloat16).float()
        return torch.cat((data[..., :plain].view(torch.float8_e4m3fn).float() * scale, turned), dim=-1)
    if format_ == INDEX_FP8:
        return data[..., :width].view(torch.float8_e4m3fn).float() * data[..., width:].contiguous().view(torch.float32)
    packed = data[..., : width // 2]
    code = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).long()
    value = torch.tensor(_E2M1, device=rows.device)[code & 7] * (1.0 - 2.0 * (code >> 3))
    return value * _spread(data[..., width // 2 :], TILES[INDEX_FP4], width)


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
