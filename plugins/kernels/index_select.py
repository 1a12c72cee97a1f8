"""FoldkvIndexSelect: exact top-k by radix, ties broken by the lowest index.

Four passes of eight bits find the k-th largest key. A last pass emits every larger key, and as many equal keys as fit, in
the order of their indices. The result does not depend on the order of threads.

``index_select`` uses one program per query, so one multiprocessor. With few queries and many entries, several programs
divide the entries: ``select_count`` is one pass, and each of its programs finds the previous pass's digit from the counts of
all parts, so programs of a launch never wait for each other. ``select_emit`` is the last pass. The division into parts
changes no bit of the result.
"""

import triton
import triton.language as tl


@triton.jit
def _key(score):
    """float32 as uint32 of the same order; -0.0 counts as 0.0."""
    bits = (score + 0.0).to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _count(digits, inside):
    """How often each of 256 digits occurs where ``inside``; blocks of later passes have few such keys, or none."""
    counts = tl.zeros((256,), tl.int32)
    if tl.max(inside.to(tl.int32), axis=0) > 0:
        counts = tl.histogram(digits, 256, mask=inside)
    return counts


@triton.jit
def _digit(counts, wanted):
    """The bin [256] with the ``wanted``-th largest key, and how many keys of that bin are wanted."""
    above = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0)  # keys in higher bins
    here = (above < wanted) & (above + counts >= wanted)
    digit = tl.sum(tl.where(here, tl.arange(0, 256), 0), axis=0)
    return digit, wanted - tl.sum(tl.where(here, above, 0), axis=0)


@triton.jit
def _emit(base, chosen, first, end, prefix, wanted, larger, equal, BN: tl.constexpr):
    """Write the chosen entries of ``first`` to ``end``, after ``larger`` larger and ``equal`` equal ones before them."""
    n = tl.arange(0, BN)
    for low in range(first, end, BN):
        inside = low + n < end
        key = _key(tl.load(base + low + n, mask=inside, other=0.0))
        over, same = inside & (key > prefix), inside & (key == prefix)
        # One scan counts both, in halves of a word: a block has fewer than 2^15 entries.
        both = over.to(tl.int32) + (same.to(tl.int32) << 16)
        until = tl.cumsum(both, axis=0)
        ties = equal + (until >> 16)
        place = larger + (until & 0xFFFF) + tl.minimum(ties, wanted) - 1
        tl.store(chosen + place, low + n, mask=over | (same & (ties <= wanted)))
        sums = tl.sum(both, axis=0)
        larger += sums & 0xFFFF
        equal += sums >> 16


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
                counts += _count(((key >> shift) & 0xFF).to(tl.int32), inside)
            digit, wanted = _digit(counts, wanted)
            prefix = (prefix << 8) | digit.to(tl.uint32)
        none = tl.zeros((), tl.int32)
        _emit(base, chosen + row * K, 0, visible, prefix, wanted, none, none, BN)


@triton.jit
def _found(counts, known, row, parts, K: tl.constexpr, STEP: tl.constexpr, BP: tl.constexpr):
    """The first STEP digits of a row's k-th largest key, how many keys are wanted that begin with them, and the counts.

    ``counts`` [4, rows, parts, 256] are from the earlier passes, and ``known`` [rows, 4, 2] is what they found.
    """
    rows = tl.num_programs(1).to(tl.int64) * tl.num_programs(2)
    prefix = tl.zeros((), tl.uint32)
    wanted = tl.full((), K, tl.int32)
    if STEP > 1:
        prefix = tl.load(known + (row * 4 + STEP - 1) * 2).to(tl.uint32, bitcast=True)
        wanted = tl.load(known + (row * 4 + STEP - 1) * 2 + 1)
    base = counts + ((STEP - 1) * rows + row) * parts * 256
    bins = tl.arange(0, 256)
    total = tl.zeros((256,), tl.int32)
    for low in range(0, parts, BP):
        part = low + tl.arange(0, BP)
        tile = tl.load(base + part[:, None] * 256 + bins[None, :], mask=(part < parts)[:, None], other=0)
        total += tl.sum(tile, axis=0)
    digit, wanted = _digit(total, wanted)
    return (prefix << 8) | digit.to(tl.uint32), wanted, digit


