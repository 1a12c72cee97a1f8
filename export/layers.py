"""A graph whose repeated layers share functions: one layer per kind is traced without its weights, then all are stitched.

Layers of one kind (attention, routing and the formats of their weights) differ only in their weights. So one of them
is traced with weights that have a shape but no memory. It becomes a function ``FoldkvLayer…`` of the domain foldkv, and every
layer of the model is one node that calls it. Time and memory depend on the number of kinds, not of layers.
:func:`flat` gives back the graph in which every operator is a node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass
from torch import Tensor, nn
from torch.nn import functional

from ..artifact import sha256_json
from ..errors import FoldkvError
from ..progress import Progress, Say, silent
from .contract.geometry import CSA, HCA, ModelSpec
from .contract.operators import expected_operators
from .contract.profiles import HF
from .contract.state import state_tensors
from .model.decoder import CHOSEN, TAP, Layer
from .model.hadamard import hadamard_matrix
from .model.hyper_connections import collapse_last
from .model.norm import RMSNorm
from .model.rope import inverse_frequencies
from .operators import packed, packed_words
from .operators.registry import DOMAIN, ONNX_OPSET, translation_table
from .trace import INPUTS, LOGITS, add_functions, name_dimensions, quiet, tidy
from .weights import Data, Packed, Plain, Quantised, Source, Weights

PREFIX = "FoldkvLayer"
#: Tables that layers of a kind share and no checkpoint has: by name in a layer, from the model and the kind of attention.
_TABLES: dict[str, Callable[[ModelSpec, str], Tensor]] = {
    "attn.inv_freq": inverse_frequencies,
    "attn.indexer.hadamard": lambda spec, _: hadamard_matrix(spec.index_head_dim),
}
_ARGUMENTS = ("streams", "input_ids", "positions", "num_tokens", "tokens", "active_context")
# Sizes of the traced example; all different, or two dynamic sizes would be taken for one.
_BATCH, _CHUNK, _KEPT, _CAPACITY = 2, 5, 3, 64


class _OneLayer(nn.Module):
    """A layer with its state as separate outputs."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self, streams: Tensor, input_ids: Tensor, positions: Tensor, num_tokens: Tensor, tokens: Tensor,
        active_context: Tensor, state: list[Tensor],
    ) -> list[Tensor]:  # fmt: skip
        out, after = self.layer(streams, state, input_ids, positions, num_tokens, tokens, active_context)
        return [out, *after]


