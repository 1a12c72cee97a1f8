"""Products with weights as stored: y = x W^T, where W is e4m3 or bfloat16 and every block of it has a scale.

Codes are decoded with integer arithmetic, as in rows.py, so that every GPU computes the same. Activations are rounded to
bfloat16, or kept as the sum of three bfloat16. A code is exact in bfloat16; the scale multiplies the sum of a block.

The channels of a row are cut into spans, and spans are added in their order, whether one program computes all of them or
each has its own. So a result depends neither on the other tokens nor on their number. NaN codes are read as 480.
"""

import triton
import triton.language as tl

from .rows import _from_e4m3, _scale


@triton.jit
def _values(stored, FORMAT: tl.constexpr):
    """Stored elements -> values in bfloat16, of e4m3 divided by 256 (see ``_unit``)."""
    if FORMAT == "e4m3":
        return _from_e4m3(stored).to(tl.bfloat16)
    else:
        tl.static_assert(FORMAT == "bfloat16")
        return stored


@triton.jit
def _factor(stored, FORMAT: tl.constexpr, SCALES: tl.constexpr):
    """Stored scales -> float32 by which sums of ``_values`` are multiplied."""
    unit: tl.constexpr = 256.0 if FORMAT == "e4m3" else 1.0
    if SCALES == "exponent":
        return _scale(stored.to(tl.uint8, bitcast=True)) * unit
    else:
        tl.static_assert(SCALES == "float32")
        return stored * unit


@triton.jit
def _product(w, x, TERMS: tl.constexpr):
    """w [BN, BK] bfloat16, x [BK, BM] float32 -> w @ x [BN, BM] float32, with x as the sum of TERMS bfloat16."""
    high = x.to(tl.bfloat16)
    if TERMS == 1:
        return tl.dot(w, high)
    else:
        tl.static_assert(TERMS == 3)
        rest = x - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(w, high, tl.dot(w, middle, tl.dot(w, low)))


@triton.jit
def block_linear(
    x, weight, scale, tokens, rows, units, steps, block_rows, block_columns, scale_columns, groups, out,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ALIGN: tl.constexpr, TERMS: tl.constexpr, FORMAT: tl.constexpr,
    SCALES: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """x [tokens, groups * K] float32, weight [groups * rows, K], scale [blocks, scale_columns] -> out [tokens, groups * rows]
    float32; K is units * ALIGN. If SPLIT, a program has one span of ``steps`` * BK channels, and out is [spans, tokens, ...].

    Grid: (blocks of BM tokens, blocks of BN rows, groups * spans).
    """
    columns = units * ALIGN
    group = tl.program_id(2) % groups
    span = tl.program_id(2) // groups
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    row = group * rows + n
    is_row, is_token = n < rows, m < tokens
    first, last = 0, tl.cdiv(columns, BK)
    if SPLIT:
        first = span * steps
        last = tl.minimum(first + steps, last)
    stored = weight + row[:, None] * columns
    given = x + m[:, None] * (groups * columns) + group * columns
    scales = scale + (row // block_rows) * scale_columns
    part, total = tl.zeros((BN, BM), tl.float32), tl.zeros((BN, BM), tl.float32)
    for step in range(first, last):
        k = step * BK + tl.arange(0, BK)
        inside = k < columns
        w = tl.load(stored + k[None, :], mask=is_row[:, None] & inside[None, :], other=0)
        a = tl.load(given + k[None, :], mask=is_token[:, None] & inside[None, :], other=0.0)
        factor = _factor(tl.load(scales + step * BK // block_columns, mask=is_row, other=0), FORMAT, SCALES)
        part += _product(_values(w, FORMAT), tl.trans(a), TERMS) * factor[:, None]
        if not SPLIT:
            ends = (step + 1) % steps == 0
            total += tl.where(ends, part, 0.0)
            part = tl.where(ends, 0.0, part)
    place = m[None, :] * (groups * rows) + row[:, None]
    if SPLIT:
        place += span * tokens * groups * rows
    tl.store(out + place, total + part, mask=is_row[:, None] & is_token[None, :])


@triton.jit
def add_spans(partial, size, spans, out, BLOCK: tl.constexpr):
    """partial [spans, size] float32 -> out [size], the spans added in their order. Grid: (blocks of BLOCK elements)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for span in range(spans):
        total += tl.load(partial + span * size + at, mask=inside, other=0.0)
    tl.store(out + at, total, mask=inside)
