"""The Hadamard rotation that spreads an index row over its channels before it is quantised."""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard_matrix(width: int) -> Tensor:
    """[width, width] float32 on the CPU, whatever the default device is; Sylvester's construction over ``sqrt(width)``: orthonormal and symmetric.

    ``width`` is a power of two (export/contract/profiles.py checks it).
    """
    matrix = torch.ones(1, 1, device="cpu")
    while matrix.shape[0] < width:
        matrix = torch.cat((torch.cat((matrix, matrix), dim=1), torch.cat((matrix, -matrix), dim=1)))
    scaled: Tensor = matrix * width**-0.5
    return scaled