class _Ends(nn.Module):
    """The parts before the first layer and after the last; ``last`` is the last layer's output."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        self.hc_head_fn = nn.Parameter(torch.empty(spec.hc_mult, spec.hc_mult * spec.hidden_size))
        self.hc_head_base = nn.Parameter(torch.empty(spec.hc_mult))
        self.hc_head_scale = nn.Parameter(torch.empty(1))

    def forward(self, input_ids: Tensor, positions: Tensor, logit_indices: Tensor, last: Tensor) -> list[Tensor]:
        tokens = positions.long().unsqueeze(1) + torch.arange(input_ids.shape[1]).unsqueeze(0)
        streams = self.embed(input_ids).unsqueeze(2).expand(-1, -1, self.spec.hc_mult, -1)
        index = logit_indices[:, :, None, None].expand(-1, -1, last.shape[2], last.shape[3])
        x = self.norm(
            collapse_last(last.gather(1, index), self.hc_head_fn, self.hc_head_base, self.hc_head_scale, self.spec)
        )
        return [functional.linear(x, self.head.weight), tokens, streams]


@dataclass(frozen=True)
class Kind:
    """Two layers with the same kind have the same graph: attention, routing, and how each weight is stored."""

    attention: str
    hashed: bool
    stored: tuple[tuple[str, object], ...]


def layered_model(spec: ModelSpec, weights: Weights, profile: str = HF, *, progress: Say = silent) -> ir.Model:
    """The model with one function per kind of layer, and its weights where ``weights`` says; no weight is read.

    Args:
        spec: the model.
        weights: where each weight is, and how it is stored.
        profile: the numerics, see export/contract/profiles.py.
        progress: a :class:`~foldkv.progress.Progress` learns how many kinds are traced.

    Raises:
        FoldkvError: an operator was lost on the way, which would be an internal fault.
    """
    report, total = Progress.of(progress), len({_kind(spec, layer, weights)[0] for layer in range(spec.num_layers)})
    model = _ends(spec)
    streams, tokens = model.graph.outputs[2], model.graph.outputs[1]
    del model.graph.outputs[1:]
    model.graph.outputs[0].name = LOGITS
    last = model.graph.inputs.pop()
    for name in list(model.graph.initializers):
        source = weights.get(name)
        if source is not None:
            assert not isinstance(source, Packed)
            _attach_end(model, name, source)
    inputs = {value.name: value for value in model.graph.inputs}
    kinds: dict[Kind, tuple[str, list[str]]] = {}
    rows = state_tensors(spec)
    past = {row.input: _value(row.input, ir.DataType.FLOAT) for row in rows}
    scalars = {"num_tokens": ir.DataType.INT32, "active_context": ir.DataType.INT64}
    inputs |= {name: _value(name, dtype) for name, dtype in scalars.items()}
    model.graph.inputs[:] = [*(inputs[name] for name in INPUTS), *past.values()]
    shared: dict[str, ir.Value] = {}
    outputs = [model.graph.outputs[0]]
    for layer in range(spec.num_layers):
        kind, sources = _kind(spec, layer, weights)
        if kind not in kinds:
            report.steps(len(kinds), total, "kinds of layers")
            kinds[kind] = _add_kind(model, spec, layer, profile, _function_name(kind, kinds), sources)
        name, parameters = kinds[kind]
        given = {"streams": streams, "tokens": tokens} | inputs
        arguments = [given[argument] for argument in _ARGUMENTS]
        arguments += [past[row.input] for row in rows if row.layer == layer]
        arguments += [_initializer(model, shared, spec, layer, parameter, sources) for parameter in parameters]
        state = [row.output for row in rows if row.layer == layer]
        node = ir.Node(DOMAIN, name, arguments, num_outputs=1 + len(state), name=f"layers.{layer}")
        for value, out in zip(node.outputs, [TAP.format(layer=layer), *state], strict=True):
            value.name, value.dtype = out, ir.DataType.FLOAT
        node.outputs[0].shape = ir.Shape(["batch", "chunk", spec.hc_mult, spec.hidden_size])
        model.graph.append(node)
        outputs += node.outputs[1:]
        streams = node.outputs[0]
    ir.convenience.replace_all_uses_with(last, streams)
    model.graph.outputs[:] = outputs
    model.graph.sort()
    name_dimensions(model, spec)
    model.graph.name, model.producer_name = "decoder", "foldkv"
    model.opset_imports[DOMAIN] = 1
    _check(model, spec, profile)
    return model


def layer_counts(model: ir.Model) -> dict[str, int]:
    """How many layers call each function."""
    return dict(sorted(Counter(node.op_type for node in model.graph if node.op_type.startswith(PREFIX)).items()))


def operators_of(model: ir.Model) -> dict[str, int]:
    """How many nodes of each foldkv operator all layers have together."""
    total: Counter[str] = Counter()
    for function in model.functions.values():
        if function.name.startswith(PREFIX):
            count = layer_counts(model).get(function.name, 0)
            total.update({node.op_type: 0 for node in function if node.domain == DOMAIN})
            for node in function:
                if node.domain == DOMAIN:
                    total[node.op_type] += count
    return dict(sorted(total.items()))


def flat(model: ir.Model) -> ir.Model:
    """The graph in which every operator is a node, made in place: the layers' functions are inlined, once per layer.

    Weights stay where they are and are not read. Values for tools have the same names as in a graph that was traced as a whole.
    """
    sparse = []
    for node in model.graph:
        function = model.functions.get(node.op_identifier())
        if node.op_type.startswith(PREFIX) and function is not None:
            sparse += [node.name] * sum(inner.op_type == "FoldkvIndexSelect" for inner in function)
    InlinePass(criteria=lambda function: function.name.startswith(PREFIX))(model)
    selects = [node for node in model.graph if node.op_type == "FoldkvIndexSelect"]
    if sparse:
        for node, name in zip(selects, sparse, strict=True):
            node.outputs[0].name = CHOSEN.format(layer=(name or "").removeprefix("layers."))
    return model


def _kind(spec: ModelSpec, layer: int, weights: Weights) -> tuple[Kind, dict[str, Source]]:
    prefix = f"layers.{layer}."
    sources = {name.removeprefix(prefix): source for name, source in weights.layer(layer).items()}
    stored = tuple(sorted((name, source.signature) for name, source in sources.items()))
    return Kind(spec.layer_types[layer], spec.hash_layers[layer], stored), sources


def _function_name(kind: Kind, known: Iterable[Kind]) -> str:
    attention = {CSA: "Csa", HCA: "Hca"}.get(kind.attention, "Sliding")
    like = sum((other.attention, other.hashed) == (kind.attention, kind.hashed) for other in known)
    return f"{PREFIX}{attention}{'Hash' if kind.hashed else 'Moe'}{like + 1 if like else ''}"


def _value(name: str, dtype: ir.DataType) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype))


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
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            module, arguments, dynamo=True, dynamic_shapes=shapes, custom_translation_table=translation_table(),
            opset_version=ONNX_OPSET, optimize=False, verbose=False,
        )  # fmt: skip
    assert program is not None
    return program.model


def _dimensions() -> dict[str, torch.export.Dim]:
    sizes = {"batch": 65536, "chunk": 1 << 20, "kept": 1 << 20, "entries": 1 << 24}
    return {name: torch.export.Dim(name, min=1, max=size) for name, size in sizes.items()}


def _ends(spec: ModelSpec) -> ir.Model:
    with torch.device("meta"):
        ends = _Ends(spec)
    dim = _dimensions()
    arguments = (
        torch.zeros(_BATCH, _CHUNK, dtype=torch.int64), torch.zeros(_BATCH, dtype=torch.int32),
        torch.zeros(_BATCH, _KEPT, dtype=torch.int64), torch.zeros(_BATCH, _CHUNK, spec.hc_mult, spec.hidden_size),
    )  # fmt: skip
    batch, chunk = dim["batch"], dim["chunk"]
    shapes = ({0: batch, 1: chunk}, {0: batch}, {0: batch, 1: dim["kept"]}, {0: batch, 1: chunk})
    model = _export(_hollow(ends), arguments, shapes)
    for value, name in zip(model.graph.inputs, ("input_ids", "positions", "logit_indices", "last"), strict=True):
        value.name = name
    tidy(model)
    _read_sizes_off_ids(model)
    return model


def _read_sizes_off_ids(model: ir.Model) -> None:
    """Read batch and chunk from ``input_ids``: from the last layer's output they would make a cycle."""
    ids, last = model.graph.inputs[0], model.graph.inputs[-1]
    for node in model.graph:
        if node.op_type == "Shape" and node.inputs[0] is last and node.attributes["end"].value <= 2:
            node.replace_input_with(0, ids)


