"""The graph in the form that TensorRT takes: operators inlined, heavy products in low precision, the rest float32.

Injected nodes stay nodes, without a body that could silently replace them. If only plugins touch the rows of the state,
these rows can be packed bytes (export/contract/layouts.py).

Only ``LOW_PRECISION`` says what may be rounded: the large projections, the experts, the
embedding and the head, and the rows of the caches. Everything else stays float32: norms, softmax and
sinks, indexer scores, the compressor with its carries, routing, hyper-connections and Sinkhorn.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, RemoveUnusedFunctionsPass, RemoveUnusedNodesPass

from ...artifact import confined
from ...errors import BuildError
from ...export.contract.geometry import ModelSpec
from ...export.contract.layouts import DENSE, LAYOUTS
from ...export.contract.operators import STATE
from ...export.contract.state import STATE_TYPES, StateTensor
from ...export.external import read_values
from ...export.memory import gathered_tokens
from ...export.operators.experts import FoldkvRoutedExperts, bounded_body
from ...plugins.declarations import PLUGINS
from ...plugins.inject import NAMESPACE_ATTRIBUTE
from ..kept_weights import fp8_gap
from .place_weights import place_weights

#: Weights whose matrix product runs in low precision.
LOW_PRECISION = (
    r"layers\.\d+\.attn\.(wq_a|wq_b|wkv|wo_a|wo_b)\.weight",
    r"layers\.\d+\.ffn\.experts\.(w13|w2)",
    r"layers\.\d+\.ffn\.shared_experts\.w[123]\.weight",
    r"(embed|head)\.weight",
)

_TYPES = {name: ir.DataType(type_.onnx_type) for name, type_ in STATE_TYPES.items()}
_PRECISIONS = ("float32", "bfloat16")
# Folder beside the lowered graph with links to the checkpoint's files, and the size up to which tensors stay in the graph.
_SOURCE, _INLINE_BYTES = "weights", 256
#: The lowered model, and the file beside it with weights that were changed.
MODEL, WEIGHTS = "model.onnx", "weights.bin"
# Nodes between a weight and its product that keep it the same matrix.
_LAYOUT_OPS = {"Transpose", "Reshape", "Gather", "Unsqueeze", "Squeeze", "Identity"}


def lowered_graph(
    model: ir.Model,
    spec: ModelSpec,
    out: Path,
    state: list[StateTensor],
    precision: str,
    *,
    sm: int,
    layout: str = DENSE,
    rope_dim: int = 0,
    tokens: int = 1,
) -> tuple[list[StateTensor], dict[str, Any], dict[str, Any]]:
    """Write the inlined graph in ``precision`` to ``out``; returns its state, the counts of what was lowered, and the format
    of its weights.

    Weights that change are written one at a time. The others stay in the checkpoint's files, and ``out`` has links to those.

    Args:
        model: the flat graph with its weights as initializers (export/stitch.py), perhaps with nodes given to plugins; it
            is changed.
        spec: the geometry.
        out: folder for the lowered graph.
        state: the state tensors of the graph.
        precision: of the large products and of dense rows.
        sm: compute capability that the graph is for; it decides which weight formats stay.
        layout: name of the cache layout; anything but "dense" requires that only plugins touch the rows.
        rope_dim: rotated channels of a row, for packed layouts.
        tokens: the most tokens that the engine takes at once (batch times chunk); decides how experts' weights are gathered.

    Raises:
        ArtifactError: a weight's file ends within the weight.
        BuildError: an unknown precision, a weight of the table that the pass cannot lower, or packed rows that a node
            without a plugin reads.
    """
    if precision not in _PRECISIONS:
        raise BuildError(f"precision {precision!r} is not known; expected one of {', '.join(_PRECISIONS)}.")
    dtype = _TYPES[precision]
    _narrow_experts(model, spec, tokens, dtype)
    stored_weights = place_weights(model, dtype, low=_is_low, no_fp8=fp8_gap(sm))
    kept = {node.op_type for node in model.graph if NAMESPACE_ATTRIBUTE in node.attributes}
    InlinePass(criteria=lambda function: function.name not in kept)(model)
    for node in model.graph:
        if node.op_type in kept and NAMESPACE_ATTRIBUTE not in node.attributes:
            raise BuildError(f"{node.op_type} ({node.name}) has no plugin, but other nodes of its kind have one.")
    for identifier in [key for key, function in model.functions.items() if function.name in kept]:
        del model.functions[identifier]
    RemoveUnusedFunctionsPass()(model)
    counts: dict[str, Any] = {"weights": 0, "products": 0, "state": 0}
    if precision != "float32" or layout != DENSE:
        stored = {tensor.input: LAYOUTS[layout].stored(tensor, rope_dim, precision) for tensor in state}
        counts["state"] = _lower_state(model, state, stored)
        state = [stored[tensor.input] for tensor in state]
    if precision != "float32":
        for name, value in list(model.graph.initializers.items()):
            if _is_low(name) and name not in stored_weights.values:
                _lower_weight(value, dtype, counts)
        for name, value in stored_weights.values.items():
            _lower_products(value, name, dtype, counts)
    RemoveUnusedNodesPass()(model)
    weights = stored_weights.facts(model)
    _write(model, out)
    return state, counts, weights


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
    """Write the graph with the new weights, and links to the files of the others."""
    new = []
    folders: dict[str, str] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        if isinstance(tensor, ir.ExternalTensor):
            folder = folders.setdefault(str(tensor.base_dir), f"{_SOURCE}/{len(folders)}")
            location = f"{folder}/{tensor.location}"
            _link(confined(Path(tensor.base_dir), str(tensor.location)).resolve(), out / location)
            value.const_value = ir.ExternalTensor(
                location, tensor.offset, tensor.length, tensor.dtype, shape=ir.Shape(tensor.shape),
                name=value.name or "", base_dir=out,
            )  # fmt: skip
        elif tensor.nbytes > _INLINE_BYTES:
            new.append(value)
    tensors = [value.const_value for value in new if value.const_value is not None]
    written = ir.external_data.convert_tensors_to_external(tensors, out, WEIGHTS)
    for value, tensor in zip(new, written, strict=True):
        value.const_value = tensor
    ir.save(model, out / MODEL)


def _link(file: Path, link: Path) -> None:
    """A symbolic link, which TensorRT accepts. Not a hard link: onnx refuses packages whose files have several."""
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(file)


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


def _lower_weight(value: ir.Value, dtype: ir.DataType, counts: dict[str, Any]) -> None:
    """Round one weight as it is written, and let its product run in ``dtype``."""
    tensor = value.const_value
    assert tensor is not None
    if tensor.dtype != dtype:

        def rounded() -> ir.Tensor:
            return ir.Tensor(read_values(tensor).astype(dtype.numpy()), name=value.name)

        value.const_value = ir.LazyTensor(rounded, dtype, ir.Shape(tensor.shape), name=value.name)
        value.dtype = dtype
    _lower_products(value, value.name or "?", dtype, counts)


def _lower_products(value: ir.Value, name: str, dtype: ir.DataType, counts: dict[str, Any]) -> None:
    """Let the nodes that use a weight run in ``dtype``, and go back to float32 after them."""
    counts["weights"] += 1
    for node, index in list(value.uses()):
        _follow(node, index, name, dtype, counts)


def _follow(node: ir.Node, index: int, name: str, dtype: ir.DataType, counts: dict[str, Any]) -> None:
    output = node.outputs[0]
    if node.op_type in ("MatMul", "Gemm"):
        for position, operand in enumerate(node.inputs[:2]):
            if operand is not None and position != index and operand.dtype != dtype:
                node.replace_input_with(position, _cast(node, operand, dtype, before=True))
        _back_to_float(node, output, dtype)
        counts["products"] += 1
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
