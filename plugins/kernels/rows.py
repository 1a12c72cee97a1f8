"""Rows of the state in every format of export/contract/layouts.py: round to its values, write one row, read a block of rows.

export/operators/rows.py defines the meaning of the bytes; this module implements version 1 of the formats. e4m3
and e2m1 are coded with integer arithmetic on every GPU: compute capabilities 8.0 and 8.6 have no instructions for
them, and the same code makes the same bytes everywhere.
"""

import triton
import triton.language as tl


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _scale(byte):
    """The power of two of an e8m0 byte, which is the exponent of a float32."""
    return _float(byte.to(tl.int32) << 23)


@triton.jit
def _tiles(x, TILES: tl.constexpr, CARRY: tl.constexpr, LARGEST: tl.constexpr):
    """x [N] float32 -> x in TILES tiles, each divided by its scale, and the scales' e8m0 bytes [TILES] int32.

    The largest code is 2^LARGEST times a mantissa m, and CARRY = 2^24 - 1 - m * 2^23: a mantissa larger than m
    carries into the exponent, so the scale is exact without a division or a logarithm.
    """
    tiles = tl.reshape(x, (TILES, x.shape[0] // TILES))
    largest = tl.maximum(tl.max(tl.abs(tiles), axis=1), 1e-4)
    byte = ((_bits(largest) + CARRY) >> 23) - LARGEST
    return tiles * _float((254 - byte) << 23)[:, None], byte


@triton.jit
def _to_e4m3(x):
    """x float32 of magnitude at most 448 -> its e4m3 code int32, rounded to nearest even."""
    bits = _bits(x)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes are multiples of 2^-9: adding 1.5 * 2^23 rounds to them and leaves them in the low bits.
    small = _bits(_float(size) * 512.0 + 12582912.0) & 0xFF
    return tl.where(size < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)


@triton.jit
def _from_e4m3(code):
    """e4m3 bytes int8 -> values / 256 float16, exactly: a float16 has a wider exponent, and the same subnormals."""
    code = code.to(tl.int16)
    return (((code & 0x80) << 8) | ((code & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def _to_e2m1(x):
    """x float32 of magnitude at most 6 -> its e2m1 code int32, rounded to nearest even."""
    size = tl.abs(x)
    code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
    code += (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
    code += (size > 5.0).to(tl.int32)
    return code | ((_bits(x) >> 28) & 8)


@triton.jit
def _from_e2m1(code):
    """e2m1 codes int16 (0 to 15) -> values / 2^14 float16, exactly."""
    return (((code & 8) << 12) | ((code & 7) << 9)).to(tl.float16, bitcast=True)


@triton.jit
def _spread(scales, WIDTH: tl.constexpr):
    """scales [BN, T] -> [BN, WIDTH], each over WIDTH / T channels."""
    BN: tl.constexpr = scales.shape[0]
    T: tl.constexpr = scales.shape[1]
    return tl.reshape(tl.broadcast_to(scales[:, :, None], (BN, T, WIDTH // T)), (BN, WIDTH))


@triton.jit
def _fp8_tiles(x, D: tl.constexpr, BD: tl.constexpr, ROTARY: tl.constexpr):
    """x [BD] float32 -> e4m3 codes [BD / 64, 64] int32 of its channels without position, and the scales' e8m0 bytes."""
    plain = tl.where(tl.arange(0, BD) < D - ROTARY, x, 0.0)
    tiles, byte = _tiles(plain, (BD + 63) // 64, 0x1FFFFF, 8)
    return _to_e4m3(tiles), byte


@triton.jit
def _fp4_tiles(x, BD: tl.constexpr):
    """x [BD] float32 -> e2m1 codes [BD / 32, 32] int32, and the scales' e8m0 bytes [BD / 32]."""
    tiles, byte = _tiles(x, BD // 32, 0x3FFFFF, 2)
    return _to_e2m1(tiles), byte


@triton.jit
def rounded(x, D: tl.constexpr, BD: tl.constexpr, ROTARY: tl.constexpr, VALUES: tl.constexpr):
    """x [BD] float32 -> the values of its row in the format VALUES, float32; x itself if that is dense."""
    if VALUES == "dense":
        return x
    elif VALUES == "fp8_ds_mla":
        code, byte = _fp8_tiles(x, D, BD, ROTARY)
        value = _from_e4m3(code).to(tl.float32) * (_scale(byte) * 256.0)[:, None]
        return tl.where(tl.arange(0, BD) < D - ROTARY, tl.reshape(value, (BD,)), x.to(tl.bfloat16).to(tl.float32))
    else:
        tl.static_assert(VALUES == "index_fp4")
        code, byte = _fp4_tiles(x, BD)
        value = _from_e2m1(code.to(tl.int16)).to(tl.float32) * (_scale(byte) * 16384.0)[:, None]
        return tl.reshape(value, (BD,))


@triton.jit
def write_row(
    target, x, D: tl.constexpr, BD: tl.constexpr, ROW: tl.constexpr, ROTARY: tl.constexpr, FORMAT: tl.constexpr
):
    """Write x [BD] float32, of which D channels count and the rest are zero, as a row of ROW elements at ``target``."""
    d = tl.arange(0, BD)
    if FORMAT == "dense":
        tl.store(target + d, x.to(target.dtype.element_ty), mask=d < D)
    elif FORMAT == "fp8_ds_mla":
        PLAIN: tl.constexpr = D - ROTARY
        TILES: tl.constexpr = (BD + 63) // 64
        SCALES: tl.constexpr = PLAIN + 2 * ROTARY
        USED: tl.constexpr = (PLAIN + 63) // 64
        code, byte = _fp8_tiles(x, D, BD, ROTARY)
        tl.store(target + d, tl.reshape(code, (BD,)).to(tl.int8), mask=d < PLAIN)
        turned = (target + PLAIN).to(tl.pointer_type(tl.bfloat16), bitcast=True)
        tl.store(turned + (d - PLAIN), x.to(tl.bfloat16), mask=(d >= PLAIN) & (d < D))
        tile = tl.arange(0, TILES)
        tl.store(target + SCALES + tile, byte.to(tl.int8), mask=tile < USED)
        pad = SCALES + USED + tl.arange(0, 8)
        tl.store(target + pad, tl.zeros((8,), tl.int8), mask=pad < ROW)
    elif FORMAT == "index_fp8":
        tiles, byte = _tiles(x, 1, 0x1FFFFF, 8)
        tl.store(target + d, tl.reshape(_to_e4m3(tiles), (BD,)).to(tl.int8), mask=d < D)
        scale = (target + D).to(tl.pointer_type(tl.float32), bitcast=True)
        tl.store(scale + tl.arange(0, 1), _scale(byte))
    else:
        tl.static_assert(FORMAT == "index_fp4")
        TILES: tl.constexpr = BD // 32
        code, byte = _fp4_tiles(x, BD)
        even, odd = tl.split(tl.reshape(code, (BD // 2, 2)))
        half, tile = tl.arange(0, BD // 2), tl.arange(0, TILES)
        tl.store(target + half, (even | (odd << 4)).to(tl.int8), mask=half < D // 2)
        tl.store(target + D // 2 + tile, byte.to(tl.int8), mask=tile < D // 32)


@triton.jit
def read_rows(
    base, row, seen, D: tl.constexpr, BD: tl.constexpr, ROW: tl.constexpr, ROTARY: tl.constexpr, FORMAT: tl.constexpr
):
    """Rows ``row`` [BN] int32 where ``seen`` [BN], else zeros -> [BN, BD] in the type of dense rows or bfloat16.

    Exact: a packed value has at most four significant bits, and bfloat16 has eight. Rows that were never written can
    contain anything, so rows that are not seen are not read. Offsets fit int32 up to 3.6 million rows of 584 bytes.
    """
    d = tl.arange(0, BD)
    place = row * ROW
    if FORMAT == "dense":
        return tl.load(base + (place[:, None] + d[None, :]), mask=seen[:, None] & (d < D)[None, :], other=0.0)
    else:
        tl.static_assert(FORMAT == "fp8_ds_mla")
        PLAIN: tl.constexpr = D - ROTARY
        TILES: tl.constexpr = (BD + 63) // 64
        # Two loads of contiguous bytes fill one tile together: the matrix products take it as a whole.
        code = tl.load(base + (place[:, None] + d[None, :]), mask=seen[:, None] & (d < PLAIN)[None, :], other=0)
        turned = (base + PLAIN).to(tl.pointer_type(tl.bfloat16), bitcast=True) + (place // 2)[:, None]
        late = (d >= PLAIN) & (d < D)
        exact = tl.load(turned + (d - PLAIN)[None, :], mask=seen[:, None] & late[None, :], other=0.0)
        tile = tl.arange(0, TILES)
        known = seen[:, None] & (tile < (PLAIN + 63) // 64)[None, :]
        byte = tl.load(base + PLAIN + 2 * ROTARY + (place[:, None] + tile[None, :]), mask=known, other=0)
        scale = _scale(byte.to(tl.uint8, bitcast=True)) * 256.0
        value = _from_e4m3(code).to(tl.float32) * _spread(scale, BD)
        return tl.where(late[None, :], exact, value.to(tl.bfloat16))


@triton.jit
def read_index_rows(base, row, seen, D: tl.constexpr, BD: tl.constexpr, ROW: tl.constexpr, FORMAT: tl.constexpr):
    """Like ``read_rows``, for index entries; also a positive factor [BN] float32 per row that is not applied yet."""
    d = tl.arange(0, BD)
    place = row * ROW
    one = tl.full(row.shape, 1.0, tl.float32)
    if FORMAT == "dense":
        return tl.load(base + (place[:, None] + d[None, :]), mask=seen[:, None] & (d < D)[None, :], other=0.0), one
    elif FORMAT == "index_fp8":
        code = tl.load(base + (place[:, None] + d[None, :]), mask=seen[:, None] & (d < D)[None, :], other=0)
        scale = tl.load((base + D).to(tl.pointer_type(tl.float32), bitcast=True) + place // 4, mask=seen, other=0.0)
        return _from_e4m3(code).to(tl.bfloat16), scale * 256.0
    else:
        tl.static_assert(FORMAT == "index_fp4")
        TILES: tl.constexpr = BD // 32
        half, tile = tl.arange(0, BD // 2), tl.arange(0, TILES)
        known = seen[:, None] & (half < D // 2)[None, :]
        pairs = tl.load(base + (place[:, None] + half[None, :]), mask=known, other=0).to(tl.int16)
        value = tl.reshape(tl.join(_from_e2m1(pairs & 15), _from_e2m1((pairs >> 4) & 15)), (row.shape[0], BD))
        known = seen[:, None] & (tile < D // 32)[None, :]
        byte = tl.load(base + D // 2 + (place[:, None] + tile[None, :]), mask=known, other=0)
        scale = _scale(byte.to(tl.uint8, bitcast=True)) * 16384.0
        return (value.to(tl.float32) * _spread(scale, BD)).to(tl.bfloat16), one
