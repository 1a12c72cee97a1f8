"""How much memory a model takes, from its config.json alone: caches, weights, activations. Standard library only.

Row formats are those of deployed engines (export/contract/rows.py), and dense rows in float32 and bfloat16.
The V4 report compares with V3.2 at the same context: 61 layers of 656 + 132 bytes per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from .contract.geometry import CSA, HCA, SLIDING, ModelSpec
from .contract.layouts import BUILT, LAYOUTS
from .contract.rows import DENSE
from .contract.state import STATE_TYPES, state_tensors

V32_BYTES_PER_TOKEN = 61 * (656 + 132)
_DENSE_TYPES = {"float32": "float32", "bf16": "bfloat16"}  # of the channels
#: Row formats of engines and bundles; all other planned formats belong to other systems.
OFFERED = (*_DENSE_TYPES, *(name for name in BUILT if name != DENSE))
PLANNED = (*_DENSE_TYPES, *(name for name in LAYOUTS if name != DENSE))
#: The most sequences, and the most tokens of a sequence at once: both are y and z dimensions of kernels' grids
#: (plugins/launch.py), where CUDA allows 65,535.
LARGEST_BATCH = LARGEST_CHUNK = 65_535


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes per cache group and in total, for one context and batch; ``growing`` is the part that grows with the context."""

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
        """The growing caches divided by V3.2's fp8 cache at the same context, as in the V4 report."""
        return self.growing / self.v32

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON values; all sizes in bytes."""
        return {
            "layout": self.layout, "context": self.context, "batch": self.batch, "groups": self.groups,
            "total": self.total, "growing": self.growing, "v3.2_fp8": self.v32, "share_of_v3.2": self.share_of_v32,
        }  # fmt: skip


def check_sizes(batch: int, chunk: int = 1) -> None:
    """Check that an engine could take this many sequences, and this many tokens of each at once.

    Raises:
        InputError: less than 1, or more than a kernel launch allows.
    """
    for name, size, largest in (("batch", batch, LARGEST_BATCH), ("chunk", chunk, LARGEST_CHUNK)):
        if not 1 <= size <= largest:
            raise InputError(f"{name} is {size:,}; expected 1 to {largest:,}.")


def plan_memory(spec: ModelSpec, *, context: int, batch: int = 1, layout: str = "fp8+fp4") -> MemoryPlan:
    """The cache bytes of a model for ``context`` tokens per sequence and ``batch`` sequences.

    Carries stay float32 in every layout, as in engines.

    Raises:
        InputError: an unknown layout, a context out of range, or a layout whose rows this model does not have.
    """
    if layout not in PLANNED:
        raise InputError(f"layout {layout!r} is not known; expected one of {', '.join(PLANNED)}.")
    if not 1 <= context <= spec.max_position_embeddings:
        raise InputError(f"context is {context}; this model takes 1 to {spec.max_position_embeddings} tokens.")
    check_sizes(batch)
    groups: dict[str, int] = {}
    growing = 0
    rows = LAYOUTS[DENSE if layout in _DENSE_TYPES else layout]
    for tensor in state_tensors(spec):
        size = rows.stored(tensor, spec.rope_dim, _DENSE_TYPES.get(layout, "bfloat16")).bytes(context, batch)
        groups[tensor.group] = groups.get(tensor.group, 0) + size
        growing += size if tensor.ratio else 0
    return MemoryPlan(layout, context, batch, groups, growing, batch * context * V32_BYTES_PER_TOKEN)


def weight_bytes(spec: ModelSpec, layout: str) -> int:
    """Bytes of the weights that go with a row layout. For "float32" and "bf16" they are as wide as the rows. For the
    quantised layouts they are as released: 4.25 bits per weight of a routed expert (e2m1, one e8m0 scale per 32), bfloat16
    embedding and head, 8 bits for the rest. Scales of 128 x 128 blocks and float32 vectors are below a thousandth and not
    counted.
    """
    groups = parameter_groups(spec)
    if layout in _DENSE_TYPES:
        return STATE_TYPES[_DENSE_TYPES[layout]].item_bytes * sum(groups.values())
    return groups["experts"] * 17 // 32 + 2 * groups["ends"] + groups["projections"] + groups["precise"]


def parameter_count(spec: ModelSpec) -> int:
    """Parameters of the decoder (without the draft head)."""
    return sum(parameter_groups(spec).values())


def parameter_groups(spec: ModelSpec) -> dict[str, int]:
    """Parameters by how formats treat them: routed ``experts``; ``projections`` of attention and shared experts; the
    ``ends`` (embedding and head); and ``precise`` ones, which engines keep in float32 (optimize/passes/lower.py).
    """
    hidden, heads, inner = spec.hidden_size, spec.num_heads * spec.head_dim, spec.moe_intermediate_size
    projections = hidden * spec.q_lora_rank + spec.q_lora_rank * heads + hidden * spec.head_dim
    projections += heads * spec.o_lora_rank + spec.o_groups * spec.o_lora_rank * hidden + 3 * hidden * inner
    precise = hidden + spec.hc_mult * (spec.hc_mult * hidden + 1) + 1
    precise += sum(
        _precise_of_layer(spec, kind, ratio) for kind, ratio in zip(spec.layer_types, spec.ratios, strict=True)
    )
    precise += sum(0 if hashed else spec.num_experts for hashed in spec.hash_layers)
    return {
        "experts": spec.num_layers * spec.num_experts * 3 * hidden * inner,
        "projections": spec.num_layers * projections,
        "ends": 2 * spec.vocab_size * hidden,
        "precise": precise,
    }


def _precise_of_layer(spec: ModelSpec, kind: str, ratio: int) -> int:
    hidden, mix = spec.hidden_size, (2 + spec.hc_mult) * spec.hc_mult
    total = spec.q_lora_rank + spec.head_dim + spec.num_heads + 2 * hidden  # norms and sinks
    total += 2 * (mix * spec.hc_mult * hidden + mix + 3) + spec.num_experts * hidden
    for width, present in ((spec.head_dim, kind != SLIDING), (spec.index_head_dim, kind == CSA)):
        series = width * (2 if kind == CSA else 1)
        total += (2 * hidden * series + ratio * series + width) if present else 0
    if kind == CSA:
        total += spec.q_lora_rank * spec.index_heads * spec.index_head_dim + hidden * spec.index_heads
    return total


def table_bytes(spec: ModelSpec) -> int:
    """Bytes of the hash layers' tables from token id to experts, int64 in every format."""
    return 8 * sum(spec.hash_layers) * spec.vocab_size * spec.experts_per_token