def _traced(spec: ModelSpec, layer: int, profile: str = HF) -> ir.Model:
    with torch.device("meta"):
        module = Layer(spec, layer, profile)
    module.attn.inv_freq = inverse_frequencies(spec, spec.layer_types[layer])
    dim, rows = _dimensions(), [row for row in state_tensors(spec) if row.layer == layer]
    context = _CAPACITY * max(1, spec.ratios[layer]) + 1
    arguments = (
        torch.zeros(_BATCH, _CHUNK, spec.hc_mult, spec.hidden_size), torch.zeros(_BATCH, _CHUNK, dtype=torch.int64),
        torch.zeros(_BATCH, dtype=torch.int32), torch.full((_BATCH,), _CHUNK, dtype=torch.int32),
        torch.zeros(_BATCH, _CHUNK, dtype=torch.int64), torch.tensor([_CHUNK]),
        [torch.zeros(_BATCH, row.capacity(context), row.width) for row in rows],
    )  # fmt: skip
    batch, chunk = dim["batch"], dim["chunk"]
    states = [{0: batch, 1: dim["entries"]} if row.ratio else {0: batch} for row in rows]
    shapes = ({0: batch, 1: chunk}, {0: batch, 1: chunk}, {0: batch}, {0: batch}, {0: batch, 1: chunk}, None, states)
    model = _export(_OneLayer(_hollow(module)), arguments, shapes)  # type: ignore[arg-type]
    names = [*_ARGUMENTS, *(f"past.{row.group}" for row in rows)]
    for value, name in zip(model.graph.inputs, names, strict=True):
        value.name = name
    for value, name in zip(model.graph.outputs, ["after", *(f"present.{row.group}" for row in rows)], strict=True):
        value.name = name
    for name in list(model.graph.initializers):
        model.graph.initializers[name].name = name.removeprefix("layer.")
    tidy(model)
    return model


