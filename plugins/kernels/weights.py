"""Tiles of weights as stored, decoded in registers: e4m3 in blocks, packed e2m1 in groups, bfloat16.

export/checkpoint/formats.py defines the meaning of the bytes. Codes are decoded with integer arithmetic on every GPU, as
rows of the state are (rows.py). Scales are at most 2^112; of e4m3, the code of NaN, which no checkpoint has, reads as 480.
"""

import triton
import triton.language as tl

from .rows import _from_e2m1, _from_e4m3, _scale, _spread


@triton.jit
def _scales(scales, place, known, SCALE: tl.constexpr):
    """Scales at ``place``, where known, as float32."""
    if SCALE == "exponent":
        return _scale(tl.load(scales + place, mask=known, other=0).to(tl.uint8, bitcast=True))
    else:
        tl.static_assert(SCALE == "float32")
        return tl.load(scales + place, mask=known, other=0.0)


@triton.jit
def read_weights(
    codes, scales, row, low, end,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GRID_ROWS: tl.constexpr, GRID_COLUMNS: tl.constexpr,
    WEIGHT: tl.constexpr, SCALE: tl.constexpr, BK: tl.constexpr, WITHIN: tl.constexpr,
):  # fmt: skip
    """Rows ``row`` [BN] int32, columns ``low`` to ``low + BK`` but below ``end``, of a matrix [ROWS, COLUMNS] at ``codes``.

    Its scales [GRID_ROWS, GRID_COLUMNS] divide it into equal blocks. WITHIN: all columns are in one block of columns. Returns
    [BN, BK] bfloat16, exactly, zeros outside; and a factor [BN] float32 that is not applied yet. Where several blocks
    are read, scales are exponents, and the values already have them.
    """
    BN: tl.constexpr = row.shape[0]
    HEIGHT: tl.constexpr = ROWS // GRID_ROWS
    WIDTH: tl.constexpr = COLUMNS // GRID_COLUMNS
    known = row < ROWS
    k = low + tl.arange(0, BK)
    if WEIGHT == "bfloat16":
        inside = known[:, None] & (k < end)[None, :]
        weight = tl.load(codes + (row[:, None] * COLUMNS + k[None, :]), mask=inside, other=0.0)
        return weight, tl.full((BN,), 1.0, tl.float32)
    else:
        if WEIGHT == "e4m3":
            inside = known[:, None] & (k < end)[None, :]
            value = _from_e4m3(tl.load(codes + (row[:, None] * COLUMNS + k[None, :]), mask=inside, other=0))
            STEP: tl.constexpr = 256.0
        else:
            tl.static_assert(WEIGHT == "e2m1")
            half = low // 2 + tl.arange(0, BK // 2)
            inside = known[:, None] & (half < end // 2)[None, :]
            two = tl.load(codes + (row[:, None] * (COLUMNS // 2) + half[None, :]), mask=inside, other=0).to(tl.int16)
            value = tl.reshape(tl.join(_from_e2m1(two & 15), _from_e2m1((two >> 4) & 15)), (BN, BK))
            STEP: tl.constexpr = 16384.0
        place = row // HEIGHT * GRID_COLUMNS
        if WITHIN:
            factor = _scales(scales, place + low // WIDTH, known, SCALE) * STEP
            return value.to(tl.float32).to(tl.bfloat16), factor
        else:
            tl.static_assert(SCALE == "exponent")
            block = low // WIDTH + tl.arange(0, BK // WIDTH)
            there = known[:, None] & (block < GRID_COLUMNS)[None, :]
            scale = _scales(scales, place[:, None] + block[None, :], there, SCALE) * STEP
            return (value.to(tl.float32) * _spread(scale, BK)).to(tl.bfloat16), tl.full((BN,), 1.0, tl.float32)
