"""One program's row times a matrix over all its channels: the Hadamard rotation of an indexer's entries."""

import triton
import triton.language as tl


@triton.jit
def mix(x, matrix, D: tl.constexpr):
    """x [D] float32, matrix [D, D] float32, D a power of two -> x @ matrix [D] float32.

    The matrix is read in bands of 16 rows, which keeps it out of registers; programs of one multiprocessor share its cache.
    """
    d = tl.arange(0, D)
    total = tl.zeros((D,), tl.float32)
    for low in range(0, D, 16):
        k = low + tl.arange(0, 16)
        picked = tl.sum(tl.where(k[:, None] == d[None, :], x[None, :], 0.0), axis=1)
        total += tl.sum(picked[:, None] * tl.load(matrix + (k * D)[:, None] + d[None, :]), axis=0)
    return total
