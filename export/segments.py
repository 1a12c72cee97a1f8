"""Segments: a model as a chain of small graphs without weights, one per kind of layer.

A segment is a function ``(streams, step tensors, its state, its weights) -> (streams, its state)``. Layers of one kind
(attention, routing and the formats of their weights) differ only in the values of their weights. So one of them is traced,
with weights that have a shape but no memory, and its graph takes every weight as an input, under its role
(export/roles.py). Time, memory and size depend on the number of kinds, and not on the layers or on the weights.

============  =======================================================  ==================================
segment       inputs                                                   outputs
============  =======================================================  ==================================
``step``      input_ids, positions                                     tokens [B, S], each token's position
``embed``     input_ids, weights                                       streams [B, S, N, C]
a kind        streams, step tensors, ``past.{group}``, weights         streams, ``present.{group}``
``head``      streams, logit_indices, weights                          logits [B, L, V]
============  =======================================================  ==================================

Tables that follow from the geometry alone (rotary frequencies, the Hadamard matrix) are constants of a segment.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx
import onnx.parser
import onnx.shape_inference
import onnx_ir as ir

from ..errors import FoldkvError
from ..progress import Progress, Say, silent
from .checkpoint.names import scale_name
from .contract.geometry import SHORT_NAMES, ModelSpec
from .contract.operators import PACKED_EXPERTS, ROUTED_EXPERTS, WEIGHT, expected_operators, operator_specs
from .contract.profiles import HF
from .contract.state import StateTensor, state_tensors
from .contract.weights import EXPERTS, PLAIN_FORMATS, WEIGHT_FORMAT
from .layer_traces import joined, trace_attention, trace_experts, trace_head
from .operators import packed, packed_words
from .operators.experts import grouped_body
from .operators.registry import DOMAIN, ONNX_OPSET
from .roles import EMBED, HEAD, Packed, Plain, Quantised, Source, Sources, onnx_dtype
from .trace import LOGITS, add_functions, operator_counts
from .trace_cache import traced_once

STEP = "step"
STREAMS, TOKENS = "streams", "tokens"
#: The tensors that every layer takes beside its streams, state and weights.
STEP_INPUTS = ("input_ids", "positions", "num_tokens", TOKENS, "active_context")
_ARGUMENTS = (STREAMS, *STEP_INPUTS)
_AFTER = "after"
#: The value inside a segment that has the entries which its indexer chose.
CHOSEN = "chosen"
_IR_VERSION = 10  # what torch.onnx.export writes
# Facts of a model that no single layer depends on, or that the key of its trace has for its own layer.
_NOT_OF_A_LAYER = ("num_layers", "layer_types", "ratios", "hash_layers", "bos_token_id", "eos_token_ids")


@dataclass(frozen=True)
class Segment:
    """One graph of the chain.

    Attributes:
        name: of the kind, which is also its file's stem.
        model: the graph; its inputs are ``arguments``, then the state, then ``weights``.
        arguments: names of the inputs that other segments, or the step, give.
        groups: state groups in order; inputs ``past.{group}``, outputs ``present.{group}``.
        weights: roles, in the order of the inputs.
    """

    name: str
    model: ir.Model
    arguments: tuple[str, ...]
    groups: tuple[str, ...]
    weights: tuple[str, ...]

    @property
    def operators(self) -> dict[str, int]:
        """Nodes of each foldkv operator."""
        return operator_counts(self.model)


@dataclass(frozen=True)
class Kind:
    """Two layers with the same kind have the same graph: attention, routing, and how each weight is stored."""

    attention: str
    hashed: bool
    stored: tuple[tuple[str, object], ...]

    @classmethod
    def of(cls, spec: ModelSpec, layer: int, roles: Mapping[str, Source]) -> Kind:
        """The kind of one layer."""
        stored = tuple(sorted((role, source.signature) for role, source in roles.items()))
        return cls(spec.layer_types[layer], spec.hash_layers[layer], stored)


@dataclass(frozen=True)
class Chain:
    """The segments of a model by name, and the segment of each layer."""

    segments: dict[str, Segment]
    layers: tuple[str, ...]

    @property
    def operators(self) -> dict[str, int]:
        """Nodes of each foldkv operator in all layers together."""
        total: dict[str, int] = {}
        for name in self.layers:
            for operator, count in self.segments[name].operators.items():
                total[operator] = total.get(operator, 0) + count
        return dict(sorted(total.items()))


def trace_chain(spec: ModelSpec, sources: Sources, profile: str = HF, *, progress: Say = silent) -> Chain:
    """The segments of a model; no weight is read.

    Args:
        spec: the geometry.
        sources: how each weight is stored.
        profile: the numerics, see export/contract/profiles.py.
        progress: a :class:`~foldkv.progress.Progress` learns how many segments are traced.

    Raises:
        FoldkvError: an operator was lost on the way, which would be an internal fault.
    """
    kinds = [Kind.of(spec, layer, sources[f"layers.{layer}"]) for layer in range(spec.num_layers)]
    names: dict[Kind, str] = {}
    for kind in kinds:
        if kind not in names:
            names[kind] = _name(kind, names)
    report = Progress.of(progress)
    segments = {STEP: _step(), EMBED: _embed(spec, sources[EMBED])}
    for kind, name in names.items():
        report.steps(len(segments) - 2, len(names), "kinds of layers")
        layer = kinds.index(kind)
        segments[name] = _layer(spec, layer, profile, name, sources[f"layers.{layer}"])
    segments[HEAD] = _head(spec, sources[HEAD])
    chain = Chain(segments, tuple(names[kind] for kind in kinds))
    _check(chain, spec, profile)
    return chain


def trace_layer(spec: ModelSpec, layer: int, sources: Sources, profile: str = HF) -> Segment:
    """The segment of one layer alone, as :func:`trace_chain` makes it for its kind; no weight is read."""
    owner = f"layers.{layer}"
    return _layer(spec, layer, profile, owner, sources[owner])


def _name(kind: Kind, known: Iterable[Kind]) -> str:
    like = sum((other.attention, other.hashed) == (kind.attention, kind.hashed) for other in known)
    return f"{SHORT_NAMES[kind.attention]}-{'hash' if kind.hashed else 'moe'}{f'-{like + 1}' if like else ''}"


def _step() -> Segment:
    """Written by hand: tracing two operators would take seconds."""
    model = _written("""
        step (int64[batch, chunk] input_ids, int32[batch] positions) => (int64[batch, chunk] tokens) {
            zero = Constant <value_int = 0> ()
            one = Constant <value_int = 1> ()
            axis = Constant <value_ints = [1]> ()
            sizes = Shape <start = 1, end = 2> (input_ids)
            length = Squeeze (sizes)
            offsets = Range (zero, length, one)
            held = Cast <to = 7> (positions)
            first = Unsqueeze (held, axis)
            tokens = Add (first, offsets)
        }
    """)
    return _finish(STEP, model, ("input_ids", "positions"), (TOKENS,), (), {})


def _embed(spec: ModelSpec, roles: Mapping[str, Source]) -> Segment:
    """Written by hand, as :func:`_step`."""
    streams = f"[batch, chunk, {spec.hc_mult}, {spec.hidden_size}]"
    model = _written(f"""
        embed (int64[batch, chunk] input_ids, float[{spec.vocab_size}, {spec.hidden_size}] table) => (float{streams} streams) {{
            axis = Constant <value_ints = [2]> ()
            copies = Constant <value_ints = [1, 1, {spec.hc_mult}, 1]> ()
            rows = Gather (table, input_ids)
            one = Unsqueeze (rows, axis)
            streams = Expand (one, copies)
        }}
    """)
    model.graph.inputs[1].name = "embed.weight"
    return _finish(EMBED, model, ("input_ids",), (STREAMS,), (), roles)


def _written(text: str) -> ir.Model:
    """A graph from its text, in the versions of traced ones."""
    head = f'<ir_version: {_IR_VERSION}, opset_import: ["" : {ONNX_OPSET}]>'
    model = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(head + text))
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
    return ir.from_proto(model)


def _head(spec: ModelSpec, roles: Mapping[str, Source]) -> Segment:
    model = traced_once(["head", _geometry(spec)], lambda: trace_head(spec))
    return _finish(HEAD, model, (STREAMS, "logit_indices"), (LOGITS,), (), roles)


def _layer(spec: ModelSpec, layer: int, profile: str, name: str, roles: Mapping[str, Source]) -> Segment:
    rows = [row for row in state_tensors(spec) if row.layer == layer]
    kind = [profile, spec.layer_types[layer], spec.ratios[layer]]
    first = traced_once(["attention", *kind, _geometry(spec)], lambda: trace_attention(spec, layer, profile))
    second = traced_once(["experts", spec.hash_layers[layer], _geometry(spec)], lambda: trace_experts(spec, layer))
    model = joined(first, second)
    segment = _finish(name, model, _ARGUMENTS, (_AFTER,), tuple(row.group for row in rows), roles)
    _declare(segment, spec, rows)
    return segment


def _geometry(spec: ModelSpec) -> dict[str, object]:
    """What all layers of a model have in common."""
    return {key: value for key, value in spec.to_dict().items() if key not in _NOT_OF_A_LAYER}


def _declare(segment: Segment, spec: ModelSpec, rows: Iterable[StateTensor]) -> None:
    """Give dynamic sizes readable names instead of torch's, and the indexer's choice its name."""
    graph = segment.model.graph
    values = {value.name: value for value in (*graph.inputs, *graph.outputs)}
    for row in rows:
        for name in (past(row.group), present(row.group)):
            values[name].shape = ir.Shape(["batch", f"entries_{row.ratio}" if row.ratio else row.num_rows, row.width])
            values[name].dtype = ir.DataType.FLOAT
    streams = ["batch", "chunk", spec.hc_mult, spec.hidden_size]
    for name, shape in (
        (STREAMS, streams), (_AFTER, streams), ("input_ids", ["batch", "chunk"]), ("positions", ["batch"]),
        ("num_tokens", ["batch"]), (TOKENS, ["batch", "chunk"]), ("active_context", [1]),
    ):  # fmt: skip
        values[name].shape = ir.Shape(shape)
    for node in graph:
        if node.op_type == "FoldkvIndexSelect":
            node.outputs[0].name = CHOSEN


def past(group: str) -> str:
    """The input of a segment with the state of a group."""
    return f"past.{group}"


def present(group: str) -> str:
    """The output of a segment with the state of a group."""
    return f"present.{group}"


def _finish(
    name: str, model: ir.Model, arguments: tuple[str, ...], outputs: tuple[str, ...], groups: tuple[str, ...],
    roles: Mapping[str, Source],
) -> Segment:  # fmt: skip
    """Name inputs and outputs, turn every weight into an input, and attach the operators' bodies."""
    graph = model.graph
    for value, label in zip(graph.inputs, [*arguments, *map(past, groups)], strict=False):
        value.name = label
    for value, label in zip(graph.outputs, [*outputs, *map(present, groups)], strict=True):
        value.name = label
    traced = {value.name or "": value for value in graph.inputs[len(arguments) + len(groups) :]}
    del graph.inputs[len(arguments) + len(groups) :]
    for role, source in roles.items():
        if isinstance(source, Packed):
            _take_packed(model, role, source)
        else:
            _take(model, role, source, traced)
    made = [packed.exponents(), packed.block_scale(), packed.partial_block_scale()]
    made += [_experts_body(source) for source in roles.values() if isinstance(source, Packed)]
    if any(role.startswith(EXPERTS) and _narrow(source) for role, source in roles.items()):
        made.append(grouped_body())  # products in float32: few backends have narrower ones in standard operators
    used = {node.op_type for node in graph}
    for proto in made:
        if proto.name in used:
            model.functions[DOMAIN, proto.name, ""] = ir.serde.deserialize_function(proto)
    add_functions(model)
    graph.name = name
    taken = tuple(value.name or "" for value in graph.inputs[len(arguments) + len(groups) :])
    return Segment(name, model, arguments, groups, taken)


