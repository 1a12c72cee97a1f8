"""What torch traces: the halves of a layer and the head, with weights that have a shape but no memory.

A layer is traced in two halves, attention and experts, because kinds of layers combine few of either. The halves meet in
the residual streams, which is all that flows between them. Every weight becomes an input, under its name within the layer.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn import functional

from .contract.geometry import ModelSpec
from .contract.profiles import HF
from .contract.state import state_tensors
from .model.decoder import Layer
from .model.hyper_connections import collapse_last
from .model.norm import RMSNorm
from .operators.registry import ONNX_OPSET, translation_table
from .trace import quiet, tidy, without_garbage_collection

# Sizes of the traced example; all different, or two dynamic sizes would be taken for one.
_BATCH, _CHUNK, _KEPT, _CAPACITY = 2, 5, 3, 64


class _Attention(nn.Module):
    """The first half of a layer, with its state as separate outputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self, streams: Tensor, positions: Tensor, num_tokens: Tensor, tokens: Tensor, active_context: Tensor,
        state: list[Tensor],
    ) -> list[Tensor]:  # fmt: skip
        out, after = self.layer.attend(streams, state, positions, num_tokens, tokens, active_context)  # type: ignore[operator]
        return [out, *after]


class _Experts(nn.Module):
    """The second half of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, streams: Tensor, input_ids: Tensor) -> Tensor:
        out: Tensor = self.layer.feed(streams, input_ids)  # type: ignore[operator]
        return out


class _Head(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        self.hc_head_fn = nn.Parameter(torch.empty(spec.hc_mult, spec.hc_mult * spec.hidden_size))
        self.hc_head_base = nn.Parameter(torch.empty(spec.hc_mult))
        self.hc_head_scale = nn.Parameter(torch.empty(1))

    def forward(self, streams: Tensor, logit_indices: Tensor) -> Tensor:
        index = logit_indices[:, :, None, None].expand(-1, -1, streams.shape[2], streams.shape[3])
        kept = streams.gather(1, index)
        x = self.norm(collapse_last(kept, self.hc_head_fn, self.hc_head_base, self.hc_head_scale, self.spec))
        logits: Tensor = functional.linear(x, self.head.weight)
        return logits


def trace_attention(spec: ModelSpec, layer: int, profile: str = HF) -> ir.Model:
    """Streams, positions, num_tokens, tokens, active_context, state -> streams, state."""
    with torch.device("meta"):
        module = Layer(spec, layer, profile)
    dim, rows = _dimensions(), [row for row in state_tensors(spec) if row.layer == layer]
    context = _CAPACITY * max(1, spec.ratios[layer]) + 1
    arguments = (
        _streams(spec), torch.zeros(_BATCH, dtype=torch.int32), torch.full((_BATCH,), _CHUNK, dtype=torch.int32),
        torch.zeros(_BATCH, _CHUNK, dtype=torch.int64), torch.tensor([_CHUNK]),
        [torch.zeros(_BATCH, row.capacity(context), row.width) for row in rows],
    )  # fmt: skip
    batch, chunk = dim["batch"], dim["chunk"]
    states = [{0: batch, 1: dim["entries"]} if row.ratio else {0: batch} for row in rows]
    shapes = ({0: batch, 1: chunk}, {0: batch}, {0: batch}, {0: batch, 1: chunk}, None, states)
    return _traced(_Attention, module, arguments, shapes)


def trace_experts(spec: ModelSpec, layer: int) -> ir.Model:
    """Streams, input_ids -> streams."""
    dim = _dimensions()
    with torch.device("meta"):
        module = Layer(spec, layer)
    arguments = (_streams(spec), torch.zeros(_BATCH, _CHUNK, dtype=torch.int64))
    both = {0: dim["batch"], 1: dim["chunk"]}
    return _traced(_Experts, module, arguments, (both, both))


def trace_head(spec: ModelSpec) -> ir.Model:
    """Streams, logit_indices -> logits."""
    dim = _dimensions()
    with torch.device("meta"):
        module = _Head(spec)
    arguments = (_streams(spec), torch.zeros(_BATCH, _KEPT, dtype=torch.int64))
    shapes = ({0: dim["batch"], 1: dim["chunk"]}, {0: dim["batch"], 1: dim["kept"]})
    return _weights_as_inputs(_export(_hollow(module), arguments, shapes), set(module.state_dict()))


def joined(first: ir.Model, second: ir.Model) -> ir.Model:
    """The halves of a layer one after the other, made in place: a graph that takes what :func:`trace_attention` takes, input_ids
    after the streams, and the weights of both."""
    graph, rest = first.graph, second.graph
    streams, input_ids, *weights = rest.inputs
    rest.inputs.clear()
    nodes, after = list(rest), rest.outputs[0]
    rest.outputs.clear()
    rest.remove(nodes)
    ir.convenience.replace_all_uses_with(streams, graph.outputs[0])
    for name, value in list(rest.initializers.items()):
        del rest.initializers[name]
        value.name = f"experts.{name}"
        graph.register_initializer(value)
    for node in nodes:
        node.name = f"experts.{node.name}"
        for value in node.outputs:
            value.name = f"experts.{value.name}"
    graph.extend(nodes)
    graph.outputs[0] = after
    graph.inputs.insert(1, input_ids)
    graph.inputs.extend(weights)
    return first


def _traced(half: type[nn.Module], layer: Layer, arguments: tuple[object, ...], shapes: tuple[object, ...]) -> ir.Model:
    model = _export(half(_hollow(layer)), arguments, shapes)
    for key in list(model.graph.initializers):
        model.graph.initializers[key].name = key.removeprefix("layer.")
    return _weights_as_inputs(model, set(layer.state_dict()))


def _streams(spec: ModelSpec) -> Tensor:
    return torch.zeros(_BATCH, _CHUNK, spec.hc_mult, spec.hidden_size)


def _weights_as_inputs(model: ir.Model, names: set[str]) -> ir.Model:
    """Tidy a traced graph, and turn its weights into inputs; what is left is small."""
    tidy(model)
    for name in sorted(names & model.graph.initializers.keys()):
        value = model.graph.initializers.pop(name)
        value.const_value = None
        model.graph.inputs.append(value)
    return model


def _dimensions() -> dict[str, torch.export.Dim]:
    sizes = {"batch": 65536, "chunk": 1 << 20, "kept": 1 << 20, "entries": 1 << 24}
    return {name: torch.export.Dim(name, min=1, max=size) for name, size in sizes.items()}


def _hollow(module: nn.Module) -> nn.Module:
    """Give every weight its shape without memory: one zero, repeated by strides of zero."""
    for part in module.modules():
        for name, value in list(part.named_parameters(recurse=False)):
            setattr(
                part, name, nn.Parameter(torch.zeros((), dtype=value.dtype).expand(value.shape), requires_grad=False)
            )
        for name, buffer in list(part.named_buffers(recurse=False)):
            if buffer.is_meta:
                part.register_buffer(name, torch.zeros((), dtype=buffer.dtype).expand(buffer.shape))
    return module.eval()


def _export(module: nn.Module, arguments: tuple[object, ...], shapes: tuple[object, ...]) -> ir.Model:
    # Tracing makes millions of objects that live until it ends: looking for garbage among them takes a tenth of the time.
    with quiet(), torch.no_grad(), without_garbage_collection():
        program = torch.onnx.export(
            module, arguments, dynamo=True, dynamic_shapes=shapes, custom_translation_table=translation_table(),
            opset_version=ONNX_OPSET, optimize=False, verbose=False,
        )  # fmt: skip
    assert program is not None
    return program.model
