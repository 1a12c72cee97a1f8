"""The matrices of a large model in float32, for the third form of segments (export/contract/chain.py): made in memory, from bfloat16.

ONNX Runtime multiplies in float32, so matrices in that type are read at the speed of the memory, and bfloat16 is widened in every step.
They take twice the bytes, and are worth them only if memory holds them beside everything else: from the disk they would be slower.
"""

from __future__ import annotations

import contextlib
import mmap
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..export.contract.chain import Bound, ChainTable, wide_file
from ..progress import BYTES, Progress, Say, silent
from ..units import size_text
from .backend import default_threads
from .host_memory import available_memory
from .weight_files import WeightFiles

#: How matrices are read: by what memory holds, or in one of the two types. What they are called in Python and on the command line.
AUTO, FLOAT32, BFLOAT16 = "auto", "float32", "bfloat16"
MATRICES = (AUTO, FLOAT32, BFLOAT16)
#: The share of the free memory that matrices in float32 may take if nobody asked for them; the rest is for experts, state and other processes.
SHARE = 0.5
_ADVICE = (
    "Read them in bfloat16 (`--matrices bfloat16`, or matrices='bfloat16' in Python), which takes no memory of its own."
)
_PART = 4 << 20  # values that are widened at once


def wide_bytes(table: ChainTable) -> int:
    """Bytes of the matrices of a chain in float32; 0 if no segment has a third form."""
    return sum(4 * prod(bound.shape) for roles in table.matrices().values() for bound in roles.values())


def takes_float32(table: ChainTable, matrices: str, reserve: int = 0) -> bool:
    """Whether the third form is to be run.

    Args:
        table: of the bundle, in its first form.
        matrices: one of ``MATRICES``.
        reserve: bytes that are to stay free, for state.

    Raises:
        InputError: float32 was asked for, and the memory has no room for it.
    """
    size = wide_bytes(table)
    if matrices == BFLOAT16 or not size:
        return False
    free = available_memory()
    if matrices == FLOAT32 and free and size + reserve > free:
        state = f" and the state {size_text(reserve)}" if reserve else ""
        raise InputError(
            f"the matrices take {size_text(size)} in float32{state}, and {size_text(free)} of memory are free. {_ADVICE}"
        )
    return matrices == FLOAT32 or size <= SHARE * (free - reserve)


def widen(table: ChainTable, files: WeightFiles, progress: Say = silent, *, must: bool = True) -> bool:
    """Make the matrices of a chain in float32, and give them to ``files``. Every value is exact.

    Args:
        table: of the bundle, in its first form.
        files: has the checkpoint's files and the stacks.
        progress: called with one line; a :class:`~foldkv.progress.Progress` learns how far it is.
        must: whether a lack of memory is an error.

    Returns:
        Whether they were made. If not, there was no memory, and nothing is held.

    Raises:
        InputError: the system gives no memory for them, and they must be made.
    """
    report, total = Progress.of(progress), wide_bytes(table)
    calls, third = table.matrices(), table.in_stacks(wide=True).weights
    try:
        rooms = {
            owner: _room(max(third[owner][role].offset + third[owner][role].bytes for role in roles))
            for owner, roles in calls.items()
        }
    except (OSError, MemoryError) as error:
        lack = f"the system gives no {size_text(total)} of memory for matrices in float32 ({error})"
        if must:
            raise InputError(f"{lack}. {_ADVICE}") from None
        report(f"{lack}: they are read in bfloat16")
        return False
    report(f"widening {size_text(total)} of matrices to float32, in memory")
    done = 0
    with ThreadPoolExecutor(default_threads()) as pool:
        for owner, roles in calls.items():
            files.hold(wide_file(owner), rooms[owner])
            parts = [
                part for role, bound in roles.items() for part in _parts(files, bound, third[owner][role], rooms[owner])
            ]
            for size in pool.map(_widen, *zip(*parts, strict=True)):
                done += size
                report.steps(done, total, BYTES)
    return True


def _parts(
    files: WeightFiles, bound: Bound, place: Bound, held: npt.NDArray[np.uint8]
) -> list[tuple[npt.NDArray[Any], npt.NDArray[np.float32]]]:
    """A matrix and where it goes, in parts."""
    stored = files.view(bound).reshape(-1)
    if bound.dtype == "float16":
        stored = stored.view(np.float16)
    made = held[place.offset : place.offset + place.bytes].view(np.float32)
    return [(stored[at : at + _PART], made[at : at + _PART]) for at in range(0, len(stored), _PART)]


def _widen(stored: npt.NDArray[Any], made: npt.NDArray[np.float32]) -> int:
    """Write values of bfloat16, as bits, or of float16; returns the bytes that were written."""
    if stored.dtype == np.float16:
        made[:] = stored
    else:  # bfloat16 is the upper half of float32
        np.left_shift(stored, np.uint32(16), out=made.view(np.uint32))
    return made.nbytes


def _room(size: int) -> npt.NDArray[np.uint8]:
    """Memory of this process alone [size], on pages of 2 MiB where the system has them: a step reads all of it.

    Raises:
        OSError: the system gives none.
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)
