"""The values of a checkpoint's weights, a layer or a few experts at a time, for references that hold no more."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..export.checkpoint.formats import PLAIN
from ..export.checkpoint.names import scale_name
from ..export.checkpoint.reader import Checkpoint
from ..export.checkpoint.values import dequantised, read_tensor
from ..export.loading import weight_value
from ..export.tensor_table import check_tensors, expert_parts

#: Bytes of float32 weights of experts that are held at once.
GROUP_BYTES = 1 << 30


class LayerWeights:
    """Reads and dequantises weights when they are asked for."""

    def __init__(self, checkpoint: Checkpoint, *, group_bytes: int = GROUP_BYTES) -> None:
        """Check the checkpoint's tensors; no weight is read.

        Args:
            checkpoint: the checkpoint, opened.
            group_bytes: bytes of float32 weights of experts that are held at once; at least one expert is.

        Raises:
            CheckpointError: tensors are missing, unexpected or of a wrong shape.
        """
        check_tensors(checkpoint)
        self.checkpoint = checkpoint
        spec = checkpoint.spec
        #: Experts of a group.
        self.experts_at_once = max(1, group_bytes // (12 * spec.moe_intermediate_size * spec.hidden_size))

    @property
    def identity(self) -> list[object]:
        """What values depend on, and how they are grouped."""
        return [self.checkpoint.identity(), self.checkpoint.files_identity(), self.experts_at_once]

    def value(self, name: str) -> Tensor:
        """A tensor by its released name, in float32 or int64.

        Raises:
            CheckpointError: it cannot be read, or its scale is NaN, infinite or not above zero.
        """
        value = weight_value(self.checkpoint, name)
        return value.float() if value.is_floating_point() else value.long()

    def experts(self, layer: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """The weights of some experts of a layer: [E, 2 I, C] and [E, C, I], float32."""
        found = []
        for kind in ("w13", "w2"):
            name = f"layers.{layer}.ffn.experts.{kind}"
            parts = expert_parts(name, self.checkpoint)
            if not parts:
                found.append(self._stacked(name, start, end))
                continue
            spec = self.checkpoint.spec
            inner, outer = spec.moe_intermediate_size, spec.hidden_size
            stack = torch.empty((end - start, *((2 * inner, outer) if kind == "w13" else (outer, inner))))
            for part, (expert, rows) in parts.items():
                assert isinstance(expert, int)
                if start <= expert < end:
                    stack[expert - start, rows] = self.value(part)
            found.append(stack)
        return found[0], found[1]

    def groups(self, wanted: set[int]) -> list[tuple[int, int]]:
        """First and last number, plus one, of the groups of experts that have some of those wanted."""
        count, size = self.checkpoint.spec.num_experts, self.experts_at_once
        every = [(start, min(start + size, count)) for start in range(0, count, size)]
        return [(start, end) for start, end in every if wanted & set(range(start, end))]

    def layer_bytes(self, layer: int) -> int:
        """Bytes of a layer's tensors in the checkpoint."""
        prefix = f"layers.{layer}."
        return sum(one.bytes for name, one in self.checkpoint.headers.items() if name.startswith(prefix))

    def _stacked(self, name: str, start: int, end: int) -> Tensor:
        """Some experts of a tensor that has all of a layer; no other bytes are read."""
        weight, form = self._some(name, start, end), self.checkpoint.format(name)
        if form is None or form.name == PLAIN:
            return weight.float()
        return dequantised(weight, self._some(scale_name(name), start, end), form)

    def _some(self, name: str, start: int, end: int) -> Tensor:
        stored = self.checkpoint.headers[name]
        size = stored.bytes // stored.shape[0]
        return read_tensor(
            dataclasses.replace(
                stored, offset=stored.offset + start * size, bytes=(end - start) * size,
                shape=(end - start, *stored.shape[1:]),
            )
        )  # fmt: skip
