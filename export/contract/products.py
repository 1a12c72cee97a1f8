"""The products whose weights plugins read as stored: which weights, in how many groups, how exactly. Standard library only.

What is not here stays as it is: routed experts, their router and the streams' mixing, which are operators of their own, and the
embedding, of which a step reads single rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from .geometry import CSA, SLIDING, ModelSpec
from .weights import BFLOAT16, E4M3

#: Terms of activations (export/operators/linear.py): rounded to bfloat16, or with float32's accuracy.
ROUNDED, EXACT = 1, 3


@dataclass(frozen=True)
class Product:
    """A weight and what it is multiplied with.

    Attributes:
        role: of the weight, within its layer if it is in one, as in released checkpoints.
        rows: of the weight.
        columns: of the weight.
        terms: of the activations: ROUNDED for the large projections, EXACT for what engines otherwise compute in float32:
            the compressor and the indexer.
        released: format of the weight in released checkpoints.
        groups: of rows that each meet their own part of the activations.
    """

    role: str
    rows: int
    columns: int
    terms: int = ROUNDED
    released: str = E4M3
    groups: int = 1


def layer_products(spec: ModelSpec, kind: str) -> tuple[Product, ...]:
    """The products of a layer, in the order in which a layer computes them.

    Args:
        spec: of the model.
        kind: of the layer's attention.
    """
    hidden, rank, width = spec.hidden_size, spec.q_lora_rank, spec.head_dim
    heads, grouped, inner = spec.num_heads * width, spec.o_groups * spec.o_lora_rank, spec.moe_intermediate_size
    found = [
        Product("attn.wq_a.weight", rank, hidden), Product("attn.wq_b.weight", heads, rank),
        Product("attn.wkv.weight", width, hidden),
    ]  # fmt: skip
    series = 2 if kind == CSA else 1  # CSA's entries overlap
    if kind != SLIDING:
        found += _compressor("attn", series * width, hidden)
    if kind == CSA:
        found += [
            Product("attn.indexer.wq_b.weight", spec.index_heads * spec.index_head_dim, rank, EXACT),
            Product("attn.indexer.weights_proj.weight", spec.index_heads, hidden, EXACT, BFLOAT16),
            *_compressor("attn.indexer", series * spec.index_head_dim, hidden),
        ]
    return (
        *found,
        Product("attn.wo_a.weight", grouped, heads // spec.o_groups, groups=spec.o_groups),
        Product("attn.wo_b.weight", hidden, grouped),
        Product("ffn.shared_experts.w1.weight", inner, hidden),
        Product("ffn.shared_experts.w2.weight", hidden, inner),
        Product("ffn.shared_experts.w3.weight", inner, hidden),
    )


def head_product(spec: ModelSpec) -> Product:
    """The product that gives the logits."""
    return Product("head.weight", spec.vocab_size, spec.hidden_size, released=BFLOAT16)


def all_products(spec: ModelSpec) -> tuple[Product, ...]:
    """The different products of a model: those of every kind of layer, then the head's."""
    kinds = dict.fromkeys(spec.layer_types)
    return tuple(dict.fromkeys([*(one for kind in kinds for one in layer_products(spec, kind)), head_product(spec)]))


def _compressor(owner: str, rows: int, hidden: int) -> list[Product]:
    return [Product(f"{owner}.compressor.{name}.weight", rows, hidden, EXACT, BFLOAT16) for name in ("wkv", "wgate")]
