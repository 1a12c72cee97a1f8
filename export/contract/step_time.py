"""About how long a decode step takes on two processors, from what was measured at full width (docs/results.md). Standard library only.

It is a warning, and no promise: machines differ, and weights that memory does not hold are read from the disk.
"""

from __future__ import annotations

#: Above this many seconds a token, a bundle is for validation.
VALIDATION = 10.0
# Nanoseconds for a parameter of a product, and of a chosen expert. In the first form of segments e4m3 is decoded in every step.
_SECOND, _FIRST = (0.78, 0.05), (8.7, 1.3)


def step_seconds(products: int, experts: int, *, second: bool) -> float:
    """Seconds of a step of one sequence.

    Args:
        products: parameters of all matrices that a step multiplies with, experts left out.
        experts: parameters of the chosen experts of all layers.
        second: whether segments run in their second form (stacks.py).
    """
    matrix, expert = _SECOND if second else _FIRST
    return (products * matrix + experts * expert) / 1e9


def warning(seconds: float) -> str:
    """What to say of a step: nothing if it is quick."""
    return f"about {seconds:.0f} s a token: for validation only" if seconds > VALIDATION else ""
