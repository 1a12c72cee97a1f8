"""A second implementation of the profile ``served``, for a whole prompt at once, in plain PyTorch.

It follows the released inference code and the row formats, and is independent of the operators: RoPE is a product of
complex numbers, the Hadamard rotation a butterfly, a quantised value the nearest code of a list, every query looks at every key
through a mask, and experts answer one after the other. It shares with the exported model only what the profiles do not change: the
weights, the router, the shared expert and the hyper-connections. It computes in float32; among equal index scores it chooses the lowest entry.

The released code rounds some intermediate results to bfloat16 (index scores, query norms, the rotation). This module does
not: engines disagree on them, and keep them in float32 where they can. Two things that deployed systems round beside the profile
can be asked for (:class:`Rounding`), so that their distance from a bundle can be measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from .checkpoint import formats
from .checkpoint.reader import Checkpoint
from .contract.geometry import CSA, SLIDING, ModelSpec
from .model.attention import Attention
from .model.compressor import Compressor
from .model.decoder import Decoder, Layer
from .model.hyper_connections import collapse, collapse_last, expand
from .model.indexer import Indexer
from .model.norm import split_last

_LEAST = 1e-4  # floor of a tile's largest magnitude (export/operators/rows.py has its source)
#: Magnitudes of the codes in order: the code of a magnitude is its index.
E4M3 = torch.tensor(
    [m / 8 * 2.0**-6 for m in range(8)] + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1],
    dtype=torch.float64,
)
E2M1 = torch.tensor(formats.E2M1[:8], dtype=torch.float64)


#: Channels of an activation that share a scale in front of a product with quantised weights.
ACTIVATION_TILE = 128
_EXPERTS = ".experts"


@dataclass(frozen=True)
class Rounding:
    """What is rounded beside the profile, as in the released code.

    Attributes:
        rows: window rows and entries are rounded to bfloat16 before they are quantised to e4m3.
        activations: modules whose inputs are quantised to e4m3 in tiles of 128 with a power of two each: linears by name
            (``layers.0.attn.wq_a``), and routed experts by the name of their stack (``layers.0.ffn.experts``). See
            :func:`quantised_modules`.
    """

    rows: bool = False
    activations: Collection[str] = ()


NO_ROUNDING = Rounding()


def quantised_modules(checkpoint: Checkpoint) -> list[str]:
    """The modules whose weights the checkpoint stores in e4m3 or e2m1 and whose inputs the released code quantises.

    That is all of them in layers but ``wo_a``, which the released code dequantises to bfloat16 when it loads.
    """
    found = dict[str, None]()
    for name in checkpoint.headers:
        module = name.removesuffix(".weight")
        stored = checkpoint.format(name) if module != name else None
        left_out = not module.startswith("layers.") or module.endswith(".wo_a")
        if stored is not None and stored.name != formats.PLAIN and not left_out:
            found[module.split(f"{_EXPERTS}.")[0] + _EXPERTS if f"{_EXPERTS}." in module else module] = None
    return list(found)


@dataclass
class OracleRun:
    """The results for one prompt.

    Attributes:
        logits: [n, V] float32.
        streams: residual streams [n, N, C] after every layer.
        caches: by ``{layer}.{group}``, the quantised rows of every position ("window") and of every entry.
        chosen: by CSA layer, [n, entries] bool: the entries that each query attends to.
    """

    logits: Tensor
    streams: list[Tensor] = field(default_factory=list)
    caches: dict[str, Tensor] = field(default_factory=dict)
    chosen: dict[int, Tensor] = field(default_factory=dict)


def served_forward(
    decoder: Decoder,
    tokens: Tensor,
    *,
    given: Sequence[Tensor] | None = None,
    keys: Mapping[int, Tensor] | None = None,
    rounding: Rounding = NO_ROUNDING,
) -> OracleRun:
    """Run a prompt through the served model.

    Args:
        decoder: has the weights; its own profile does not matter.
        tokens: [n] int64.
        given: streams [n, N, C] after every layer, which every later layer takes instead of those that the one before it made.
        keys: by CSA layer, values of index rows [entries, D] that its indexer takes instead of its own.
        rounding: what is rounded beside the profile.
    """
    run = OracleRun(torch.empty(0))
    streams = decoder.embed(tokens)[:, None].expand(-1, decoder.spec.hc_mult, -1)
    for index, layer in enumerate(decoder.layers):
        assert isinstance(layer, Layer)
        if given is not None and index:
            streams = given[index - 1]
        own = None if keys is None else keys.get(index)
        asked = until_experts(layer, index, streams, tokens, run, keys=own, rounding=rounding)
        for expert in asked.wanted:
            asked.answer(expert, layer.ffn.experts.w13[expert], layer.ffn.experts.w2[expert])
        streams = after_experts(layer, index, asked, rounding=rounding)
        run.streams.append(streams)
    run.logits = head_logits(decoder, streams)
    return run


def head_logits(head: Decoder, streams: Tensor) -> Tensor:
    """Streams [n, N, C] after the last layer -> logits [n, V]. Of ``head`` only what is behind the layers is used."""
    last = collapse_last(streams[None], head.hc_head_fn, head.hc_head_base, head.hc_head_scale, head.spec)
    logits: Tensor = functional.linear(head.norm(last)[0], head.head.weight)
    return logits


@dataclass
class Asked:
    """A text between the two halves of a layer: what its experts are asked, and have answered.

    Attributes:
        streams: [n, N, C] after attention.
        post, comb: how the streams take up what the experts answer.
        x: [n, C] that all experts read.
        chosen, weights: [n, K] experts of each token, and what each weighs.
        limit: of the clamps of SwiGLU.
        quantised: whether the inputs of products are quantised.
        answers: [n, K, C], weighted, as far as they are there.
    """

    streams: Tensor
    post: Tensor
    comb: Tensor
    x: Tensor
    chosen: Tensor
    weights: Tensor
    limit: float
    quantised: bool
    answers: Tensor

    @property
    def wanted(self) -> list[int]:
        """The experts that some token chose."""
        return sorted(set(self.chosen.flatten().tolist()))

    def answer(self, expert: int, w13: Tensor, w2: Tensor) -> None:
        """Let one expert, w13 [2 I, C] (gate over up) and w2 [C, I], answer every token that chose it.

        The released code multiplies a hidden value by its expert's weight before it quantises the second product's input.
        """
        token, place = torch.where(self.chosen == expert)
        if not len(token):
            return
        weight, x = self.weights[token, place, None], self.x[token]
        gate, up = functional.linear(quantize_activation(x) if self.quantised else x, w13).chunk(2, dim=-1)
        hidden = functional.silu(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)
        self.answers[token, place] = (
            functional.linear(quantize_activation(hidden * weight), w2)
            if self.quantised
            else functional.linear(hidden, w2) * weight
        )


def until_experts(
    layer: Layer, index: int, streams: Tensor, tokens: Tensor, run: OracleRun, *, keys: Tensor | None = None,
    rounding: Rounding = NO_ROUNDING,
) -> Asked:  # fmt: skip
    """The first half of a layer: attention, and which experts every token asks.

    Args:
        layer: number ``index`` of its model; of its experts no weight is read.
        index: its number.
        streams: [n, N, C] before it.
        tokens: [n] int64.
        run: gets the layer's rows and choices.
        keys: values of index rows [entries, D] that its indexer takes instead of its own.
        rounding: what is rounded beside the profile.
    """
    spec = layer.spec
    with _quantised_inputs(layer, index, rounding.activations):
        x, post, comb = collapse(streams[None], layer.hc_attn_fn, layer.hc_attn_base, layer.hc_attn_scale, spec)
        out = _attention(layer.attn, layer.attn_norm(x[0]), index, spec, run, keys, rounding)
        streams = expand(streams[None], out[None], post, comb)[0]
        x, post, comb = collapse(streams[None], layer.hc_ffn_fn, layer.hc_ffn_base, layer.hc_ffn_scale, spec)
        normed = layer.ffn_norm(x)[0]
        chosen, weights = layer.ffn.gate(normed, tokens)
    quantised = f"layers.{index}.ffn{_EXPERTS}" in rounding.activations
    answers = torch.empty(*chosen.shape, normed.shape[-1])
    return Asked(streams, post, comb, normed, chosen, weights, layer.ffn.limit, quantised, answers)


def after_experts(layer: Layer, index: int, asked: Asked, *, rounding: Rounding = NO_ROUNDING) -> Tensor:
    """The second half, when all experts have answered: streams [n, N, C] after the layer."""
    with _quantised_inputs(layer, index, rounding.activations):
        mixed = asked.answers.sum(dim=1) + layer.ffn.shared_experts(asked.x)
    streams: Tensor = expand(asked.streams[None], mixed[None], asked.post, asked.comb)[0]
    return streams


@contextlib.contextmanager
def _quantised_inputs(layer: Layer, index: int, names: Collection[str]) -> Iterator[None]:
    """Let the layer's linears of these names quantise what they are given; stacks of experts are left to :class:`Asked`."""
    prefix = f"layers.{index}."
    own = [name.removeprefix(prefix) for name in names if name.startswith(prefix) and not name.endswith(_EXPERTS)]
    hooks = [
        layer.get_submodule(name).register_forward_pre_hook(lambda _, given: (quantize_activation(given[0]),))
        for name in own
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def quantize_activation(x: Tensor) -> Tensor:
    """x [..., C] -> the values that a product with quantised weights sees: e4m3 in tiles of 128, a power of two for each."""
    return quantize(x, ACTIVATION_TILE, E4M3)


def rotation(positions: Tensor, inv_freq: Tensor) -> Tensor:
    """positions [n] -> [n, rope/2] complex64: angles, cosines and sines are float32, up to the longest context."""
    return torch.polar(torch.ones(len(positions), len(inv_freq)), torch.outer(positions.float(), inv_freq))


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """x [n, ..., D], turn [n, rope/2] complex -> x with its last channels turned, in neighbouring pairs."""
    width = 2 * turn.shape[-1]
    pairs = torch.view_as_complex(x[..., -width:].reshape(*x.shape[:-1], width // 2, 2).contiguous())
    turned = torch.view_as_real(pairs * turn.reshape(len(turn), *[1] * (x.dim() - 2), width // 2)).flatten(-2)
    return torch.cat((x[..., :-width], turned), dim=-1)


def hadamard(x: Tensor) -> Tensor:
    """x [..., D], D a power of two -> its Walsh-Hadamard transform over ``sqrt(D)``."""
    width, half = x.shape[-1], 1
    while half < width:
        low, high = x.reshape(*x.shape[:-1], width // (2 * half), 2, half).unbind(-2)
        x = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        half *= 2
    scaled: Tensor = x * width**-0.5
    return scaled


def quantize(x: Tensor, tile: int, codes: Tensor) -> Tensor:
    """x [..., D] float32 -> the nearest codes times a power of two per tile, ties to the even code.

    The power is the smallest that brings the tile into the codes' range.
    """
    tiles = functional.pad(x, (0, -x.shape[-1] % tile)).double()
    tiles = split_last(tiles, tiles.shape[-1] // tile, tile)
    largest = tiles.abs().amax(-1, keepdim=True).clamp(min=torch.tensor(_LEAST).double())
    scale = torch.exp2(torch.ceil(torch.log2(largest / codes[-1])))
    magnitude = tiles.abs() / scale
    above = torch.searchsorted(codes, magnitude).clamp(1, len(codes) - 1)
    to_lower, to_upper = magnitude - codes[above - 1], codes[above] - magnitude
    upper = (to_upper < to_lower) | ((to_upper == to_lower) & (above % 2 == 0))
    near = codes[torch.where(upper, above, above - 1)] * scale
    return torch.copysign(near, tiles).flatten(-2)[..., : x.shape[-1]].float()


def quantize_row(x: Tensor, rope_dim: int) -> Tensor:
    """x [..., D] -> the values of a ``fp8_ds_mla`` row: e4m3 in tiles of 64, the rotated channels in bfloat16."""
    return torch.cat((quantize(x[..., :-rope_dim], 64, E4M3), x[..., -rope_dim:].bfloat16().float()), dim=-1)


def _row(x: Tensor, rope_dim: int, rounding: Rounding) -> Tensor:
    return quantize_row(x.bfloat16().float() if rounding.rows else x, rope_dim)


def quantize_index(x: Tensor) -> Tensor:
    """x [..., D], turned -> the values that the indexer computes with: Hadamard, then e2m1 in tiles of 32."""
    return quantize(hadamard(x), 32, E2M1)


def _attention(
    attn: Attention,
    x: Tensor,
    layer: int,
    spec: ModelSpec,
    run: OracleRun,
    keys_given: Tensor | None,
    rounding: Rounding,
) -> Tensor:
    """x [n, C] normed -> [n, C]."""
    count, kind, ratio = len(x), spec.layer_types[layer], spec.ratios[layer]
    turn = rotation(torch.arange(count), attn.inv_freq)
    latent = attn.q_norm(attn.wq_a(x))
    q = split_last(attn.wq_b(latent), spec.num_heads, spec.head_dim)
    q = rotate(q * torch.rsqrt(q.square().mean(-1, keepdim=True) + spec.rms_norm_eps), turn)
    keys = _row(rotate(attn.kv_norm(attn.wkv(x)), turn), spec.rope_dim, rounding)
    run.caches[f"{layer}.window"] = keys
    age = torch.arange(count)[:, None] - torch.arange(count)
    seen = (age >= 0) & (age < spec.sliding_window)
    if kind != SLIDING:
        turned = rotate(*_compressed(attn.compressor, x, attn.inv_freq, overlap=kind == CSA))
        entries = _row(turned, spec.rope_dim, rounding)
        run.caches[f"{layer}.entries"] = entries
        visible = torch.arange(len(entries)) < ((torch.arange(count) + 1) // ratio)[:, None]
        if kind == CSA:
            visible = _chosen(attn.indexer, x, latent, visible, turn, attn.inv_freq, layer, run, keys_given)
            run.chosen[layer] = visible
        keys, seen = torch.cat((keys, entries)), torch.cat((seen, visible), dim=1)
    logits = torch.einsum("nhd,kd->nhk", q, keys) * spec.head_dim**-0.5
    logits = logits.masked_fill(~seen[:, None], -torch.inf)
    sink = attn.attn_sink[:, None].expand(count, -1, 1)
    weights = torch.cat((logits, sink), dim=-1).softmax(-1)[..., :-1]
    out = rotate(torch.einsum("nhk,kd->nhd", weights, keys), turn.conj())
    grouped = split_last(out.flatten(1), spec.o_groups, -1)
    low = torch.einsum("ngi,goi->ngo", grouped, attn.wo_a.weight.reshape(spec.o_groups, spec.o_lora_rank, -1))
    projected: Tensor = attn.wo_b(low.flatten(1))
    return projected


def _compressed(compressor: Compressor, x: Tensor, inv_freq: Tensor, *, overlap: bool) -> tuple[Tensor, Tensor]:
    """Normed entries [n // ratio, D] of x [n, C], each with the rotation of its window's first token."""
    ratio, width = compressor.ratio, compressor.norm.weight.shape[0]
    kv, gate = compressor.wkv(x), compressor.wgate(x)
    entries = []
    for first in range(0, len(x) - ratio + 1, ratio):
        own = slice(first, first + ratio)
        values, scores = kv[own, -width:], (gate[own] + compressor.ape)[:, -width:]
        if overlap and first:
            before = slice(first - ratio, first)
            values = torch.cat((kv[before, :width], values))
            scores = torch.cat(((gate[before] + compressor.ape)[:, :width], scores))
        entries.append((scores.softmax(dim=0) * values).sum(dim=0))
    merged = torch.stack(entries) if entries else kv.new_zeros(0, width)
    return compressor.norm(merged), rotation(torch.arange(len(entries)) * ratio, inv_freq)


def _chosen(
    indexer: Indexer, x: Tensor, latent: Tensor, visible: Tensor, turn: Tensor, inv_freq: Tensor, layer: int,
    run: OracleRun, given: Tensor | None,
) -> Tensor:  # fmt: skip
    """visible [n, E] -> the best visible entries for every query, [n, E] bool."""
    keys = (
        quantize_index(rotate(*_compressed(indexer.compressor, x, inv_freq, overlap=True))) if given is None else given
    )
    run.caches[f"{layer}.index_entries"] = keys
    q = quantize_index(rotate(split_last(indexer.wq_b(latent), indexer.heads, indexer.width), turn))
    weights = indexer.weights_proj(x) * (indexer.width**-0.5 * indexer.heads**-0.5)
    scores = torch.einsum("nh,nhe->ne", weights, torch.einsum("nhd,ed->nhe", q, keys).relu())
    order = scores.masked_fill(~visible, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    best = order[:, : indexer.topk]
    return torch.zeros_like(visible).scatter(1, best, torch.ones_like(best, dtype=torch.bool)) & visible