@triton.jit
def select_count(
    scores, positions, chunk, capacity, span, counts, known, larger,
    K: tl.constexpr, RATIO: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One pass: how often each value of digit STEP occurs among ``span`` entries that begin with the digits found before.

    Grid (parts, S, B). The last pass also writes ``larger`` [rows, parts]: keys that begin with larger digits.
    """
    part, parts = tl.program_id(0), tl.num_programs(0)
    s = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    row = b * chunk + s
    visible = tl.minimum((tl.load(positions + b) + s + 1) // RATIO, capacity)
    if visible > K:
        rows = tl.num_programs(1).to(tl.int64) * tl.num_programs(2)
        prefix = tl.zeros((), tl.uint32)
        if STEP > 0:
            prefix, wanted, _ = _found(counts, known, row, parts, K, STEP, BP)
            if part == 0:
                tl.store(known + (row * 4 + STEP) * 2, prefix.to(tl.int32, bitcast=True))
                tl.store(known + (row * 4 + STEP) * 2 + 1, wanted)
        n, bins = tl.arange(0, BN), tl.arange(0, 256)
        base = scores + row * capacity
        SHIFT: tl.constexpr = 24 - 8 * STEP
        found = tl.zeros((256,), tl.int32)
        over = tl.zeros((BN,), tl.int32)
        end = tl.minimum((part + 1) * span, visible)
        for low in range(part * span, end, BN):
            inside = low + n < end
            key = _key(tl.load(base + low + n, mask=inside, other=0.0))
            if STEP == 3:
                over += (inside & ((key >> 8) > prefix)).to(tl.int32)
            if STEP > 0:
                inside = inside & ((key >> (SHIFT + 8)) == prefix)
            found += _count(((key >> SHIFT) & 0xFF).to(tl.int32), inside)
        tl.store(counts + ((STEP * rows + row) * parts + part) * 256 + bins, found)
        if STEP == 3:
            tl.store(larger + row * parts + part, tl.sum(over, axis=0))


@triton.jit
def select_emit(
    scores, positions, chunk, capacity, span, counts, known, larger, chosen,
    K: tl.constexpr, RATIO: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """The last pass: chosen [B, S, K] as ``index_select`` writes it. Grid (parts, S, B)."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    s = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    row = b * chunk + s
    visible = tl.minimum((tl.load(positions + b) + s + 1) // RATIO, capacity)
    n, bins = tl.arange(0, BN), tl.arange(0, 256)
    if visible <= K:
        for low in range(part * BN, K, parts * BN):
            i = low + n
            tl.store(chosen + row * K + i, tl.where(i < visible, i, -1), mask=i < K)
    else:
        rows = tl.num_programs(1).to(tl.int64) * tl.num_programs(2)
        prefix, wanted, digit = _found(counts, known, row, parts, K, 4, BP)
        base = counts + (3 * rows + row) * parts * 256
        before = tl.zeros((), tl.int32)
        equal = tl.zeros((), tl.int32)
        for low in range(0, part, BP):
            other = low + tl.arange(0, BP)
            earlier = other < part
            tile = tl.load(base + other[:, None] * 256 + bins[None, :], mask=earlier[:, None], other=0)
            before += tl.sum(tl.sum(tl.where(bins[None, :] > digit, tile, 0), axis=1), axis=0)
            equal += tl.sum(tl.sum(tl.where(bins[None, :] == digit, tile, 0), axis=1), axis=0)
            before += tl.sum(tl.load(larger + row * parts + other, mask=earlier, other=0), axis=0)
        end = tl.minimum((part + 1) * span, visible)
        _emit(scores + row * capacity, chosen + row * K, part * span, end, prefix, wanted, before, equal, BN)
