"""Products with weights as stored become FoldkvBlockLinear nodes, whose plugin reads every byte of a weight once.

In function bodies TensorRT writes a copy of each e4m3 matrix in the products' type, and of each bfloat16 matrix whose product
is float32, on every call. Which products these are, and how exact, is in export/contract/products.py. A weight in another
type (float32, float16) stays as it is; so does one whose blocks no kernel reads.

The graph is flat or a segment, and its weights are inputs or initializers: they keep their bytes and their names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ...export.contract.geometry import ModelSpec
from ...export.contract.operators import BLOCK_LINEAR
from ...export.contract.products import Product, all_products
from ...export.contract.weights import BFLOAT16, E4M3, EXPONENT, FLOAT32, SCALE_FORMAT, WEIGHT_FORMAT
from ...export.operators.linear import FoldkvBlockLinear
from ...export.operators.packed import BLOCK, EXPONENTS, PARTIAL
from ...export.operators.registry import DOMAIN
from ...plugins.launch import kernels
from .functions import attach
from .products import GROUPED, permutation, product_of, remove_unused

#: The scale of weights that have none.
UNIT = "unit_scale"


@dataclass(frozen=True)
class _Stored:
    """A weight as a graph has it: its bytes, its scales (None without), the size of their blocks, its values in float32."""

    weight: ir.Value
    scale: ir.Value | None
    block: tuple[int, int]
    value: ir.Value


def read_stored(model: ir.Model, spec: ModelSpec, *, sm: int) -> int:
    """Turn the products of layers and head into FoldkvBlockLinear nodes, in place; returns how many.

    Args:
        model: a flat graph or a segment, in which the operators on weights (export/operators/packed.py) are still nodes.
        spec: the geometry.
        sm: compute capability of the engine, for what its kernels read.

    Raises:
        BuildError: a weight is not used as in a product.
    """
    products = {product.role: product for product in all_products(spec)}
    made = 0
    for weight in [*model.graph.inputs, *model.graph.initializers.values()]:
        product = products.get(_role(weight.name or ""))
        stored = None if product is None else _stored(weight)
        if product is None or stored is None:
            continue
        attributes = _attributes(stored, product)
        try:
            kernels(BLOCK_LINEAR, _sizes(stored), attributes, sm=sm, dtype="bfloat16")
        except ValueError:
            continue
        _replace(model, stored, attributes)
        made += 1
    if made:
        attach(model, FoldkvBlockLinear)
    return made


def _role(name: str) -> str:
    """The role of a weight, before which flat graphs write its layer."""
    return name.split(".", 2)[2] if name.startswith("layers.") else name


def _stored(weight: ir.Value) -> _Stored | None:
    """How a graph reads a weight, if that is as the plugin could."""
    users = [user for user, _ in weight.uses()]
    if len(users) != 1 or weight.shape is None:
        return None
    value, (rows, columns) = users[0].outputs[0], (int(size) for size in weight.shape)
    if weight.dtype == ir.DataType.BFLOAT16 and users[0].op_type == "Cast":
        return _Stored(weight, None, (rows, columns), value)
    if weight.dtype != ir.DataType.FLOAT8E4M3FN or users[0].op_type != "DequantizeLinear":
        return None
    [(scaled, _)] = value.uses()
    if scaled.op_type not in (BLOCK, PARTIAL):
        return None
    factors = scaled.inputs[1]
    assert factors is not None
    exponents = factors.producer()
    scale = exponents.inputs[0] if exponents is not None and exponents.op_type == EXPONENTS else factors
    _, height, _, width = scaled.attributes["blocks"].as_ints()
    return _Stored(weight, scale, (height, width), scaled.outputs[0])


def _attributes(stored: _Stored, product: Product) -> dict[str, Any]:
    exponents = stored.scale is not None and stored.scale.dtype == ir.DataType.INT8
    return {
        "groups": product.groups, "block_rows": stored.block[0], "block_columns": stored.block[1], "terms": product.terms,
        WEIGHT_FORMAT: BFLOAT16 if stored.scale is None else E4M3, SCALE_FORMAT: EXPONENT if exponents else FLOAT32,
    }  # fmt: skip


def _sizes(stored: _Stored) -> dict[str, int]:
    """Sizes of the plugin's symbols."""
    scale = (1, 1) if stored.scale is None else stored.scale.shape
    assert stored.weight.shape is not None and scale is not None
    return dict(zip(("GN", "K", "SN", "SK"), (int(size) for size in (*stored.weight.shape, *scale)), strict=True))


