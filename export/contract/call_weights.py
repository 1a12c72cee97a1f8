"""How many bytes the weights of every call of a model take on a GPU, from its geometry alone. Standard library only.

A weight lies at an address of its own, which is a multiple of ALIGNMENT. With plugins every matrix is taken as stored; norms become
float32. Embedding, head, router and compressors are bfloat16 in every released checkpoint; with plain experts, all matrices are.
"""

from __future__ import annotations

from math import prod

from .geometry import CSA, SLIDING, ModelSpec
from .products import EXACT, Product, head_product, layer_products
from .weights import E2M1, E4M3

#: TensorRT takes addresses that are multiples of this.
ALIGNMENT = 256
_BLOCK, _GROUP = 128, 32  # rows and columns that share a scale of e4m3; columns of e2m1


def aligned(size: int) -> int:
    """Bytes up to the next address that TensorRT takes."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def call_weights(spec: ModelSpec, experts: str, *, plugins: bool = True) -> list[int]:
    """Bytes of the weights of every call: the embedding, each layer, the head.

    Args:
        spec: the geometry.
        experts: format of the routed experts: E2M1 or E4M3, with the other matrices in E4M3 blocks; or plain, in bfloat16.
        plugins: whether plugins read the weights. Else products take theirs in bfloat16 or float32.
    """
    quantised = experts in (E2M1, E4M3)
    streams, mixed = spec.hc_mult, spec.hc_mult * spec.hidden_size
    ends = [_bytes(4, streams, mixed), _bytes(4, streams), _bytes(4, 1), _bytes(4, spec.hidden_size)]
    layers = [
        _layer(spec, kind, ratio, hashed, experts, quantised, plugins)
        for kind, ratio, hashed in zip(spec.layer_types, spec.ratios, spec.hash_layers, strict=True)
    ]
    head = sum(ends) + _product(head_product(spec), quantised, plugins)
    return [_bytes(2, spec.vocab_size, spec.hidden_size), *layers, head]


def _layer(spec: ModelSpec, kind: str, ratio: int, hashed: bool, experts: str, quantised: bool, plugins: bool) -> int:
    hidden, streams, width = spec.hidden_size, spec.hc_mult, spec.head_dim
    mixes = (2 + streams) * streams
    mixing = _bytes(4, mixes, streams * hidden) + _bytes(4, mixes) + _bytes(4, 3)
    total = 2 * mixing + 2 * _bytes(4, hidden) + _bytes(4, spec.num_heads)
    total += _bytes(4, spec.q_lora_rank) + _bytes(4, width)
    total += sum(_product(product, quantised, plugins) for product in layer_products(spec, kind))
    series = 2 if kind == CSA else 1
    for size in ((width,) if kind != SLIDING else ()) + ((spec.index_head_dim,) if kind == CSA else ()):
        total += _bytes(4, ratio, series * size) + _bytes(4, size)
    total += _bytes(2 if plugins else 4, spec.num_experts, hidden)
    total += _bytes(8, spec.vocab_size, spec.experts_per_token) if hashed else _bytes(4, spec.num_experts)
    return total + _experts(spec, experts)


def _experts(spec: ModelSpec, format_: str) -> int:
    count, inner, hidden = spec.num_experts, spec.moe_intermediate_size, spec.hidden_size
    if format_ == E2M1:
        return _bytes(1, count, 3 * inner * hidden // 2) + _bytes(1, count, 3 * inner * hidden // _GROUP)
    if format_ == E4M3:
        return _bytes(1, count, 3 * inner * hidden) + _bytes(1, count, 3 * -(-inner // _BLOCK) * -(-hidden // _BLOCK))
    return _bytes(2, count, 2 * inner, hidden) + _bytes(2, count, hidden, inner)


def _product(product: Product, quantised: bool, plugins: bool) -> int:
    rows, columns = product.rows, product.columns
    if not plugins:
        return _bytes(4 if product.terms == EXACT else 2, rows, columns)
    if quantised and product.released == E4M3:
        return _bytes(1, rows, columns) + _bytes(1, -(-rows // _BLOCK), -(-columns // _BLOCK))
    return _bytes(2, rows, columns)


def _bytes(item: int, *shape: int) -> int:
    return aligned(item * prod(shape))
