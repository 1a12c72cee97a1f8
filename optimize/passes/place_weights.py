"""A checkpoint's stored weights in the form that a target's engines take: narrow if the engines keep that, else widened.

A segment takes weights as they are stored, as bytes. Here each becomes what an engine takes:

- weights that plugins read (linears.py, and routed experts): unchanged, on every GPU;
- other e4m3 matrices: their values, in the precision of the product;
- other routed experts: int32 words that are gathered and then decoded (export/operators/packed_words.py), on every GPU;
- bfloat16 and float16: unchanged.

No weight is read: what changes is what the graph takes, and :class:`Stored` says what a loader must do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from ...errors import BuildError, FoldkvError
from ...export.checkpoint.formats import FP8
from ...export.contract.engine_set import DEQUANTISED, WORDS, Taken
from ...export.contract.operators import BLOCK_LINEAR, PACKED_EXPERTS, WEIGHT
from ...export.operators.packed import BLOCK, EXPERTS, EXPONENTS, PARTIAL, PARTS
from ...export.operators.packed_words import (
    WORD,
    code_bytes,
    format_of_node,
    matrices_of,
    routed_experts_words,
    scale_bytes,
)
from ...export.operators.registry import DOMAIN
from ...plugins.declarations import PLUGINS
from ...plugins.inject import NAMESPACE_ATTRIBUTE

_NARROW = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)


@dataclass
class Stored:
    """How the weights were changed.

    Attributes:
        plugins: names of the weights that plugins read as they are stored.
        loads: how the changed ones are to be loaded, by name.
        widened: weights by (stored format, reason why it is not kept).
    """

    plugins: frozenset[str] = frozenset()
    loads: dict[str, Taken] = field(default_factory=dict)
    widened: Counter[tuple[str, str]] = field(default_factory=Counter)


def absent(name: str, dtype: ir.DataType, shape: ir.Shape | None) -> ir.LazyTensor:
    """A weight that only has a type and a shape."""

    def read() -> ir.Tensor:
        raise FoldkvError(f"a build asked for the values of {name}. Report this as a fault of foldkv.")

    assert shape is not None
    return ir.LazyTensor(read, dtype, shape, name=name)


def place_weights(model: ir.Model, dtype: ir.DataType, *, low: Callable[[str], bool]) -> Stored:
    """Bring the weights of a segment into the form that engines take, in place.

    Args:
        model: with weights as initializers, and the operators on weights (export/operators/packed.py) still nodes.
        dtype: of products in low precision.
        low: whether the product of the weight with that name runs in ``dtype``; the others run in float32.

    Raises:
        BuildError: an older package that does not say where the matrices of its experts are.
    """
    stored = Stored(_left_to_plugins(model))
    _place_experts(model, dtype, stored)
    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_type in (BLOCK, PARTIAL):
            _place_matrix(model, node, dtype if low(_codes(node).name or "") else ir.DataType.FLOAT, stored)
    for name, value in model.graph.initializers.items():
        if value.dtype in _NARROW and dtype != ir.DataType.FLOAT and low(name):
            for user, _ in list(value.uses()):
                if user.op_type == "Cast":
                    ir.convenience.replace_all_uses_with(user.outputs[0], value)
                    model.graph.remove(user, safe=True)
    return stored


def _left_to_plugins(model: ir.Model) -> frozenset[str]:
    """Names of the weights that plugins read. Products that became nodes for the plugin keep theirs in any case."""
    found = set()
    for node in model.graph:
        spec = PLUGINS.get(node.op_type) if node.domain == DOMAIN else None
        given = NAMESPACE_ATTRIBUTE in node.attributes
        for tensor, value in zip(spec.inputs if spec else (), node.inputs, strict=False):
            if tensor.dtype == WEIGHT and value is not None and (given or node.op_type == BLOCK_LINEAR):
                found.add(value.name or "")
        if node.op_type in PACKED_EXPERTS.values() and given:
            for value in node.inputs[3:5]:
                assert value is not None
                found.add(value.name or "")
                _without_channels(value)
    return frozenset(found)


def _without_channels(value: ir.Value) -> None:
    """Give rows of bytes an axis of 1 before the bytes, in place.

    TensorRT takes the second axis of an int8 input for its channels, and writes a scale and a zero point of each into the plan:
    102 MiB for the experts of V4-Flash.
    """
    assert value.shape is not None and value.dtype is not None
    rows, length = value.shape
    value.shape = ir.Shape([rows, 1, length])
    value.const_value = absent(value.name or "", value.dtype, value.shape)


def _codes(node: ir.Node) -> ir.Value:
    """The e4m3 matrix of a FoldkvBlockScale or FoldkvPartialBlockScale, which a DequantizeLinear reads."""
    elements = node.inputs[0]
    producer = elements.producer() if elements is not None else None
    assert producer is not None and producer.inputs[0] is not None
    return producer.inputs[0]


def _place_matrix(model: ir.Model, node: ir.Node, dtype: ir.DataType, stored: Stored) -> None:
    """Take the values of an e4m3 matrix in ``dtype``; the nodes that made them are left unused."""
    codes, factors = _codes(node), node.inputs[1]
    assert factors is not None
    exponents = factors.producer()
    scale = exponents.inputs[0] if exponents is not None and exponents.op_type == EXPONENTS else factors
    assert scale is not None
    name = codes.name or ""
    sizes = {key: tuple(node.attributes[key].as_ints()) for key in ("blocks", "shape")}
    del model.graph.initializers[name]
    codes.name = f"{name}.stored"
    wide = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(sizes["shape"]))
    wide.const_value = absent(name, dtype, wide.shape)
    model.graph.register_initializer(wide)
    model.graph.register_initializer(codes)
    ir.convenience.replace_all_uses_with(node.outputs[0], wide)
    _, height, _, width = sizes["blocks"]
    stored.loads[name] = Taken(DEQUANTISED, "", (), scale=scale.name or "", block=(int(height), int(width)))
    stored.widened[FP8, "no plugin reads it"] += 1


def _place_experts(model: ir.Model, dtype: ir.DataType, stored: Stored) -> None:
    """Routed experts without a plugin: rows of words, and a body that reads them."""
    for node in model.graph:
        format_ = format_of_node(node.op_type) if node.domain == DOMAIN else None
        if format_ is None:
            continue
        codes, scales = node.inputs[3], node.inputs[4]
        assert codes is not None and scales is not None
        if codes.name in stored.plugins:
            continue
        if node.op_type not in EXPERTS.values():
            raise BuildError(
                f"{node.op_type} ({node.name}) has float32 scales, which no function body for engines reads. Build with plugins."
            )
        try:
            matrices = matrices_of(
                {key: attribute.as_ints() for key, attribute in node.attributes.items() if key != "limit"}
            )
        except KeyError as error:
            raise BuildError(
                f"{node.op_type} ({node.name}) does not say where its matrices are: attribute {error} is missing. The graph "
                "was exported by an older foldkv: export the checkpoint again."
            ) from None
        code_spans = {part: (one.codes, code_bytes(one, format_)) for part, one in matrices.items()}
        scale_spans = {part: (one.scales, scale_bytes(one)) for part, one in matrices.items()}
        codes_at, scales_at = _to_words(codes, code_spans, stored), _to_words(scales, scale_spans, stored)
        moved = {part: replace(one, codes=codes_at[part], scales=scales_at[part]) for part, one in matrices.items()}
        proto = routed_experts_words(format_, moved, dtype.numpy().name)
        model.functions[DOMAIN, node.op_type, ""] = ir.serde.deserialize_function(proto)


def _to_words(value: ir.Value, spans: Mapping[str, tuple[int, int]], stored: Stored) -> dict[str, int]:
    """Turn rows of bytes into rows of int32, in place; returns the byte at which each part of a row then begins.

    If rows and parts begin at whole words, these are the same bytes.
    """
    tensor = value.const_value
    assert tensor is not None
    count, row = (int(size) for size in tensor.shape)
    if any(size % WORD for size in (row, *(at for at, _ in spans.values()))):
        starts, end, moves = {}, 0, []
        for part in PARTS:
            at, length = spans[part]
            starts[part] = end
            moves.append((at, length, end))
            end += -(-length // WORD) * WORD
        row = end
    else:
        starts, moves = {part: at for part, (at, _) in spans.items()}, []
    name = value.name or ""
    value.dtype, value.shape = ir.DataType.INT32, ir.Shape([count, row // WORD])
    value.const_value = absent(name, ir.DataType.INT32, value.shape)
    stored.loads[name] = Taken(WORDS, "", (), spans=tuple(moves))
    return starts
