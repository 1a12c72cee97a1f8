"""Hyper-connections and routing: their bodies in ONNX Runtime, plain and optimized, give what their definitions in torch give."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from foldkv.export.contract.operators import operator_spec
from foldkv.export.contract.weights import BFLOAT16, FLOAT32
from foldkv.export.operators.hyper_connections import hc_post, hc_pre
from foldkv.export.operators.registry import DOMAIN, ONNX_OPSET
from foldkv.export.operators.route import route, route_hashed
from foldkv.export.package import read_package
from foldkv.export.trace import add_functions
from foldkv.optimize.passes.cpu import optimize_for_cpu

MIXING = {"norm_eps": 1e-6, "iterations": 20, "eps": 1e-6}
SCORED = {"topk": 5, "scaling": 1.5, "weight_format": FLOAT32}
HASHED = {"scaling": 1.5, "weight_format": FLOAT32}
_TYPES = {torch.float32: TensorProto.FLOAT, torch.int64: TensorProto.INT64}


def run(
    name: str, inputs: list[Tensor], attributes: Mapping[str, Any], folder: Path, *, optimized: bool
) -> tuple[list[Tensor], set[str]]:
    """The outputs of an operator's body, and the types of the nodes that compute them; sequences and tokens are dynamic."""
    spec = operator_spec(name)
    names, outputs = [tensor.name for tensor in spec.inputs], [tensor.name for tensor in spec.outputs]
    given = [
        helper.make_tensor_value_info(
            tensor.name, _TYPES[value.dtype],
            [dim if dim in ("B", "S", "M") else size for dim, size in zip(tensor.dims, value.shape, strict=True)],
        )
        for tensor, value in zip(spec.inputs, inputs, strict=True)
    ]  # fmt: skip
    made = [
        helper.make_tensor_value_info(tensor.name, TensorProto.INT64 if tensor.dtype == "int64" else TensorProto.FLOAT, None)
        for tensor in spec.outputs
    ]  # fmt: skip
    node = helper.make_node(name, names, outputs, domain=DOMAIN, **attributes)
    opsets = [helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid(DOMAIN, 1)]
    proto = helper.make_model(helper.make_graph([node], "one", given, made), opset_imports=opsets, ir_version=10)
    model = ir.from_proto(proto)
    add_functions(model)
    if optimized:
        optimize_for_cpu(model)
    ir.save(model, folder / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    feeds = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    return [torch.from_numpy(value) for value in session.run(None, feeds)], {node.op_type for node in model.graph}


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        if one.dtype == torch.int64:
            assert torch.equal(one, other)
        else:
            torch.testing.assert_close(one, other.float(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("optimized", [False, True], ids=["body", "optimized"])
@pytest.mark.parametrize("tokens", [1, 7])
def test_hyper_connections(tokens: int, optimized: bool, tmp_path: Path) -> None:
    torch.manual_seed(tokens)
    streams, fn, base, scale = (
        torch.randn(2, tokens, 4, 20) * 3,
        torch.randn(24, 80) / 9,
        torch.randn(24),
        torch.rand(3),
    )
    inputs = [streams, fn, base, scale]
    found, nodes = run("FoldkvHcPre", inputs, MIXING, tmp_path, optimized=optimized)
    close(found, list(hc_pre(*(value.double() for value in inputs), *MIXING.values())))
    assert not optimized or (not nodes & {"Loop", "Pow", "Range"} and "SimplifiedLayerNormalization" in nodes)
    inputs = [streams, torch.randn(2, tokens, 20), *found[1:]]
    close(
        run("FoldkvHcPost", inputs, {}, tmp_path, optimized=optimized)[0],
        [hc_post(*(value.double() for value in inputs))],
    )


@pytest.mark.parametrize("optimized", [False, True], ids=["body", "optimized"])
@pytest.mark.parametrize("tokens", [1, 7])
def test_routing(tokens: int, optimized: bool, tmp_path: Path) -> None:
    """Every score occurs twice: of equal ones the lowest index is first."""
    torch.manual_seed(tokens)
    x, weight = torch.randn(tokens, 32), torch.randn(6, 32).repeat_interleave(2, dim=0)
    bias, table = torch.randn(6).repeat_interleave(2), torch.randint(0, 12, (9, 3))
    found, nodes = run("FoldkvRoute", [x, weight, bias], SCORED, tmp_path, optimized=optimized)
    close(found, list(route(x.double(), weight.double(), bias.double(), *SCORED.values())))
    assert not optimized or "Cast" not in nodes, "a weight in float32 is read as it is"
    inputs = [x, weight, table, torch.randint(0, 9, (tokens,))]
    wide = [value.double() if value.is_floating_point() else value for value in inputs]
    close(
        run("FoldkvRouteHashed", inputs, HASHED, tmp_path, optimized=optimized)[0],
        list(route_hashed(*wide, *HASHED.values())),
    )


def test_a_gate_in_bfloat16_is_computed_with_in_float32() -> None:
    x, weight = torch.randn(3, 32), torch.randn(12, 32).bfloat16()
    stored = route(x, weight, torch.zeros(12), 2, 1.0, BFLOAT16)
    for one, other in zip(stored, route(x, weight.float(), torch.zeros(12), 2, 1.0, FLOAT32), strict=True):
        assert torch.equal(one, other)


def test_a_gate_is_read_as_stored(tiny_graph: Path) -> None:
    """No layer converts it on each call; the trained model has it in bfloat16."""
    package = read_package(tiny_graph)
    gates = [
        node for name in set(package.layers) for node in package.segment(name).model.graph if "Route" in node.op_type
    ]
    gates = [node for node in gates if node.op_type != "FoldkvRoutedExperts"]
    assert len(gates) == len(set(package.layers))
    for node in gates:
        weight = node.inputs[1]
        assert weight is not None and weight.is_graph_input() and weight.name == "ffn.gate.weight"
        assert weight.dtype == ir.DataType.BFLOAT16 and node.attributes["weight_format"].as_string() == BFLOAT16
