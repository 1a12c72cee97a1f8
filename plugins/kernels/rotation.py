"""Interleaved RoPE of one program's vector; shared by the kernels that write or return rows."""

import triton
import triton.language as tl


@triton.jit
def rotate(x, position, inv_freq, D: tl.constexpr, BD: tl.constexpr, HALF: tl.constexpr):
    """x [BD] float32 with D channels in use -> its last 2 * HALF channels turned by ``position * inv_freq``.

    Earlier channels get the angle zero, which keeps them, so no tile is cut.
    """
    pair = tl.arange(0, BD // 2)
    nth = pair - (D // 2 - HALF)
    turns = (nth >= 0) & (nth < HALF)
    angle = position.to(tl.float32) * tl.load(inv_freq + nth, mask=turns, other=0.0)
    cos, sin = tl.cos(angle), tl.sin(angle)
    even, odd = tl.split(tl.reshape(x, (BD // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), (BD,))
