"""The state of a session: the state table of a manifest, what it costs, and the buffers that hold it.

Every state tensor (export/contract/state.py) is one contiguous buffer ``[batch, rows, width]`` of fixed capacity; memory is
planned from the manifest alone and allocated exactly as planned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import ArtifactError, InputError, listing
from ..export.contract.state import STATE_TYPES, StateTensor


def storage(tensor: StateTensor) -> np.dtype[Any]:
    """How numpy stores a tensor's values: as unsigned integers of the same size where it lacks the type."""
    return np.dtype(np.uint16 if tensor.dtype == "bfloat16" else tensor.dtype)


@dataclass(frozen=True)
class StateSpec:
    """All state tensors of a model, in graph order."""

    tensors: tuple[StateTensor, ...]

    @classmethod
    def from_manifest(cls, rows: Any, *, where: str = "manifest") -> StateSpec:
        """Read the ``state`` table of a manifest.

        Raises:
            ArtifactError: a key is missing, of the wrong type or out of range, a dtype is unknown, or
                two tensors share a name; one message lists every finding.
        """
        findings: list[str] = []
        if not isinstance(rows, list):
            raise ArtifactError(f"{where}: 'state' is {type(rows).__name__}; expected a list. Make the bundle again.")
        tensors = [_tensor(row, f"state[{index}]", findings) for index, row in enumerate(rows)]
        if not findings:
            for key in ("name", "input", "output"):
                names = [getattr(tensor, key) for tensor in tensors]
                findings += [
                    f"two tensors have the {key} {name!r}" for name in sorted({n for n in names if names.count(n) > 1})
                ]
        if findings:
            raise ArtifactError(listing(f"{where}: the state table is wrong", findings, "Make the bundle again."))
        return cls(tuple(tensor for tensor in tensors if tensor is not None))


def _tensor(row: Any, label: str, findings: list[str]) -> StateTensor | None:
    if not isinstance(row, dict):
        findings.append(f"{label} is {type(row).__name__}; expected a table")
        return None
    before = len(findings)
    missing = [key for key in StateTensor.__dataclass_fields__ if key not in row]
    if missing:
        findings.append(f"{label} lacks {', '.join(map(repr, missing))}")
        return None
    for key in ("name", "group", "input", "output"):
        if not isinstance(row[key], str) or not row[key]:
            findings.append(f"{label}.{key} is {row[key]!r}; expected a name")
    if (row["num_rows"] is None) == (row["ratio"] is None):
        findings.append(
            f"{label} has num_rows {row['num_rows']!r} and ratio {row['ratio']!r}; expected exactly one of them"
        )
    for key, least in (("layer", 0), ("width", 1), ("num_rows", 1), ("ratio", 1)):
        value = row[key]
        if not (value is None and key in ("num_rows", "ratio")) and (type(value) is not int or value < least):
            findings.append(f"{label}.{key} is {value!r}; expected an integer of {least} or more")
    if row["dtype"] not in STATE_TYPES:
        findings.append(f"{label}.dtype is {row['dtype']!r}; this version knows {', '.join(STATE_TYPES)}")
    if type(row["fill"]) not in (int, float):
        findings.append(f"{label}.fill is {row['fill']!r}; expected a number")
    elif not math.isfinite(row["fill"]) and str(row["dtype"]).endswith("int8"):
        findings.append(f"{label}.fill is {row['fill']!r}; expected a finite number for {row['dtype']}")
    if len(findings) > before:
        return None
    return StateTensor(**{key: row[key] for key in StateTensor.__dataclass_fields__})


def plan_bytes(state: StateSpec, context: int, batch: int = 1) -> dict[str, int]:
    """The exact bytes by group (``window``, ``entries``, ...) that a session of this size allocates.

    Args:
        state: the state tensors of the model.
        context: tokens that one sequence can hold, at least 1.
        batch: sequences, at least 1.
    """
    plan: dict[str, int] = {}
    for tensor in state.tensors:
        plan[tensor.group] = plan.get(tensor.group, 0) + tensor.bytes(context, batch)
    return plan


#: Rows of a slot's state by tensor, [used, width] each; read-only.
Rows = tuple[npt.NDArray[Any], ...]


class Buffers(Protocol):
    """What a session needs from the memory of its state."""

    @property
    def bytes(self) -> int:
        """Bytes allocated."""

    def clear(self, slot: int, tokens: int) -> None:
        """Reset to their first value the rows that ``tokens`` tokens of a sequence may have written."""

    def copy_slot(self, slot: int, tokens: int) -> Rows:
        """Copies of the rows in use if the sequence of the slot holds that many tokens: by tensor [used, width]."""

    def put_slot(self, slot: int, rows: Rows) -> None:
        """Write what :meth:`copy_slot` returned, of this slot or of another."""

    def close(self) -> None:
        """Free the memory; closing twice is fine."""


class StateBuffers:
    """The allocated state: one contiguous array per tensor, at the same address for its whole life."""

    def __init__(self, spec: StateSpec, context: int, batch: int) -> None:
        """Allocate and fill.

        Raises:
            InputError: the machine cannot hold the state.
        """
        self.spec = spec
        try:
            self.arrays = {
                tensor.name: _filled(tensor, (batch, tensor.capacity(context), tensor.width)) for tensor in spec.tensors
            }
        except (MemoryError, ValueError, OverflowError):
            need = sum(plan_bytes(spec, context, batch).values())
            raise InputError(
                f"the state for context {context} and batch {batch} needs {need} bytes ({need / 2**30:.2f} GiB), "
                "which cannot be allocated here. Choose a smaller context or batch."
            ) from None

    @property
    def bytes(self) -> int:
        """Bytes allocated."""
        return sum(array.nbytes for array in self.arrays.values())

    def clear(self, slot: int, tokens: int) -> None:
        """Reset to their first value the rows that ``tokens`` tokens of a sequence may have written."""
        for tensor in self.spec.tensors:
            self.arrays[tensor.name][slot, : tensor.used_rows(tokens)] = fill_value(tensor)

    def copy_slot(self, slot: int, tokens: int) -> Rows:
        """See :class:`Buffers`."""
        return tuple(
            _frozen(self.arrays[tensor.name][slot, : tensor.used_rows(tokens)]) for tensor in self.spec.tensors
        )

    def put_slot(self, slot: int, rows: Rows) -> None:
        """See :class:`Buffers`."""
        for tensor, copy in zip(self.spec.tensors, rows, strict=True):
            self.arrays[tensor.name][slot, : len(copy)] = copy

    def close(self) -> None:
        """Arrays are freed with whatever reads them last."""


def _frozen(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    copy = rows.copy()
    copy.flags.writeable = False
    return copy


def fill_value(tensor: StateTensor) -> Any:
    """The first value of a tensor's rows, in its storage type."""
    if tensor.dtype == "bfloat16":
        # numpy has no bfloat16: the upper half of the float32 pattern is the value rounded towards zero.
        return np.float32(tensor.fill).view(np.uint32) >> np.uint32(16)
    return tensor.fill


def _filled(tensor: StateTensor, shape: tuple[int, int, int]) -> npt.NDArray[Any]:
    if tensor.fill == 0:
        # zeros() takes untouched pages from the system: capacity that is never used costs no memory.
        return np.zeros(shape, storage(tensor))
    return np.full(shape, fill_value(tensor), storage(tensor))