def _replace(model: ir.Model, stored: _Stored, attributes: dict[str, Any]) -> None:
    name, groups, graph = stored.weight.name or "", attributes["groups"], model.graph
    product = product_of(stored.value, groups, name)
    x, out = product.inputs[0], product.outputs[0]
    assert x is not None
    rows, columns = _sizes(stored)["GN"], _sizes(stored)["K"]
    nodes: list[ir.Node] = []

    def node(
        op_type: str, inputs: list[ir.Value], what: str, dtype: ir.DataType, *, domain: str = "", **given: Any
    ) -> ir.Value:
        attributes = ir.convenience.convert_attributes(given)
        nodes.append(ir.Node(domain, op_type, inputs, attributes, name=f"{name}.{what}"))
        made = nodes[-1].outputs[0]
        made.name, made.dtype = f"{name}.{what}", dtype
        return made

    def constant(values: list[int], what: str) -> ir.Value:
        return node("Constant", [], what, ir.DataType.INT64, value_ints=values)

    wide = ir.DataType.FLOAT
    before = x.producer()
    if groups > 1 and before is not None and permutation(before) == GROUPED and before.inputs[0] is not None:
        x = before.inputs[0]
    elif groups > 1:
        x = node("Transpose", [x], "by_token", wide, perm=GROUPED)
    flat = node("Reshape", [x, constant([-1, groups * columns], "tokens_shape")], "tokens", wide)
    scale = _unit(model) if stored.scale is None else stored.scale
    linear = node(
        BLOCK_LINEAR, [flat, stored.weight, scale], "linear", wide, domain=DOMAIN, **attributes
    )  # fmt: skip
    linear.shape = ir.Shape([None, rows])
    if groups > 1:
        parts = node("Reshape", [linear, constant([-1, groups, rows // groups], "parts_shape")], "parts", wide)
        result = node("Transpose", [parts], "by_group", wide, perm=GROUPED)
    elif product.op_type == "Gemm":
        result = linear
    else:
        leading = node("Shape", [x], "leading", ir.DataType.INT64, start=0, end=-1)
        shape = node("Concat", [leading, constant([rows], "rows")], "out_shape", ir.DataType.INT64, axis=0)
        result = node("Reshape", [linear, shape], "out", wide)
    if out.shape is not None and groups == 1:
        result.shape = out.shape
    graph.insert_before(product, nodes)
    if out.is_graph_output():
        result.name, out.name = out.name, None
    ir.convenience.replace_all_uses_with(out, result, replace_graph_outputs=True)
    remove_unused(product)
    if stored.scale is not None:
        _take_bytes(stored.weight)


def _unit(model: ir.Model) -> ir.Value:
    if UNIT not in model.graph.initializers:
        tensor = ir.tensor(np.ones((1, 1), np.float32), name=UNIT)
        value = ir.Value(name=UNIT, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        model.graph.register_initializer(value)
    return model.graph.initializers[UNIT]


def _take_bytes(weight: ir.Value) -> None:
    """Let the graph have codes as int8: the same bytes."""
    weight.dtype = ir.DataType.INT8
    tensor = weight.const_value
    if isinstance(tensor, ir.ExternalTensor):
        weight.const_value = ir.ExternalTensor(
            tensor.location, tensor.offset, tensor.length, ir.DataType.INT8, shape=ir.Shape(tensor.shape),
            name=weight.name or "", base_dir=tensor.base_dir,
        )  # fmt: skip
    elif tensor is not None:
        weight.const_value = ir.LazyTensor(
            lambda: ir.Tensor(tensor.numpy().view(np.int8), name=weight.name), ir.DataType.INT8,
            ir.Shape(tensor.shape), name=weight.name,
        )  # fmt: skip
