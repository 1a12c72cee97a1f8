"""The state: the compressed caches as a list of fixed-capacity tensors, and their types. Standard library only.

Every tensor has the shape ``[batch, rows, width]``. A ring keeps the row of position ``p`` at slot
``p mod rows``. Row ``i`` of ``entries`` is the entry of tokens ``[i * ratio, (i + 1) * ratio)``; it is
written when that window closes. For an open window, CSA carries the tokens' rows, as rings, and HCA carries the three rows
of an online softmax (operators/compress_online.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .geometry import CSA, SLIDING, ModelSpec

#: Rows of an open window that does not overlap: largest score, sum of weights, weighted sum (operators/compress_online.py).
ONLINE_ROWS = 3


@dataclass(frozen=True)
class StateType:
    """A type of the state's values: bytes of one value, its number in ONNX (``TensorProto.DataType``), its name there."""

    item_bytes: int
    onnx_type: int
    onnx_name: str


#: The types that a state tensor can have; int8 and uint8 also hold packed rows (rows.py).
STATE_TYPES = {
    "float32": StateType(4, 1, "tensor(float)"),
    "bfloat16": StateType(2, 16, "tensor(bfloat16)"),
    "int8": StateType(1, 3, "tensor(int8)"),
    "uint8": StateType(1, 2, "tensor(uint8)"),
}


@dataclass(frozen=True)
class StateTensor:
    """One cache tensor of one layer: ``[batch, num_rows, width]``; ``num_rows`` grows with the context if ``ratio`` is set."""

    name: str
    layer: int
    group: str
    input: str
    output: str
    num_rows: int | None
    ratio: int | None
    width: int
    dtype: str = "float32"
    fill: float = 0.0

    def capacity(self, context: int) -> int:
        """Rows for a context of that many tokens: fixed, or ceil(context / ratio)."""
        return self.num_rows if self.num_rows is not None else -(-context // (self.ratio or 1))

    def used_rows(self, tokens: int) -> int:
        """Rows that may be in use after this many tokens of a sequence."""
        return self.capacity(tokens)

    def bytes(self, context: int, batch: int = 1) -> int:
        """Bytes of the tensor for a context (tokens) and a batch (sequences)."""
        return batch * self.capacity(context) * self.width * STATE_TYPES[self.dtype].item_bytes

    def to_dict(self) -> dict[str, Any]:
        """The fields as a manifest row."""
        return asdict(self)


def state_tensors(spec: ModelSpec) -> list[StateTensor]:
    """The state of a model in float32, in graph order: layer by layer, window first."""
    tensors: list[StateTensor] = []
    for layer, (kind, ratio) in enumerate(zip(spec.layer_types, spec.ratios, strict=True)):
        tensors.append(_tensor(layer, "window", spec.head_dim, num_rows=spec.sliding_window))
        if kind == SLIDING:
            continue
        if kind == CSA:
            tensors += _overlapping(layer, "", ratio, spec.head_dim)
            tensors += _overlapping(layer, "index_", ratio, spec.index_head_dim)
        else:
            tensors.append(_tensor(layer, "entries", spec.head_dim, ratio=ratio))
            tensors.append(_tensor(layer, "carry", spec.head_dim, num_rows=ONLINE_ROWS))
    return tensors


def _overlapping(layer: int, prefix: str, ratio: int, width: int) -> list[StateTensor]:
    # An overlapping window also reads the rows of the window before it, in two series.
    return [
        _tensor(layer, f"{prefix}entries", width, ratio=ratio),
        _tensor(layer, f"{prefix}carry_kv", 2 * width, num_rows=2 * ratio),
        _tensor(layer, f"{prefix}carry_gate", 2 * width, num_rows=2 * ratio),
    ]


def _tensor(
    layer: int, group: str, width: int, *, num_rows: int | None = None, ratio: int | None = None
) -> StateTensor:
    name = f"{layer}.{group}"
    return StateTensor(name, layer, group, f"past.{name}", f"present.{name}", num_rows, ratio, width)


def total_bytes(tensors: Sequence[StateTensor], context: int, batch: int = 1) -> int:
    """Bytes of all tensors together."""
    return sum(tensor.bytes(context, batch) for tensor in tensors)
