"""Formats of released weights: e4m3 in blocks, packed e2m1 in groups, e8m0 scales (values.py computes with them).

========  =====================  ==============================================  ==========================
format    dtype in safetensors   weight [R, C] is stored as                      scale
========  =====================  ==============================================  ==========================
plain     F32, BF16, F16         [R, C]                                          none
fp8       F8_E4M3                [R, C], one byte each                           [ceil(R / 128), ceil(C / 128)]
fp4       I8, U8                 [R, C / 2], e2m1, the lower half of a byte first  [R, C / 32]
========  =====================  ==============================================  ==========================

A scale is one byte of exponent (e8m0: ``2 ** (byte - 127)``, 255 is NaN), written as F8_E8M0 or as U8, or a float32.
A value is element times scale. Both are exact in float32, and so is their product unless it overflows or underflows.
Blocks at the edge are partial: block ``i`` of rows always begins at row ``128 i``.
"""

from __future__ import annotations

from dataclasses import dataclass

PLAIN, FP8, FP4 = "plain", "fp8", "fp4"
PLAIN_DTYPES = ("F32", "BF16", "F16")
SCALE_DTYPES = ("F8_E8M0", "U8", "F32")
#: Block of an e4m3 weight if config.json names none, and the channels of an e2m1 weight that share a scale.
FP8_BLOCK = (128, 128)
FP4_GROUP = 32
#: The sixteen values of e2m1, by code.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_BY_DTYPE = dict.fromkeys(PLAIN_DTYPES, PLAIN) | {"F8_E4M3": FP8, "I8": FP4, "U8": FP4}


@dataclass(frozen=True)
class Format:
    """How weights of one dtype are stored; ``block`` is (rows, channels) that share a scale."""

    name: str
    block: tuple[int, int] = (1, 1)

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in the file of a weight [..., R, C]."""
        return (*shape[:-1], -(-shape[-1] // 2)) if self.name == FP4 else shape

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scale of a weight [..., R, C]."""
        return (*shape[:-2], -(-shape[-2] // self.block[0]), -(-shape[-1] // self.block[1]))


def format_of(dtype: str, block: tuple[int, int] = FP8_BLOCK) -> Format | None:
    """The format of a weight matrix with that dtype in safetensors, or None if there is none.

    Args:
        dtype: as safetensors writes it.
        block: of e4m3 weights, from config.json.
    """
    name = _BY_DTYPE.get(dtype)
    return None if name is None else Format(name, {FP8: block, FP4: (1, FP4_GROUP)}.get(name, (1, 1)))
