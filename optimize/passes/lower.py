"""A segment in the form that TensorRT takes: operators inlined, heavy products in low precision, the rest float32.

Weights stay inputs. What an engine takes in another form than stored is brought into it when it is loaded
(export/contract/engine_set.py), so nothing here reads a weight, and a plan does not depend on one.

Injected nodes stay nodes, without a body that could silently replace them. If only plugins touch the rows of the state,
these rows can be packed bytes (export/contract/layouts.py).

Only ``LOW_PRECISION`` says what may be rounded: the large projections, the experts, the
embedding and the head, and the rows of the caches. Everything else stays float32: norms, softmax and
sinks, indexer scores, the compressor with its carries, routing, hyper-connections and Sinkhorn.
Products that plugins compute (linears.py) follow the same rule, and their weights stay as stored.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, RemoveUnusedFunctionsPass, RemoveUnusedNodesPass

from ...errors import BuildError
from ...export.contract.engine_set import CONVERTED, STORED, Taken
from ...export.contract.geometry import ModelSpec
from ...export.contract.layouts import DENSE, LAYOUTS
from ...export.contract.lock import Weight
from ...export.contract.operators import STATE
from ...export.contract.state import STATE_TYPES, StateTensor
from ...export.memory import gathered_tokens
from ...export.operators.experts import FoldkvRoutedExperts, bounded_body
from ...export.roles import DTYPE_NAMES, onnx_dtype
from ...plugins.declarations import PLUGINS
from ...plugins.inject import NAMESPACE_ATTRIBUTE
from .place_weights import Stored, absent, place_weights

#: Weights, by role, whose matrix product runs in low precision.
LOW_PRECISION = (
    r"attn\.(wq_a|wq_b|wkv|wo_a|wo_b)\.weight",
    r"ffn\.experts\.(w13|w2)",
    r"ffn\.shared_experts\.w[123]\.weight",
    r"(embed|head)\.weight",
)

_FLOAT = ir.DataType.FLOAT
_TYPES = {name: ir.DataType(type_.onnx_type) for name, type_ in STATE_TYPES.items()}
_PRECISIONS = ("float32", "bfloat16")
# The size up to which constants stay in the graph's file.
_INLINE_BYTES = 256
#: The lowered model, and the file beside it with its constants.
MODEL, CONSTANTS = "model.onnx", "constants.bin"
# Nodes between a weight and its product that keep it the same matrix.
_LAYOUT_OPS = {"Transpose", "Reshape", "Gather", "Unsqueeze", "Squeeze", "Identity"}


@dataclass(frozen=True)
class Lowered:
    """A segment as an engine has it.

    Attributes:
        state: its state tensors as the engine keeps them.
        counts: weights that plugins read as stored, other weights and products in low precision, and changed state tensors.
        weights: how it takes each weight, by role, in the order of its inputs.
        widened: weights that are taken wider than stored, by stored format and reason.
    """

    state: list[StateTensor]
    counts: dict[str, int]
    weights: dict[str, Taken]
    widened: Counter[tuple[str, str]]


def lowered_segment(
    model: ir.Model,
    roles: Mapping[str, Weight],
    spec: ModelSpec,
    out: Path,
    state: list[StateTensor],
    precision: str,
    *,
    layout: str = DENSE,
    rope_dim: int = 0,
    tokens: int = 1,
) -> Lowered:
    """Write the inlined segment in ``precision`` to ``out``.

    Args:
        model: the segment, perhaps with nodes given to plugins; it is changed.
        roles: the weights that it takes, by role, as they are stored.
        spec: the geometry.
        out: folder for the lowered graph.
        state: the state tensors of the segment, with the names of its inputs and outputs.
        precision: of the large products and of dense rows.
        layout: name of the cache layout; anything but "dense" requires that only plugins touch the rows.
        rope_dim: rotated channels of a row, for packed layouts.
        tokens: the most tokens that the engine takes at once (batch times chunk); decides how experts' weights are gathered.

    Raises:
        BuildError: an unknown precision, a weight of the table that the pass cannot lower, or packed rows that a node
            without a plugin reads.
    """
    if precision not in _PRECISIONS:
        raise BuildError(f"precision {precision!r} is not known; expected one of {', '.join(_PRECISIONS)}.")
    dtype = _TYPES[precision]
    _bind(model, roles)
    _narrow_experts(model, spec, tokens, dtype)
    stored_weights = place_weights(model, dtype, low=_is_low)
    kept = {node.op_type for node in model.graph if NAMESPACE_ATTRIBUTE in node.attributes}
    InlinePass(criteria=lambda function: function.name not in kept)(model)
    for node in model.graph:
        if node.op_type in kept and NAMESPACE_ATTRIBUTE not in node.attributes:
            raise BuildError(f"{node.op_type} ({node.name}) has no plugin, but other nodes of its kind have one.")
    for identifier in [key for key, function in model.functions.items() if function.name in kept]:
        del model.functions[identifier]
    RemoveUnusedFunctionsPass()(model)
    counts: dict[str, int] = {"stored": len(stored_weights.plugins), "weights": 0, "products": 0, "state": 0}
    if precision != "float32" or layout != DENSE:
        stored = {tensor.input: LAYOUTS[layout].stored(tensor, rope_dim, precision) for tensor in state}
        counts["state"] = _lower_state(model, state, stored)
        state = [stored[tensor.input] for tensor in state]
    if precision != "float32":
        for name, value in list(model.graph.initializers.items()):
            if name in roles and _is_low(name) and name not in stored_weights.plugins:
                _lower_weight(value, dtype, counts)
    _widen_early(model, roles)
    RemoveUnusedNodesPass()(model)
    for value in list(model.graph.inputs):  # of the step tensors, a kind of layer may need only some
        if not value.uses() and not value.is_graph_output():
            model.graph.inputs.remove(value)
    weights = _release(model, roles, stored_weights)
    _write(model, out)
    return Lowered(state, counts, weights, stored_weights.widened)


def _bind(model: ir.Model, roles: Mapping[str, Weight]) -> None:
    """Let the passes see every weight as an initializer of its type and shape; its bytes are nowhere."""
    for value in [value for value in model.graph.inputs if value.name in roles]:
        model.graph.inputs.remove(value)
        assert value.dtype is not None
        value.const_value = absent(value.name or "", value.dtype, value.shape)
        model.graph.register_initializer(value)


def _widen_early(model: ir.Model, roles: Mapping[str, Weight]) -> None:
    """Take weights in float32 that every step would convert to it: an engine would write the copy again in every step."""
    for name, value in list(model.graph.initializers.items()):
        users = [user for user, _ in value.uses()]
        casts = [user for user in users if user.op_type == "Cast" and user.attributes["to"].as_int() == int(_FLOAT)]
        if name not in roles or value.dtype == _FLOAT or not users or len(casts) != len(users):
            continue
        for cast in casts:
            ir.convenience.replace_all_uses_with(cast.outputs[0], value)
            model.graph.remove(cast, safe=True)
        value.dtype, value.const_value = _FLOAT, absent(name, _FLOAT, value.shape)


def _release(model: ir.Model, roles: Mapping[str, Weight], stored: Stored) -> dict[str, Taken]:
    """Turn the weights into inputs again, and say how each is to be loaded."""
    found = {}
    for name in roles:
        value = model.graph.initializers.pop(name, None)
        if value is None:  # scales of a matrix that is taken without them
            continue
        assert value.dtype is not None and value.shape is not None
        value.const_value = None
        model.graph.inputs.append(value)
        shape, dtype = tuple(int(size) for size in value.shape), DTYPE_NAMES[value.dtype]
        load = stored.loads.get(name)
        if load is not None:
            found[name] = replace(load, dtype=dtype, shape=shape)
        else:
            same = value.dtype == onnx_dtype(roles[name]) or name in stored.plugins
            form = STORED if same else CONVERTED
            found[name] = Taken(form, dtype, shape)
    return found


def _narrow_experts(model: ir.Model, spec: ModelSpec, tokens: int, dtype: ir.DataType) -> None:
    """Give plain experts a body whose products run in the weights' type, and which gathers the weights of a few tokens at a
    time if ``tokens`` at once would be too many."""
    at_once = gathered_tokens(spec, int(dtype.itemsize))
    proto = FoldkvRoutedExperts.to_function_proto() if tokens <= at_once else bounded_body(at_once)
    body = ir.serde.deserialize_function(proto)
    if body.identifier() in model.functions:
        model.functions[body.identifier()] = body


def _is_low(name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in LOW_PRECISION)


def _write(model: ir.Model, out: Path) -> None:
    """Write the graph, with its larger constants in a file beside it."""
    new = [value for value in model.graph.initializers.values() if value.const_value is not None]
    tensors = [value.const_value for value in new if value.const_value.nbytes > _INLINE_BYTES]
    written = dict(
        zip(
            (t.name for t in tensors),
            ir.external_data.convert_tensors_to_external(tensors, out, CONSTANTS),
            strict=True,
        )
    )
    for value in new:
        value.const_value = written.get(value.name, value.const_value)
    ir.save(model, out / MODEL)


def _lower_state(model: ir.Model, state: list[StateTensor], stored: dict[str, StateTensor]) -> int:
    """Store cache rows as the engine keeps them; returns the number of changed tensors. The operators' bodies cast what they
    read and write themselves, and plugins know the type."""
    values = {value.name: value for value in (*model.graph.inputs, *model.graph.outputs)}
    changed = 0
    for tensor in state:
        new = stored[tensor.input]
        if new == tensor:
            continue
        changed += 1
        for name in (tensor.input, tensor.output):
            _retype(values[name], new)
            packed = new.dtype == "int8"
            for node in [*(user for user, _ in values[name].uses()), values[name].producer()]:
                if packed and node is not None and NAMESPACE_ATTRIBUTE not in node.attributes:
                    raise BuildError(
                        f"{name} is packed, but {node.op_type} ({node.name}) touches it and is not a plugin."
                    )
        # `rows` (the ring, then the chunk) is kept like the ring.
        for node, _ in values[tensor.input].uses():
            if NAMESPACE_ATTRIBUTE not in node.attributes:
                continue
            for value, declared in zip(node.outputs, PLUGINS[node.op_type].outputs, strict=True):
                if declared.dtype == STATE:
                    _retype(value, new)
    return changed


def _retype(value: ir.Value, tensor: StateTensor) -> None:
    value.dtype = _TYPES[tensor.dtype]
    if value.shape is not None:
        value.shape = ir.Shape([*value.shape.dims[:-1], tensor.width])


def _lower_weight(value: ir.Value, dtype: ir.DataType, counts: dict[str, int]) -> None:
    """Take one weight in ``dtype``, and let its products run in it."""
    if value.dtype != dtype:
        value.const_value, value.dtype = absent(value.name or "", dtype, value.shape), dtype
    _lower_products(value, value.name or "?", dtype, counts)


def _lower_products(value: ir.Value, name: str, dtype: ir.DataType, counts: dict[str, int]) -> None:
    """Let the nodes that use a weight run in ``dtype``, and go back to float32 after them."""
    counts["weights"] += 1
    for node, index in list(value.uses()):
        _follow(node, index, name, dtype, counts)


def _follow(node: ir.Node, index: int, name: str, dtype: ir.DataType, counts: dict[str, int]) -> None:
    output = node.outputs[0]
    if node.op_type in ("MatMul", "Gemm"):
        for position, operand in enumerate(node.inputs[:2]):
            if operand is not None and position != index and operand.dtype != dtype:
                node.replace_input_with(position, _cast(node, operand, dtype, before=True))
        _back_to_float(node, output, dtype)
        counts["products"] += 1
    elif NAMESPACE_ATTRIBUTE in node.attributes:
        counts["products"] += 1  # the plugin rounds what it multiplies with the weight
    elif node.op_type == "CastLike":
        return  # an activation that takes the weight's type, as intended
    elif node.op_type == "Gather" and name == "embed.weight":
        _back_to_float(node, output, dtype)
        counts["products"] += 1
    elif node.op_type in _LAYOUT_OPS and index == 0:
        output.dtype = dtype
        for user, place in list(output.uses()):
            _follow(user, place, name, dtype, counts)
    else:
        raise BuildError(f"weight {name} is used by {node.op_type} ({node.name}), which cannot run in low precision.")


def _cast(node: ir.Node, value: ir.Value, dtype: ir.DataType, *, before: bool) -> ir.Value:
    cast = ir.node("Cast", [value], attributes={"to": int(dtype)}, name=f"{node.name}_{'in' if before else 'out'}_cast")
    cast.outputs[0].name = f"{node.name}_{value.name}_{'low' if before else 'float'}"
    cast.outputs[0].dtype = dtype
    cast.outputs[0].shape = value.shape
    graph = node.graph
    assert graph is not None
    if before:
        graph.insert_before(node, cast)
    else:
        graph.insert_after(node, cast)
    return cast.outputs[0]


def _back_to_float(node: ir.Node, output: ir.Value, dtype: ir.DataType) -> None:
    if any(user.op_type == "Cast" for user, _ in output.uses()) and len(list(output.uses())) == 1:
        output.dtype = dtype
        return  # the body casts already
    users = list(output.uses())
    wide = _cast(node, output, ir.DataType.FLOAT, before=False)
    for user, place in users:
        user.replace_input_with(place, wide)
    graph = node.graph
    assert graph is not None
    for place, value in enumerate(graph.outputs):
        if value is output:  # a product that is an output of the graph keeps its name and type
            name, output.name = output.name, f"{output.name}_low"
            wide.name = name
            graph.outputs[place] = wide
    output.dtype = dtype
