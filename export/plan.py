"""How much memory a model's caches take, from its config.json alone. Standard library only.

Row formats are those that deployed engines use (bytes per row; an index row beside each CSA entry):
bfloat16 2 per channel; fp8 584 bytes for a 512-wide row (448 e4m3, 64 bfloat16, 7 scales, 1 pad) with a
132-byte (fp8) or 68-byte (fp4) index row; nvfp4 384 bytes. V3.2 at the same context is the comparison
that the V4 report makes: 61 layers of 656 + 132 bytes per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from foldkv.errors import InputError
from foldkv.export.spec import CSA, SLIDING, ModelSpec
from foldkv.export.state import state_tensors

V32_BYTES_PER_TOKEN = 61 * (656 + 132)
_WIDE_ROW, _INDEX_ROW = 512, 128
# (bytes of a 512-wide row, bytes of a 128-wide index row); None: two or four bytes per channel.
LAYOUTS: dict[str, tuple[int, int] | int] = {
    "float32": 4, "bf16": 2, "fp8": (584, 132), "fp8+fp4": (584, 68), "nvfp4+fp4": (384, 68),
}  # fmt: skip


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
    if layout not in LAYOUTS:
        raise InputError(f"layout {layout!r} is not known; expected one of {', '.join(LAYOUTS)}.")
    if not 1 <= context <= spec.max_position_embeddings:
        raise InputError(f"context is {context}; this model takes 1 to {spec.max_position_embeddings} tokens.")
    if batch < 1:
        raise InputError(f"batch is {batch}; expected at least 1.")
    row = LAYOUTS[layout]
    if not isinstance(row, int) and (spec.head_dim, spec.index_head_dim) != (_WIDE_ROW, _INDEX_ROW):
        raise InputError(
            f"layout {layout} is defined for rows of {_WIDE_ROW} and {_INDEX_ROW} channels; this model has "
            f"{spec.head_dim} and {spec.index_head_dim}. Use float32 or bf16."
        )
    groups: dict[str, int] = {}
    growing = 0
    for tensor in state_tensors(spec):
        index = tensor.group.startswith("index")
        per_row = tensor.width * 4 if "carry" in tensor.group else _row_bytes(row, tensor.width, index=index)
        size = batch * tensor.capacity(context) * per_row
        groups[tensor.group] = groups.get(tensor.group, 0) + size
        growing += size if tensor.ratio else 0
    return MemoryPlan(layout, context, batch, groups, growing, batch * context * V32_BYTES_PER_TOKEN)


def _row_bytes(row: tuple[int, int] | int, width: int, *, index: bool) -> int:
    return row * width if isinstance(row, int) else row[1 if index else 0]


def weight_bytes(spec: ModelSpec, layout: str) -> int:
    """Bytes of the weights that go with a row layout: as wide as its rows for "float32" and "bf16"; with the quantised
    layouts, as released: 4.25 bits per weight of a routed expert (e2m1, one e8m0 scale per 32), bfloat16 embedding and
    head, 8 bits for the rest. Scales of 128 x 128 blocks and float32 vectors are below a thousandth and left out.
    """
    total, row = parameter_count(spec), LAYOUTS[layout]
    if isinstance(row, int):
        return row * total
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
