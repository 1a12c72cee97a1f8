"""A checkpoint's stored weights in the form that a target's engines take: narrow if the engines keep that, else widened.

A package exported with weights as stored gives them to the graph as bytes. Here each becomes what an engine takes:

- e4m3 matrices on GPUs whose engines keep them (optimize/kept_weights.py): a DequantizeLinear with scale one, and a product with
  the block scales in the precision of the product that follows. ONNX Runtime computes the same nodes;
- e4m3 matrices elsewhere, or whose last block is cut off: dequantised, each as it is written. Element times power of two is
  exact in bfloat16, so both give the same values;
- routed experts: int32 words that are gathered and then decoded (export/operators/packed_words.py), on every GPU;
- bfloat16 and float16: unchanged.

Only scales are read. A weight that must be written again is a lazy tensor: it is read when it is written, and then released.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ...errors import BuildError
from ...export.checkpoint.formats import FP8
from ...export.checkpoint.values import scale_values
from ...export.external import read_values
from ...export.operators.packed import BLOCK, EXPONENTS, PARTIAL, PARTS, Matrix
from ...export.operators.packed_words import (
    WORD,
    code_bytes,
    format_of_node,
    matrices_of,
    routed_experts_words,
    scale_bytes,
)
from ...export.operators.registry import DOMAIN

_NARROW = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)


@dataclass
class Stored:
    """How the weights were changed.

    Attributes:
        values: matrices that a node computes in low precision, by the weight's name.
        formats: format of initializers whose dtype does not tell it, by name.
        widened: weights by (stored format, reason why it is not kept).
    """

    values: dict[str, ir.Value] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)
    widened: Counter[tuple[str, str]] = field(default_factory=Counter)

    def facts(self, model: ir.Model) -> dict[str, Any]:
        """The graph's initializers and their bytes by format, and which were widened and why, as JSON values."""
        kept: dict[str, dict[str, int]] = {}
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            assert tensor is not None
            format_ = self.formats.get(name) or tensor.dtype.numpy().name
            row = kept.setdefault(format_, {"tensors": 0, "bytes": 0})
            row["tensors"] += 1
            row["bytes"] += tensor.nbytes
        widened = [
            {"stored": key[0], "weights": count, "reason": key[1]} for key, count in sorted(self.widened.items())
        ]
        return {"kept": dict(sorted(kept.items())), "widened": widened}


def place_weights(model: ir.Model, dtype: ir.DataType, *, low: Callable[[str], bool], no_fp8: str = "") -> Stored:
    """Bring the weights of a flat graph into the form that engines take, in place.

    Args:
        model: flat, with the operators on weights (export/operators/packed.py) still nodes.
        dtype: of products in low precision.
        low: whether the product of the weight with that name runs in ``dtype``; the others run in float32.
        no_fp8: why e4m3 matrices are not kept; empty if they are.

    Raises:
        BuildError: an older package that does not say where the matrices of its experts are.
    """
    stored = Stored()
    _place_experts(model, dtype, stored)
    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_type in (BLOCK, PARTIAL):
            _place_matrix(model, node, dtype, low, no_fp8, stored)
    for name, value in model.graph.initializers.items():
        if value.dtype in _NARROW and dtype != ir.DataType.FLOAT and low(name):
            for user, _ in list(value.uses()):
                if user.op_type == "Cast":
                    ir.convenience.replace_all_uses_with(user.outputs[0], value)
                    model.graph.remove(user, safe=True)
    return stored


def _place_matrix(
    model: ir.Model, node: ir.Node, dtype: ir.DataType, low: Callable[[str], bool], no_fp8: str, stored: Stored
) -> None:
    """An e4m3 matrix: DequantizeLinear, then a FoldkvBlockScale or FoldkvPartialBlockScale."""
    elements, factors = node.inputs
    assert elements is not None and factors is not None
    dequantize, exponents = elements.producer(), factors.producer()
    assert dequantize is not None and dequantize.inputs[0] is not None
    codes = dequantize.inputs[0]
    name = codes.name or ""
    powers = exponents is not None and exponents.op_type == EXPONENTS
    scale = exponents.inputs[0] if exponents is not None and powers else factors
    assert scale is not None and scale.const_value is not None and codes.const_value is not None
    sizes = {key: tuple(node.attributes[key].as_ints()) for key in ("blocks", "grid", "shape")}
    reason = no_fp8
    if node.op_type == PARTIAL:
        reason = "its last block is cut off, and engines scale whole blocks"
    elif not name.startswith("layers."):
        reason = "embedding and head are kept in the precision of their product"
    output = node.outputs[0]
    if reason:
        del model.graph.initializers[name]
        wide = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(sizes["shape"]))
        wide.const_value = _dequantised(name, codes.const_value, scale.const_value, sizes)
        model.graph.register_initializer(wide)
        ir.convenience.replace_all_uses_with(output, wide)
        stored.widened[FP8, reason] += 1
        return
    target = dtype if low(name) else ir.DataType.FLOAT
    # Scales that are not powers of two would be rounded: those products stay float32.
    inner = target if powers else ir.DataType.FLOAT
    tiles = _initializer(
        model, f"{name}.factors", _scales(scale.const_value).reshape(sizes["grid"]).astype(inner.numpy())
    )
    one = _initializer(model, f"{name}.unit", np.ones((), inner.numpy()))
    blocks, shape = (_initializer(model, f"{name}.{key}", np.array(sizes[key])) for key in ("blocks", "shape"))
    nodes = [ir.node("DequantizeLinear", [codes, one], name=f"{name}.dequantize")]
    nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], blocks], name=f"{name}.tile"))
    nodes.append(ir.node("Mul", [nodes[-1].outputs[0], tiles], name=f"{name}.scale"))
    nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], shape], name=f"{name}.untile"))
    if inner != target:
        nodes.append(ir.node("Cast", [nodes[-1].outputs[0]], attributes={"to": int(target)}, name=f"{name}.narrow"))
    for made in nodes:
        made.outputs[0].name, made.outputs[0].dtype = f"{made.name}d", inner
    value = nodes[-1].outputs[0]
    value.dtype, value.shape = target, ir.Shape(sizes["shape"])
    model.graph.insert_before(node, nodes)
    ir.convenience.replace_all_uses_with(output, value)
    stored.formats |= {name: FP8, f"{name}.factors": FP8}
    if target == dtype != ir.DataType.FLOAT:
        stored.values[name] = value