def _experts_body(source: Packed) -> onnx.FunctionProto:
    return packed.routed_experts(source.format, dict(source.matrices), scaled=_scaled(source))


def _narrow(source: Source) -> bool:
    return isinstance(source, Plain) and onnx_dtype(source.weight) in (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)


def _scaled(source: Packed) -> bool:
    return bool(onnx_dtype(source.scales) == ir.DataType.FLOAT)


def _take(model: ir.Model, role: str, source: Plain | Quantised, traced: Mapping[str, ir.Value]) -> None:
    """Let the graph take a stored weight as an input, and convert it to the type that the traced graph has."""
    graph = model.graph
    if role not in traced:
        raise FoldkvError(f"the traced segment has no weight {role}. Report this as a fault of foldkv.")
    value = traced[role]
    stored = _input(model, role, onnx_dtype(source.weight), source.weight.shape)
    if isinstance(source, Quantised):
        nodes = _dequantise(model, role, stored, source)
        _stand_in(value, nodes[-1].outputs[0])
    elif stored.dtype == value.dtype:
        ir.convenience.replace_all_uses_with(value, stored)
        return
    else:
        assert value.dtype is not None
        if _is_table(value):  # rows are looked up, and then converted
            [use] = value.uses()
            looked = use.node.outputs[0]
            cast = ir.node("Cast", [looked], attributes={"to": int(value.dtype)}, name=f"{role}.cast")
            made = cast.outputs[0]
            made.name, made.dtype, made.shape = f"{role}.rows", value.dtype, looked.shape
            ir.convenience.replace_all_uses_with(looked, made)
            cast.replace_input_with(0, looked)
            use.node.replace_input_with(0, stored)
            looked.dtype = stored.dtype
            graph.insert_after(use.node, cast)
            return
        if role.startswith(EXPERTS):  # the body converts the experts that it chose
            ir.convenience.replace_all_uses_with(value, stored)
            return
        if stored.dtype is not None and _read_as_stored(value, stored.dtype):
            ir.convenience.replace_all_uses_with(value, stored)
            return
        nodes = [ir.node("Cast", [stored], attributes={"to": int(value.dtype)}, name=f"{role}.cast")]
        _stand_in(value, nodes[-1].outputs[0])
    graph.insert_before(graph[0], nodes)