def _add_kind(
    model: ir.Model, spec: ModelSpec, layer: int, profile: str, name: str, sources: dict[str, Source]
) -> tuple[str, list[str]]:
    """Trace a layer and add it as a function; returns its name and the parameters it takes, in order."""
    traced = _traced(spec, layer, profile)
    graph = traced.graph
    for parameter, source in sources.items():
        if isinstance(source, Packed):
            _use_packed(traced, parameter, source)
        else:
            _use_stored(traced, parameter, source)
    _add_bodies(traced, sources)
    constants = []
    for key in list(graph.initializers):
        value = graph.initializers.pop(key)
        if key in _TABLES:
            _as_input(graph, value)
        else:
            assert value.const_value is not None
            constant = ir.node("Constant", [], attributes={"value": value.const_value}, name=key)
            constant.outputs[0].name, constant.outputs[0].dtype = f"{key}_", value.dtype
            constant.outputs[0].shape = value.shape
            ir.convenience.replace_all_uses_with(value, constant.outputs[0])
            constants.append(constant)
    graph.insert_before(graph[0], constants)
    parameters = [value.name or "" for value in graph.inputs[len(_ARGUMENTS) + len(_states(spec, layer)) :]]
    inputs, outputs, nodes = list(graph.inputs), list(graph.outputs), list(graph)
    graph.inputs.clear()
    graph.outputs.clear()
    for node in nodes:
        graph.remove(node)
    body = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": ONNX_OPSET, DOMAIN: 1}, name=name)
    model.functions[DOMAIN, name, ""] = ir.Function(DOMAIN, name, "", graph=body, attributes=[])
    for identifier, function in traced.functions.items():
        model.functions.setdefault(identifier, function)
    return name, parameters


def _states(spec: ModelSpec, layer: int) -> list[str]:
    return [row.group for row in state_tensors(spec) if row.layer == layer]


def _as_input(graph: ir.Graph, value: ir.Value) -> None:
    value.const_value = None
    graph.inputs.append(value)


def _use_stored(model: ir.Model, name: str, source: Plain | Quantised) -> None:
    """Let the graph take a stored weight and convert it to float32, or take an integer table unchanged."""
    graph = model.graph
    if name not in graph.initializers:
        raise FoldkvError(f"the traced layer has no weight {name}. Report this as a fault of foldkv.")
    value = graph.initializers.pop(name)
    if isinstance(source, Plain) and source.data.dtype == value.dtype:
        _as_input(graph, value)
        return
    stored = ir.Value(name=name, type=ir.TensorType(source.data.dtype), shape=ir.Shape(source.data.shape))
    value.name = f"{name}.float32"
    graph.inputs.append(stored)
    if isinstance(source, Plain):
        nodes = [ir.node("Cast", [stored], attributes={"to": int(ir.DataType.FLOAT)}, name=f"{name}.cast")]
    else:
        assert isinstance(source, Quantised)
        nodes = _dequantise(graph, name, stored, source)
    graph.insert_before(graph[0], nodes)
    _replace(value, nodes[-1].outputs[0])


