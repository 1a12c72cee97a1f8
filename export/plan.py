"""How much memory a model's caches take, from its config.json alone. Standard library only.

Row formats are those that deployed engines use (export/layouts.py), and dense rows in float32 and bfloat16.
V3.2 at the same context is the comparison that the V4 report makes: 61 layers of 656 + 132 bytes per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from foldkv.errors import InputError
from foldkv.export.layouts import DENSE, LAYOUTS, row_bytes
from foldkv.export.spec import CSA, SLIDING, ModelSpec
from foldkv.export.state import StateTensor, state_tensors

V32_BYTES_PER_TOKEN = 61 * (656 + 132)
_DENSE_ITEMS = {"float32": 4, "bf16": 2}  # bytes of a channel
PLANNED = (*_DENSE_ITEMS, *(name for name in LAYOUTS if name != DENSE))


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes per cache group and in total, for one context and batch; ``growing`` is the part that follows the context."""

    layout: str
    context: int
    batch: int
    groups: dict[str, int]
    growing: int
    v32: int

    @property
    def total(self) -> int:
        """Bytes of all groups."""
        return sum(self.groups.values())

    @property
    def share_of_v32(self) -> float:
        """The growing caches over V3.2's fp8 cache at the same context, as the V4 report compares them."""
        return self.growing / self.v32

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON values; all sizes in bytes."""
        return {
            "layout": self.layout, "context": self.context, "batch": self.batch, "groups": self.groups,
            "total": self.total, "growing": self.growing, "v3.2_fp8": self.v32, "share_of_v3.2": self.share_of_v32,
        }  # fmt: skip


def plan_memory(spec: ModelSpec, *, context: int, batch: int = 1, layout: str = "fp8+fp4") -> MemoryPlan:
    """The cache bytes of a model for ``context`` tokens per sequence and ``batch`` sequences.

    Carries stay float32 in every layout, as engines keep them.

    Raises:
        InputError: an unknown layout, a context out of range, or a layout whose rows this model does not have.
    """
    if layout not in PLANNED:
        raise InputError(f"layout {layout!r} is not known; expected one of {', '.join(PLANNED)}.")
    if not 1 <= context <= spec.max_position_embeddings:
        raise InputError(f"context is {context}; this model takes 1 to {spec.max_position_embeddings} tokens.")
    if batch < 1:
        raise InputError(f"batch is {batch}; expected at least 1.")
    groups: dict[str, int] = {}
    growing = 0
    for tensor in state_tensors(spec):
        size = batch * tensor.capacity(context) * _row_bytes(spec, tensor, layout)
        groups[tensor.group] = groups.get(tensor.group, 0) + size
        growing += size if tensor.ratio else 0
    return MemoryPlan(layout, context, batch, groups, growing, batch * context * V32_BYTES_PER_TOKEN)


def _row_bytes(spec: ModelSpec, tensor: StateTensor, layout: str) -> int:
    dense = layout in _DENSE_ITEMS
    format_ = LAYOUTS[DENSE if dense else layout].format_of(tensor.group)
    if format_ is None:
        return tensor.width * 4
    return row_bytes(format_, tensor.width, spec.rope_dim, _DENSE_ITEMS.get(layout, 2))


def weight_bytes(spec: ModelSpec, layout: str) -> int:
    """Bytes of the weights that go with a row layout: as wide as its rows for "float32" and "bf16"; with the quantised
    layouts, as released: 4.25 bits per weight of a routed expert (e2m1, one e8m0 scale per 32), bfloat16 embedding and
    head, 8 bits for the rest. Scales of 128 x 128 blocks and float32 vectors are below a thousandth and left out.
    """
    total = parameter_count(spec)
    if layout in _DENSE_ITEMS:
        return _DENSE_ITEMS[layout] * total
    experts = spec.num_layers * spec.num_experts * 3 * spec.hidden_size * spec.moe_intermediate_size
    ends = 2 * spec.vocab_size * spec.hidden_size
    return experts * 17 // 32 + 2 * ends + (total - experts - ends)


def parameter_count(spec: ModelSpec) -> int:
    """Parameters of the decoder (without the draft head)."""
    hidden, heads = spec.hidden_size, spec.num_heads * spec.head_dim
    total = 2 * spec.vocab_size * hidden + hidden + spec.hc_mult * (spec.hc_mult * hidden + 1) + 1
    mix = (2 + spec.hc_mult) * spec.hc_mult
    for kind, ratio in zip(spec.layer_types, spec.ratios, strict=True):
        total += hidden * spec.q_lora_rank + spec.q_lora_rank * (heads + 1) + hidden * spec.head_dim + spec.head_dim
        total += heads * spec.o_lora_rank + spec.o_groups * spec.o_lora_rank * hidden + spec.num_heads + 2 * hidden
        total += 2 * (mix * spec.hc_mult * hidden + mix + 3)
        total += (spec.num_experts + 1) * 3 * hidden * spec.moe_intermediate_size + spec.num_experts * hidden
        for width, present in ((spec.head_dim, kind != SLIDING), (spec.index_head_dim, kind == CSA)):
            series = width * (2 if kind == CSA else 1)
            total += (2 * hidden * series + ratio * series + width) if present else 0
        if kind == CSA:
            total += spec.q_lora_rank * spec.index_heads * spec.index_head_dim + hidden * spec.index_heads
    total += sum(0 if hashed else spec.num_experts for hashed in spec.hash_layers)
    return total