def _place_experts(model: ir.Model, dtype: ir.DataType, stored: Stored) -> None:
    """Routed experts: rows of words, and a body that reads them."""
    placed: dict[str, dict[str, Matrix]] = {}
    for node in model.graph:
        format_ = format_of_node(node.op_type) if node.domain == DOMAIN else None
        if format_ is None:
            continue
        try:
            matrices = matrices_of(
                {key: attribute.as_ints() for key, attribute in node.attributes.items() if key != "limit"}
            )
        except KeyError as error:
            raise BuildError(
                f"{node.op_type} ({node.name}) does not say where its matrices are: attribute {error} is missing. The graph "
                "was exported by an older foldkv: export the checkpoint again."
            ) from None
        codes, scales = node.inputs[3], node.inputs[4]
        assert codes is not None and scales is not None
        code_spans = {part: (one.codes, code_bytes(one, format_)) for part, one in matrices.items()}
        scale_spans = {part: (one.scales, scale_bytes(one)) for part, one in matrices.items()}
        codes_at, scales_at = _to_words(codes, code_spans), _to_words(scales, scale_spans)
        for value in (codes, scales):
            stored.formats[value.name or ""] = format_
        moved = {
            part: replace(one, codes=codes_at[part], scales=scales_at[part]) for part, one in matrices.items()
        }  # fmt: skip
        if placed.setdefault(node.op_type, moved) != moved:
            raise BuildError(
                f"{node.op_type} ({node.name}) stores its experts differently from other layers. Export the "
                "checkpoint with --weights repack, which stores them all alike."
            )
    for op_type, matrices in placed.items():
        format_ = format_of_node(op_type)
        assert format_ is not None
        proto = routed_experts_words(format_, matrices, dtype.numpy().name)
        model.functions[DOMAIN, op_type, ""] = ir.serde.deserialize_function(proto)


def _to_words(value: ir.Value, spans: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Turn rows of bytes into rows of int32, in place; returns the byte at which each part of a row then begins.

    If rows and parts begin at whole words, these are the same bytes of the same file.
    """
    tensor = value.const_value
    assert tensor is not None
    count, row = (int(size) for size in tensor.shape)
    if isinstance(tensor, ir.ExternalTensor) and not any(
        size % WORD for size in (row, *(at for at, _ in spans.values()))
    ):
        shape = ir.Shape([count, row // WORD])
        value.const_value = ir.ExternalTensor(
            tensor.location, tensor.offset, tensor.length, ir.DataType.INT32, shape=shape, name=value.name or "",
            base_dir=tensor.base_dir,
        )  # fmt: skip
        starts = {part: at for part, (at, _) in spans.items()}
    else:
        starts, end = {}, 0
        for part in PARTS:
            starts[part] = end
            end += -(-spans[part][1] // WORD) * WORD

        def aligned() -> ir.Tensor:
            bytes_ = read_values(tensor)
            rows = np.zeros((count, end), np.int8)
            for part, (at, length) in spans.items():
                rows[:, starts[part] : starts[part] + length] = bytes_[:, at : at + length]
            return ir.Tensor(rows.view("<i4"), name=value.name)

        shape = ir.Shape([count, end // WORD])
        value.const_value = ir.LazyTensor(aligned, ir.DataType.INT32, shape, name=value.name)
    value.dtype, value.shape = ir.DataType.INT32, shape
    return starts


def _dequantised(
    name: str, codes: ir.TensorProtocol, scale: ir.TensorProtocol, sizes: Mapping[str, tuple[int, ...]]
) -> ir.LazyTensor:
    """The values of a matrix in float32, computed on demand."""
    rows, columns = sizes["shape"]
    _, height, _, width = sizes["blocks"]

    def values() -> ir.Tensor:
        factors = _scales(scale).repeat(height, axis=0)[:rows].repeat(width, axis=1)[:, :columns]
        return ir.Tensor(read_values(codes).astype(np.float32) * factors, name=name)

    return ir.LazyTensor(values, ir.DataType.FLOAT, ir.Shape([rows, columns]), name=name)


def _scales(scale: ir.TensorProtocol) -> np.ndarray:
    """Scales as float32, from float32 or from exponents that the graph has as int8."""
    values = read_values(scale)
    if values.dtype == np.float32:
        return values
    return np.asarray(scale_values(torch.from_numpy(np.array(values).view(np.uint8))).numpy())


def _initializer(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.Tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    model.graph.register_initializer(value)
    return value
