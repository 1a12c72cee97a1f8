"""The decoder: token ids and state in, logits and state out. Plain tensors, no cache object."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..contract.geometry import ModelSpec
from ..contract.profiles import HF
from ..contract.state import StateTensor, state_tensors
from .attention import Attention
from .hyper_connections import collapse, collapse_last, expand
from .moe import MixtureOfExperts
from .norm import RMSNorm

#: Names of values inside the graph: the residual streams after a layer, and the entries that its indexer chose.
TAP, CHOSEN = "tap.layers.{layer}.hidden", "tap.layers.{layer}.chosen"


class Layer(nn.Module):
    """Attention and experts; before each the residual streams collapse, and after each they expand again."""

    def __init__(self, spec: ModelSpec, layer: int, profile: str = HF) -> None:
        super().__init__()
        self.spec = spec
        streams = spec.hc_mult
        self.attn_norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.ffn_norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.attn = Attention(spec, layer, profile)
        self.ffn = MixtureOfExperts(spec, layer)
        rows, width = (2 + streams) * streams, streams * spec.hidden_size
        self.hc_attn_fn = nn.Parameter(torch.empty(rows, width))
        self.hc_attn_base = nn.Parameter(torch.empty(rows))
        self.hc_attn_scale = nn.Parameter(torch.empty(3))
        self.hc_ffn_fn = nn.Parameter(torch.empty(rows, width))
        self.hc_ffn_base = nn.Parameter(torch.empty(rows))
        self.hc_ffn_scale = nn.Parameter(torch.empty(3))

    def forward(
        self,
        streams: Tensor,
        state: list[Tensor],
        input_ids: Tensor,
        positions: Tensor,
        num_tokens: Tensor,
        tokens: Tensor,
        active_context: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """streams [B, S, N, C] and the layer's state -> both after the layer."""
        streams, state = self.attend(streams, state, positions, num_tokens, tokens, active_context)
        return self.feed(streams, input_ids), state

    def attend(
        self,
        streams: Tensor,
        state: list[Tensor],
        positions: Tensor,
        num_tokens: Tensor,
        tokens: Tensor,
        active_context: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """The first half: streams and state after attention."""
        x, post, comb = collapse(streams, self.hc_attn_fn, self.hc_attn_base, self.hc_attn_scale, self.spec)
        out, state = self.attn(self.attn_norm(x), state, positions, num_tokens, tokens, active_context)
        return expand(streams, out, post, comb), state

    def feed(self, streams: Tensor, input_ids: Tensor) -> Tensor:
        """The second half: streams after the experts."""
        x, post, comb = collapse(streams, self.hc_ffn_fn, self.hc_ffn_base, self.hc_ffn_scale, self.spec)
        return expand(streams, self.ffn(self.ffn_norm(x), input_ids), post, comb)


class Decoder(nn.Module):
    """A whole model; parameters have the released checkpoints' names, experts are stacked per layer.

    ``profile`` chooses the computation, see export/contract/profiles.py.
    """

    def __init__(self, spec: ModelSpec, profile: str = HF) -> None:
        super().__init__()
        self.spec, self.profile = spec, profile
        self.embed = nn.Embedding(
            spec.vocab_size, spec.hidden_size, _weight=torch.empty(spec.vocab_size, spec.hidden_size)
        )
        self.layers = nn.ModuleList(Layer(spec, layer, profile) for layer in range(spec.num_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        self.hc_head_fn = nn.Parameter(torch.empty(spec.hc_mult, spec.hc_mult * spec.hidden_size))
        self.hc_head_base = nn.Parameter(torch.empty(spec.hc_mult))
        self.hc_head_scale = nn.Parameter(torch.empty(1))

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        num_tokens: Tensor,
        active_context: Tensor,
        logit_indices: Tensor,
        state: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """One chunk for every sequence.

        input_ids [B, S] int64; positions [B] int32, tokens already in the state; num_tokens [B] int32, how
        many of the S are real (the rest is padding and changes nothing); active_context [1] int64, at
        least every ``positions + num_tokens``; logit_indices [B, L] int64, the chunk offsets whose logits
        are wanted; state in the order of ``state_tensors``.

        Returns logits [B, L, V] float32 and the state after the chunk.
        """
        logits, after, _ = self.run(input_ids, positions, num_tokens, active_context, logit_indices, state)
        return logits, after

    def run(
        self,
        input_ids: Tensor,
        positions: Tensor,
        num_tokens: Tensor,
        active_context: Tensor,
        logit_indices: Tensor,
        state: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """As :meth:`forward`, and the residual streams [B, S, N, C] after every layer."""
        device = positions.device
        tokens = positions.long().unsqueeze(1) + torch.arange(input_ids.shape[1], device=device).unsqueeze(0)
        streams = self.embed(input_ids).unsqueeze(2).expand(-1, -1, self.spec.hc_mult, -1)
        per_layer = split_state(state_tensors(self.spec), state)
        after: list[Tensor] = []
        taps: list[Tensor] = []
        for layer, layer_state in zip(self.layers, per_layer, strict=True):
            streams, layer_state = layer(streams, layer_state, input_ids, positions, num_tokens, tokens, active_context)
            after += layer_state
            taps.append(streams)
        index = logit_indices[:, :, None, None].expand(-1, -1, streams.shape[2], streams.shape[3])
        kept = streams.gather(1, index)
        x = self.norm(collapse_last(kept, self.hc_head_fn, self.hc_head_base, self.hc_head_scale, self.spec))
        return functional.linear(x, self.head.weight), after, taps


def split_state(tensors: Sequence[StateTensor], state: Sequence[Tensor]) -> list[list[Tensor]]:
    """The flat state as one list per layer."""
    layers: list[list[Tensor]] = [[] for _ in range(1 + max(tensor.layer for tensor in tensors))]
    for tensor, value in zip(tensors, state, strict=True):
        layers[tensor.layer].append(value)
    return layers


def new_state(spec: ModelSpec, context: int, batch: int = 1, *, fill: float = 0.0) -> list[Tensor]:
    """A state for ``batch`` sequences of up to ``context`` tokens; its initial values have no effect."""
    return [torch.full((batch, tensor.capacity(context), tensor.width), fill) for tensor in state_tensors(spec)]


def parameter_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor of the decoder by its released name, experts stacked per layer."""
    return dict(_parameter_shapes(spec))


@functools.lru_cache(maxsize=4)
def _parameter_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in Decoder(spec).state_dict().items()}
