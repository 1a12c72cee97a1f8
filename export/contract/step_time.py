"""About how long a decode step takes on two processors, from what was measured at full width (docs/results.md). Standard library only.

It is a warning, and no promise: machines differ, and weights that memory does not hold are read from the disk.
"""

from __future__ import annotations

#: Above this many seconds a token, a bundle is for validation.
VALIDATION = 10.0
#: How matrices are read: decoded in every step from what is stored (the first form of segments), or in bfloat16 or float32. Experts are decoded,
#: too, or read as stacks, or in float32.
STORED, BFLOAT16, FLOAT32, STACKED = "stored", "bfloat16", "float32", "stacked"
# Nanoseconds for a parameter of a product, and of a chosen expert. Decoded experts took 1.5 to 2.3, in e4m3 1.8.
_MATRICES = {STORED: 3.5, BFLOAT16: 0.62, FLOAT32: 0.17}
_EXPERTS = {STORED: 1.8, STACKED: 0.05, FLOAT32: 0.17}


def step_seconds(products: int, chosen: int, *, matrices: str, experts: str = STORED) -> float:
    """Seconds of a step of one sequence.

    Args:
        products: parameters of all matrices that a step multiplies with, experts left out.
        chosen: parameters of the chosen experts of all layers.
        matrices: ``STORED``, ``BFLOAT16`` or ``FLOAT32``.
        experts: ``STORED``, ``STACKED`` or ``FLOAT32``.
    """
    return (products * _MATRICES[matrices] + chosen * _EXPERTS[experts]) / 1e9


def warning(seconds: float) -> str:
    """What to say of a step: nothing if it is quick."""
    return f"about {seconds:.0f} s a token: for validation only" if seconds > VALIDATION else ""
