"""FoldkvIndexSelect: exact top-k by radix, one program per query, ties broken by the lowest index.

Four passes of eight bits find the k-th largest key; a last pass emits every larger key, and as many equal
ones as fit, in the order of their indices. Deterministic, whatever the order of threads.
"""

import triton
import triton.language as tl


@triton.jit
def _key(score):
    """float32 as uint32 of the same order; -0.0 counts as 0.0."""
    bits = (score + 0.0).to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def index_select(scores, positions, chunk, capacity, chosen, K: tl.constexpr, RATIO: tl.constexpr, BN: tl.constexpr):
    """scores [B, S, E] float32 -> chosen [B, S, K] int32, ascending, -1 where there is none. Grid (S, B)."""
    s = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    row = b * chunk + s
    visible = tl.minimum((tl.load(positions + b) + s + 1) // RATIO, capacity)
    n = tl.arange(0, BN)
    if visible <= K:
        for low in range(0, K, BN):
            i = low + n
            tl.store(chosen + row * K + i, tl.where(i < visible, i, -1), mask=i < K)
    else:
        base = scores + row * capacity
        bins = tl.arange(0, 256)
        prefix = tl.zeros((), tl.uint32)
        wanted = tl.full((), K, tl.int32)
        for step in tl.static_range(4):
            shift = 24 - 8 * step
            counts = tl.zeros((256,), tl.int32)
            for low in range(0, visible, BN):
                inside = low + n < visible
                key = _key(tl.load(base + low + n, mask=inside, other=0.0))
                if step > 0:
                    inside = inside & ((key >> (shift + 8)) == prefix)
                counts += tl.histogram(((key >> shift) & 0xFF).to(tl.int32), 256, mask=inside)
            above = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0)  # keys in higher bins
            here = (above < wanted) & (above + counts >= wanted)
            digit = tl.sum(tl.where(here, bins, 0), axis=0)
            wanted -= tl.sum(tl.where(here, above, 0), axis=0)
            prefix = (prefix << 8) | digit.to(tl.uint32)
        larger = tl.zeros((), tl.int32)
        equal = tl.zeros((), tl.int32)
        for low in range(0, visible, BN):
            inside = low + n < visible
            key = _key(tl.load(base + low + n, mask=inside, other=0.0))
            over, same = inside & (key > prefix), inside & (key == prefix)
            # One scan counts both, in halves of a word: a block has fewer than 2^15 entries.
            both = over.to(tl.int32) + (same.to(tl.int32) << 16)
            until = tl.cumsum(both, axis=0)
            ties = equal + (until >> 16)
            place = larger + (until & 0xFFFF) + tl.minimum(ties, wanted) - 1
            tl.store(chosen + row * K + place, low + n, mask=over | (same & (ties <= wanted)))
            sums = tl.sum(both, axis=0)
            larger += sums & 0xFFFF
            equal += sums >> 16