def _dequantise(graph: ir.Graph, name: str, stored: ir.Value, source: Quantised) -> list[ir.Node]:
    scale = ir.Value(name=f"{name}.scale", type=ir.TensorType(source.scale.dtype), shape=ir.Shape(source.scale.shape))
    graph.inputs.append(scale)
    nodes = []
    if source.scale.dtype == ir.DataType.INT8:
        nodes.append(ir.Node(DOMAIN, packed.EXPONENTS, [scale], name=f"{name}.exponents"))
        scale = nodes[0].outputs[0]
        scale.name, scale.dtype, scale.shape = f"{name}.factors", ir.DataType.FLOAT, ir.Shape(source.scale.shape)
    (rows, columns), (r, c), (height, width) = source.data.shape, source.scale.shape, source.block
    whole = r * height == rows and c * width == columns
    sizes = {"blocks": [r, height, c, width], "grid": [r, 1, c, 1], "shape": [rows, columns]}
    if not whole:
        sizes["whole"] = [r * height, c * width]
    attributes = [ir.AttrInt64s(key, value) for key, value in sizes.items()]
    # Not part of the function: ONNX Runtime does not accept an FP8 value in a nested function.
    one = ir.node("Constant", [], attributes={"value_float": 1.0}, name=f"{name}.one")
    nodes.append(one)
    nodes.append(ir.node("DequantizeLinear", [stored, one.outputs[0]], name=f"{name}.dequantize"))
    elements = nodes[-1].outputs[0]
    elements.name, elements.dtype, elements.shape = f"{name}.elements", ir.DataType.FLOAT, ir.Shape(source.data.shape)
    one.outputs[0].name, one.outputs[0].dtype, one.outputs[0].shape = f"{name}.one", ir.DataType.FLOAT, ir.Shape([])
    kind = packed.BLOCK if whole else packed.PARTIAL
    nodes.append(ir.Node(DOMAIN, kind, [elements, scale], attributes, name=f"{name}.scaled"))
    return nodes


def _replace(old: ir.Value, new: ir.Value) -> None:
    new.name, new.shape, new.dtype = old.name, old.shape, ir.DataType.FLOAT
    old.name = f"{old.name}.traced"
    ir.convenience.replace_all_uses_with(old, new)


def _use_packed(model: ir.Model, name: str, source: Packed) -> None:
    """Give the routed experts their packed weights instead of float32 ones."""
    graph = model.graph
    node = next(node for node in graph if node.op_type == "FoldkvRoutedExperts")
    for weight in ("ffn.experts.w13", "ffn.experts.w2"):
        graph.initializers.pop(weight)
    count = source.codes.shape[0]
    given = []
    for part, dtype, shape in (
        ("codes", ir.DataType.INT8, source.codes.shape), ("scales", ir.DataType.INT8, source.scales.shape),
        ("slots", ir.DataType.INT64, (count,)),
    ):  # fmt: skip
        given.append(ir.Value(name=f"{name}.{part}", type=ir.TensorType(dtype), shape=ir.Shape(shape)))
        graph.inputs.append(given[-1])
    limit = node.attributes["limit"]
    # The body knows where the matrices are. Engines give the node another body and must know it too.
    geometry = [ir.AttrInt64s(key, values) for key, values in packed_words.geometry(dict(source.matrices)).items()]
    new = ir.Node(
        DOMAIN, packed.EXPERTS[source.format], [*node.inputs[:3], *given],
        [ir.AttrFloat32("limit", limit.value), *geometry], name=node.name,
    )  # fmt: skip
    old = node.outputs[0]
    graph.insert_before(node, new)
    output = new.outputs[0]
    output.name, output.shape, output.dtype = old.name, old.shape, old.dtype
    ir.convenience.replace_all_uses_with(old, output)
    graph.remove(node, safe=True)


def _add_bodies(model: ir.Model, sources: dict[str, Source]) -> None:
    """Attach the bodies of the operators that a layer uses."""
    made = [packed.exponents(), packed.block_scale(), packed.partial_block_scale()]
    made += [packed.routed_experts(s.format, dict(s.matrices)) for s in sources.values() if isinstance(s, Packed)]
    used = {node.op_type for node in model.graph}
    for proto in made:
        if proto.name in used:
            model.functions[DOMAIN, proto.name, ""] = ir.serde.deserialize_function(proto)
    add_functions(model)


