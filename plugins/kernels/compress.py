"""FoldkvCompress in one launch: gated sum, RMS norm, RoPE and the write of every window that closes.

FoldkvCompressFp8 and FoldkvCompressFp4 also take one launch; they round an entry to the values of a packed format before
it is written.

Windows overlap: an entry joins the first series of the window before it with the second of its own. So only windows 0
and 1 of a chunk can read the carries. Program 0 does both and then writes the carries. No other program reads what it
overwrites, so state can be updated in place within one launch.
"""

import triton
import triton.language as tl

from .entry import gather_scored, write_entry


@triton.jit
def _close(
    entries_out, carry_kv, carry_gate, kv, gate, bias, norm, inv_freq, matrix, b, nth, start, real, chunk, capacity,
    RATIO: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, HALF: tl.constexpr,
    EPS: tl.constexpr, BM: tl.constexpr, ROW: tl.constexpr, ROTARY: tl.constexpr, FORMAT: tl.constexpr,
    VALUES: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """The nth window that can close in this chunk, if it does; softmax per channel, taken BM tokens at a time."""
    SPAN: tl.constexpr = 2 * RATIO
    C: tl.constexpr = 2 * D
    entry = start // RATIO + nth
    if ((entry + 1) * RATIO <= start + real) & (entry < capacity):
        d = tl.arange(0, BD)
        best = tl.full((BD,), float("-inf"), tl.float32)
        weight = tl.zeros((BD,), tl.float32)
        total = tl.zeros((BD,), tl.float32)
        for m in range(0, SPAN, BM):
            r = m + tl.arange(0, BM)
            token = (entry - 1) * RATIO + r
            column = (r // RATIO) * D  # the window before lends its first series, this window its second
            past = (token < start)[:, None]
            held = ((token + SPAN) % SPAN * C + column)[:, None] + d
            fresh = ((token - start) * C + column)[:, None] + d
            inside = (token >= 0)[:, None] & (d < D)
            old, new = inside & past, inside & (past == 0)
            score = tl.load(carry_gate + b * SPAN * C + held, mask=old, other=0.0)
            score += tl.load(gate + b * chunk * C + fresh, mask=new, other=0.0)
            score += tl.load(bias + (r % RATIO * C + column)[:, None] + d, mask=inside, other=0.0)
            value = tl.load(carry_kv + b * SPAN * C + held, mask=old, other=0.0)
            value += tl.load(kv + b * chunk * C + fresh, mask=new, other=0.0)
            score = tl.where(inside, score, float("-inf"))
            best, weight, total = gather_scored(best, weight, total, score, value)
        merged = tl.where(d < D, total / tl.where(d < D, weight, 1.0), 0.0)
        write_entry(
            entries_out, merged, norm, inv_freq, matrix, b, entry, capacity,
            RATIO, D, BD, HALF, EPS, ROW, ROTARY, FORMAT, VALUES, MIXED,
        )  # fmt: skip


@triton.jit
def _advance(
    carry_kv, carry_gate, kv, gate, bias, norm, inv_freq, positions, num_tokens, matrix, chunk, capacity,
    entries_out, carry_kv_out, carry_gate_out,
    RATIO: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, HALF: tl.constexpr,
    EPS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, ROW: tl.constexpr,
    ROTARY: tl.constexpr, FORMAT: tl.constexpr, VALUES: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    start, real = tl.load(positions + b), tl.load(num_tokens + b)
    first = tl.where(program == 0, 0, program + 1)
    end = tl.where(program == 0, 2, program + 2)
    for nth in range(first, end):
        _close(
            entries_out, carry_kv, carry_gate, kv, gate, bias, norm, inv_freq, matrix, b, nth, start, real, chunk,
            capacity, RATIO, D, BD, HALF, EPS, BM, ROW, ROTARY, FORMAT, VALUES, MIXED,
        )  # fmt: skip
    if program == 0:
        tl.debug_barrier()  # the carries were read by other threads of this program
        SPAN: tl.constexpr = 2 * RATIO
        C: tl.constexpr = 2 * D
        c = tl.arange(0, BC)
        for low in range(tl.maximum(real - SPAN, 0), real, BR):
            i = low + tl.arange(0, BR)
            inside = (i < real)[:, None] & (c < C)
            source = (b * chunk + i)[:, None] * C + c
            target = (b * SPAN + (start + i) % SPAN)[:, None] * C + c
            tl.store(carry_kv_out + target, tl.load(kv + source, mask=inside), mask=inside)
            tl.store(carry_gate_out + target, tl.load(gate + source, mask=inside), mask=inside)


@triton.jit
def compress(
    entries, carry_kv, carry_gate, kv, gate, bias, norm, inv_freq, positions, num_tokens, chunk, capacity,
    entries_out, carry_kv_out, carry_gate_out,
    RATIO: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, HALF: tl.constexpr, EPS: tl.constexpr,
    ROW: tl.constexpr, ROTARY: tl.constexpr, FORMAT: tl.constexpr, VALUES: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """entries [B, E, ROW] state type, carries [B, 2 * RATIO, 2 * D], kv and gate [B, S, 2 * D] float32; state is in place.

    Grid (max(1, ceil(S / RATIO) - 1), B). VALUES: see write_entry.
    """
    _advance(
        carry_kv, carry_gate, kv, gate, bias, norm, inv_freq, positions, num_tokens, norm, chunk, capacity,
        entries_out, carry_kv_out, carry_gate_out,
        RATIO, D, BD, HALF, EPS, BM, BC, BR, ROW, ROTARY, FORMAT, VALUES, False,
    )  # fmt: skip


@triton.jit
def compress_mixed(
    entries, carry_kv, carry_gate, kv, gate, bias, norm, inv_freq, positions, num_tokens, hadamard, chunk, capacity,
    entries_out, carry_kv_out, carry_gate_out,
    RATIO: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, HALF: tl.constexpr, EPS: tl.constexpr,
    ROW: tl.constexpr, ROTARY: tl.constexpr, FORMAT: tl.constexpr, VALUES: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Like ``compress``, but multiplies every entry by hadamard [D, D] float32 before rounding it."""
    _advance(
        carry_kv, carry_gate, kv, gate, bias, norm, inv_freq, positions, num_tokens, hadamard, chunk, capacity,
        entries_out, carry_kv_out, carry_gate_out,
        RATIO, D, BD, HALF, EPS, BM, BC, BR, ROW, ROTARY, FORMAT, VALUES, True,
    )  # fmt: skip