def _read_as_stored(value: ir.Value, dtype: ir.DataType) -> bool:
    """Whether operators read a plain weight themselves in the type in which it is stored; if so, they are told the type."""
    name, uses = dtype.name.lower(), list(value.uses())
    declared = [spec.inputs[use.idx].dtype for use in uses if (spec := operator_specs().get(use.node.op_type))]
    if name not in PLAIN_FORMATS or len(declared) < len(uses) or set(declared) != {WEIGHT}:
        return False
    for use in uses:
        use.node.attributes[WEIGHT_FORMAT] = ir.AttrString(WEIGHT_FORMAT, name)
    return True


def _is_table(value: ir.Value) -> bool:
    uses = list(value.uses())
    return len(uses) == 1 and uses[0].node.op_type == "Gather" and uses[0].idx == 0


def _input(model: ir.Model, name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
    model.graph.inputs.append(value)
    return value


def _stand_in(old: ir.Value, new: ir.Value) -> None:
    name, new.shape, new.dtype = old.name, old.shape, old.dtype
    old.name = f"{name}.traced"
    new.name = f"{name}.value"
    ir.convenience.replace_all_uses_with(old, new)


def _dequantise(model: ir.Model, role: str, stored: ir.Value, source: Quantised) -> list[ir.Node]:
    scale = _input(model, scale_name(role), onnx_dtype(source.scale), source.scale.shape)
    nodes = []
    if scale.dtype == ir.DataType.INT8:
        nodes.append(ir.Node(DOMAIN, packed.EXPONENTS, [scale], name=f"{role}.exponents"))
        scale = nodes[0].outputs[0]
        scale.name, scale.dtype, scale.shape = f"{role}.factors", ir.DataType.FLOAT, ir.Shape(source.scale.shape)
    (rows, columns), (r, c), (height, width) = source.weight.shape, source.scale.shape, source.block
    whole = r * height == rows and c * width == columns
    sizes = {"blocks": [r, height, c, width], "grid": [r, 1, c, 1], "shape": [rows, columns]}
    if not whole:
        sizes["whole"] = [r * height, c * width]
    attributes = [ir.AttrInt64s(key, value) for key, value in sizes.items()]
    # Not part of the function: ONNX Runtime does not accept an FP8 value in a nested function.
    one = ir.node("Constant", [], attributes={"value_float": 1.0}, name=f"{role}.one")
    one.outputs[0].name, one.outputs[0].dtype, one.outputs[0].shape = f"{role}.one", ir.DataType.FLOAT, ir.Shape([])
    nodes.append(one)
    nodes.append(ir.node("DequantizeLinear", [stored, one.outputs[0]], name=f"{role}.dequantize"))
    elements = nodes[-1].outputs[0]
    elements.name, elements.dtype, elements.shape = f"{role}.elements", ir.DataType.FLOAT, stored.shape
    kind = packed.BLOCK if whole else packed.PARTIAL
    nodes.append(ir.Node(DOMAIN, kind, [elements, scale], attributes, name=f"{role}.scaled"))
    return nodes


def _take_packed(model: ir.Model, role: str, source: Packed) -> None:
    """Give the routed experts their packed weights instead of float32 ones."""
    graph = model.graph
    node = next(node for node in graph if node.op_type == ROUTED_EXPERTS)
    given = [
        _input(model, f"{role}.codes", ir.DataType.INT8, source.codes.shape),
        _input(model, f"{role}.scales", onnx_dtype(source.scales), source.scales.shape),
    ]
    # A row has the number of its expert here; where rows of a file are used in place, another table stands in.
    slots = ir.Value(
        name=f"{role}.slots", const_value=ir.tensor(list(range(source.codes.shape[0])), name=f"{role}.slots")
    )
    slots.dtype, slots.shape = ir.DataType.INT64, ir.Shape([source.codes.shape[0]])
    graph.register_initializer(slots)
    # The body knows where the matrices are. Engines give the node another body and must know it too.
    geometry = [ir.AttrInt64s(key, values) for key, values in packed_words.geometry(dict(source.matrices)).items()]
    name = (packed.SCALED_EXPERTS if _scaled(source) else packed.EXPERTS)[source.format]
    new = ir.Node(
        DOMAIN, name, [*node.inputs[:3], *given, slots],
        [ir.AttrFloat32("limit", node.attributes["limit"].value), *geometry], name=node.name,
    )  # fmt: skip
    old = node.outputs[0]
    graph.insert_before(node, new)
    output = new.outputs[0]
    output.name, output.shape, output.dtype = old.name, old.shape, old.dtype
    ir.convenience.replace_all_uses_with(old, output)
    graph.remove(node, safe=True)


def _check(chain: Chain, spec: ModelSpec, profile: str) -> None:
    found = chain.operators
    experts = sum(found.pop(name, 0) for name in _EXPERTS)
    for name in (packed.EXPONENTS, packed.BLOCK, packed.PARTIAL):
        found.pop(name, None)
    expected = expected_operators(spec, profile)
    if found | {ROUTED_EXPERTS: experts} != expected:
        raise FoldkvError(
            f"the segments have operators {found}; expected {expected}. Report this as a fault of foldkv."
        )


_EXPERTS = (ROUTED_EXPERTS, *PACKED_EXPERTS.values())