def _attach_end(model: ir.Model, name: str, source: Plain | Quantised) -> None:
    """Weights outside of layers: unchanged, or stored narrower and cast (the embedding after its look-up)."""
    graph = model.graph
    value = graph.initializers.pop(name)
    stored = ir.Value(name=name, type=ir.TensorType(source.data.dtype), shape=ir.Shape(source.data.shape))
    stored.const_value = source.data.tensor(name)
    value.name = f"{name}.float32"
    if isinstance(source, Quantised):
        nodes = _dequantise(graph, name, stored, source)
        scale = graph.inputs.pop()
        scale.const_value = source.scale.tensor(scale.name or "")
        graph.register_initializer(scale)
        graph.insert_before(graph[0], nodes)
        _replace(value, nodes[-1].outputs[0])
    elif source.data.dtype == value.dtype:
        value.name = f"{name}.traced"
        ir.convenience.replace_all_uses_with(value, stored)
    else:
        uses = list(value.uses())
        looked_up = len(uses) == 1 and uses[0].node.op_type == "Gather" and uses[0].idx == 0
        target = uses[0].node.outputs[0] if looked_up else value
        cast = ir.node(
            "Cast", [target if looked_up else stored], attributes={"to": int(ir.DataType.FLOAT)}, name=f"{name}.cast"
        )
        cast.outputs[0].name, cast.outputs[0].dtype = f"{name}.cast", ir.DataType.FLOAT
        cast.outputs[0].shape = target.shape
        if looked_up:
            users = list(target.uses())
            for user in users:
                if user.node is not cast:
                    user.node.replace_input_with(user.idx, cast.outputs[0])
            uses[0].node.replace_input_with(0, stored)
            target.dtype = source.data.dtype
            graph.insert_after(uses[0].node, cast)
        else:
            ir.convenience.replace_all_uses_with(value, cast.outputs[0])
            graph.insert_before(graph[0], cast)
    graph.register_initializer(stored)


def _initializer(
    model: ir.Model,
    shared: dict[str, ir.Value],
    spec: ModelSpec,
    layer: int,
    parameter: str,
    sources: dict[str, Source],
) -> ir.Value:
    """The value that a layer gives to a parameter of its function; tables that layers share exist once."""
    prefix, _, last = parameter.rpartition(".")
    if parameter in _TABLES:
        kind = spec.layer_types[layer]
        name = f"{parameter.rpartition('.')[2]}.{kind}"
        return _shared(model, shared, name, ir.tensor(_TABLES[parameter](spec, kind).numpy()))
    source = sources.get(parameter) or sources[prefix]
    if isinstance(source, Packed) and last == "slots":
        return _shared(
            model,
            shared,
            f"slots.{sha256_json(list(source.slots))}",
            ir.tensor(list(source.slots), dtype=ir.DataType.INT64),
        )
    data: Data = getattr(source, "data" if parameter in sources else last)
    name = f"layers.{layer}.{parameter}"
    value = ir.Value(
        name=name, type=ir.TensorType(data.dtype), shape=ir.Shape(data.shape), const_value=data.tensor(name)
    )
    model.graph.register_initializer(value)
    return value


def _shared(model: ir.Model, known: dict[str, ir.Value], name: str, tensor: ir.TensorProtocol) -> ir.Value:
    if name not in known:
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        tensor.name = name
        model.graph.register_initializer(value)
        known[name] = value
    return known[name]


def _check(model: ir.Model, spec: ModelSpec, profile: str) -> None:
    found = operators_of(model)
    experts = sum(found.pop(name, 0) for name in (*packed.EXPERTS.values(), "FoldkvRoutedExperts"))
    for name in (packed.EXPONENTS, packed.BLOCK, packed.PARTIAL):
        found.pop(name, None)
    expected = expected_operators(spec, profile)
    if found | {"FoldkvRoutedExperts": experts} != expected:
        raise FoldkvError(
            f"the stitched graph has operators {found}; expected {expected}. Report this as a fault of foldkv."
        )