@dataclass(frozen=True)
class Activations:
    """Bytes in use in a layer at its three peaks, beside the residual ``streams``.

    ``rounds`` says whether an engine processes the experts of a few tokens at a time, in a loop.
    """

    streams: int
    experts: int
    attention: int
    mixing: int
    rounds: bool = False

    @property
    def largest(self) -> str:
        """The name of the highest peak."""
        moments = {"experts": self.experts, "attention": self.attention, "mixing": self.mixing}
        return max(moments, key=moments.__getitem__)

    def total(self, *, reuse: bool) -> int:
        """Bytes to plan for. Engines reuse the memory of their tensors (``reuse``), except that tensors of a loop share none with
        tensors outside of it. ONNX Runtime's arena keeps the regions of one peak; the larger tensors of another do not fit."""
        if not reuse:
            return self.streams + self.experts + self.attention + self.mixing
        other = max(self.attention, self.mixing)
        return self.streams + (self.experts + other if self.rounds else max(self.experts, other))


def activations(
    spec: ModelSpec, *, context: int, batch: int = 1, chunk: int = 256, plugins: bool = False, weight_item: int = 4,
    room: int | None = None,
) -> Activations:  # fmt: skip
    """Memory that a chunk needs besides weights and caches while it goes through a layer: an estimate from sizes.

    With T = batch x chunk tokens, A = context / ratio active entries and float32 values:

    * experts: the weights of k experts for each of up to :func:`gathered_tokens` tokens, k 3 I C values of ``weight_item``
      bytes, because both matrices are gathered before the first product. Packed experts are decoded for one token at a
      time, which is less, and so is what the plugin of the routed experts takes, T k (4 C + 2 I): both are counted alike;
    * attention, the largest of
      CSA's indexer: a product and its ReLU, T Hi A each, the scores T A and the entries B A Di; the entries twice while
      they are turned;
      CSA's attention: K chosen entries per token, gathered and masked, 2 T K D, three copies of the logits
      T H (W + S + K) around the softmax, and the queries T H D twice;
      HCA's attention: the entries twice, 2 B A D, the logits T H (W + S + A) and the queries likewise.
      Plugins keep logits and products in registers: only the scores T A and the queries remain;
    * mixing: the residual streams after a block, two more times T N C.

    The cpu bundle reads caches in blocks of ``room`` scores and processes one expert after the other (optimize/passes/). There:

    * experts: the 3 I C weights of one expert and its tokens, at most all of them, T (2 C + 4 I);
    * attention: four copies of the logits, where HCA's entries count as one block. The indexer is added: a
      block of the product and its ReLU, and twice a block of entries.

    ``benchmarks/activations.py`` compares this with the memory of ONNX Runtime and with the regions that TensorRT-RTX plans.

    Args:
        spec: the model.
        context: tokens per sequence that are in the caches.
        batch: sequences.
        chunk: tokens of a sequence that go through the model at once.
        plugins: whether plugins, and not function bodies, compute the operators on compressed KV.
        weight_item: bytes of a gathered expert weight.
        room: elements of a block of the cpu bundle (optimize/passes/blocks.py); None for engines.
    """
    chunk = min(chunk, context)
    tokens = batch * chunk
    streams = 4 * tokens * spec.hc_mult * spec.hidden_size
    weights = 3 * spec.moe_intermediate_size * spec.hidden_size
    kinds = [
        (kind, context // ratio if ratio else 0)
        for kind, ratio in dict.fromkeys(zip(spec.layer_types, spec.ratios, strict=True))
    ]
    at_once = gathered_tokens(spec, weight_item) if room is None else tokens
    if room is None:
        experts = weight_item * min(tokens, at_once) * spec.experts_per_token * weights
        attention = max(_attention_bytes(spec, kind, active, batch, chunk, plugins) for kind, active in kinds)
    else:
        experts = weight_item * weights + 4 * tokens * (2 * spec.hidden_size + 4 * spec.moe_intermediate_size)
        attention = max(_block_attention_bytes(spec, kind, active, batch, chunk, room) for kind, active in kinds)
    return Activations(streams, experts, attention, 2 * streams, rounds=tokens > at_once)


#: Bytes of experts' weights that an engine gathers at once: in bfloat16 for 3 tokens of V4-Flash or 1 of V4-Pro. That is
#: enough for a round to be worth its launches; small models process a whole chunk at once.
EXPERT_ROOM = 1 << 30


def gathered_tokens(spec: ModelSpec, weight_item: int) -> int:
    """The number of tokens whose experts' weights (``weight_item`` bytes each) an engine gathers at once; at least one."""
    weights = spec.experts_per_token * 3 * spec.moe_intermediate_size * spec.hidden_size
    return max(1, EXPERT_ROOM // (weight_item * weights))


def _block_attention_bytes(spec: ModelSpec, kind: str, active: int, batch: int, chunk: int, room: int) -> int:
    """Bytes of one attention layer that reads its entries in blocks: ONNX Runtime keeps the memory of indexer and attention."""
    tokens = batch * chunk
    queries = 2 * 4 * tokens * spec.num_heads * spec.head_dim
    chosen = spec.index_topk if kind == CSA else 0
    attend = queries + 4 * 4 * tokens * spec.num_heads * (spec.sliding_window + chunk + chosen)
    if kind == SLIDING:
        return attend
    heads, width = (spec.index_heads, spec.index_head_dim) if kind == CSA else (spec.num_heads, spec.head_dim)
    scores = min(tokens * heads * active, max(room, tokens * heads * block_rows(chosen)))
    block = 2 * 4 * (scores + batch * min(active * width, room))
    return attend + block + 2 * 4 * tokens * chosen * spec.head_dim


#: Elements of a block of scores, and of a block of entries, if caches are read in blocks: 4 MiB in float32. Smaller blocks
#: start more nodes; larger ones do not fit in the processor's cache (measured from 2 ** 18 to 2 ** 20 at a million tokens).
BLOCK_ROOM = 1 << 20


def block_rows(chosen: int) -> int:
    """The fewest entries of a block, for any number of queries: a block smaller than the choice would repeat comparisons."""
    return max(128, 4 * chosen)


def _attention_bytes(spec: ModelSpec, kind: str, active: int, batch: int, chunk: int, plugins: bool) -> int:
    """Bytes at the peak of one attention layer with that many active entries."""
    tokens = batch * chunk
    queries = 2 * 4 * tokens * spec.num_heads * spec.head_dim
    scores = 4 * tokens * active
    if plugins:
        return queries + (scores if kind == CSA else 0)
    seen = spec.sliding_window + chunk + {SLIDING: 0, CSA: spec.index_topk, HCA: active}[kind]
    attend = queries + 3 * 4 * tokens * spec.num_heads * seen
    if kind == SLIDING:
        return attend
    if kind == HCA:
        return attend + 2 * 4 * batch * active * spec.head_dim
    entries, products = 4 * batch * active * spec.index_head_dim, 4 * tokens * spec.index_heads * active
    chosen = 2 * 4 * tokens * spec.index_topk * spec.head_dim
    return max(2 * entries, entries + 2 * products + scores, attend + chosen)
