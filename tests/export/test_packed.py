"""The chosen experts from packed bytes: the values of formats.py, whatever lies where, and nothing of the others."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from checkpoints import to_fp4, to_fp8
from onnx import TensorProto, helper

from foldkv.export.checkpoint.formats import FP4, FP8, Format
from foldkv.export.checkpoint.values import dequantised
from foldkv.export.operators import packed
from foldkv.export.operators.experts import routed_experts as definition
from foldkv.export.operators.packed import PARTS, Matrix, routed_experts
from foldkv.export.operators.registry import DOMAIN, ONNX_OPSET

# Sizes that no other one divides, and bands of several rows: 192 rows of 128 bytes, in bands of 4 KiB.
_HIDDEN, _INNER, _EXPERTS, _CHOSEN = 256, 384, 7, 3
_LIMIT = 2.0


class _Layer:
    """Random experts as bytes in rows, in no order and with gaps, and their values by the definition of the formats."""

    def __init__(self, format_: str) -> None:
        generator = torch.Generator().manual_seed(3)
        kind = Format(format_, (1, 32) if format_ == FP4 else (128, 128))
        shapes = {"w1": (_INNER, _HIDDEN), "w2": (_HIDDEN, _INNER), "w3": (_INNER, _HIDDEN)}
        self.slots = torch.randperm(_EXPERTS, generator=generator)
        rows: list[list[torch.Tensor]] = [[], []]
        self.values: dict[str, list[torch.Tensor]] = {part: [] for part in PARTS}
        for _ in range(_EXPERTS):
            stored: list[list[torch.Tensor]] = [[], []]
            self.matrices, offsets = {}, [5, 3]
            for part in ("w3", "w1", "w2"):
                weight = torch.randn(shapes[part], generator=generator) * 0.1
                codes, scale = (to_fp4 if format_ == FP4 else to_fp8)(weight)
                self.values[part].append(dequantised(codes, scale, kind))
                self.matrices[part] = Matrix(offsets[0], offsets[1], shapes[part], tuple(scale.shape))
                for place, tensor in enumerate((codes, scale)):
                    flat = tensor.reshape(-1).view(torch.int8)
                    stored[place].append(flat)
                    offsets[place] += flat.numel()
            for place, head in enumerate((5, 3)):
                rows[place].append(torch.cat([torch.full((head,), -1, dtype=torch.int8), *stored[place]]))
        self.codes, self.scales = (torch.stack(row)[self.slots.argsort()] for row in rows)

    def model(self, format_: str) -> onnx.ModelProto:
        function = routed_experts(format_, self.matrices)
        names = {
            "x": (TensorProto.FLOAT, ["tokens", _HIDDEN]), "chosen": (TensorProto.INT64, ["tokens", _CHOSEN]),
            "weights": (TensorProto.FLOAT, ["tokens", _CHOSEN]), "codes": (TensorProto.INT8, list(self.codes.shape)),
            "scales": (TensorProto.INT8, list(self.scales.shape)), "slots": (TensorProto.INT64, [_EXPERTS]),
        }  # fmt: skip
        graph = helper.make_graph(
            [helper.make_node(function.name, list(names), ["y"], domain=DOMAIN, limit=_LIMIT)], "experts",
            [helper.make_tensor_value_info(name, *kind) for name, kind in names.items()],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", _HIDDEN])],
        )  # fmt: skip
        opsets = [helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid(DOMAIN, 1)]
        return helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10)


@pytest.fixture(scope="module", params=[FP4, FP8])
def case(request: pytest.FixtureRequest) -> tuple[_Layer, onnxruntime.InferenceSession]:
    layer = _Layer(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "BAND", 1 << 12)
        model = layer.model(request.param)
    onnx.checker.check_model(model)
    return layer, onnxruntime.InferenceSession(model.SerializeToString())


def _run(case: tuple[_Layer, onnxruntime.InferenceSession], x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor,
         **changed: torch.Tensor) -> torch.Tensor:  # fmt: skip
    layer, session = case
    given = {"codes": layer.codes, "scales": layer.scales, "slots": layer.slots} | changed
    feeds = {"x": x, "chosen": chosen, "weights": weights} | given
    return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in feeds.items()})[0])


def _tokens(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(_EXPERTS, generator=generator)[:_CHOSEN] for _ in range(count)])
    return torch.randn(count, _HIDDEN, generator=generator), chosen, torch.rand(count, _CHOSEN, generator=generator)


@pytest.mark.parametrize("count", [1, 2, 13])
def test_it_is_the_definition_on_the_values_of_the_formats(case: tuple, count: int) -> None:
    x, chosen, weights = _tokens(count, count)
    if count == 13:
        chosen[4] = chosen[4, 0]  # a table by token id may name an expert twice
    values = {part: torch.stack(matrices) for part, matrices in case[0].values.items()}
    w13 = torch.cat([values["w1"], values["w3"]], dim=1)
    expected = definition(x, chosen, weights, w13, values["w2"], _LIMIT)
    torch.testing.assert_close(_run(case, x, chosen, weights), expected, rtol=1e-5, atol=1e-5)


def test_a_token_does_not_depend_on_the_others_of_its_chunk(case: tuple) -> None:
    x, chosen, weights = _tokens(9, 5)
    alone = torch.cat([_run(case, x[i : i + 1], chosen[i : i + 1], weights[i : i + 1]) for i in range(9)])
    torch.testing.assert_close(_run(case, x, chosen, weights), alone, rtol=1e-5, atol=1e-5)


def test_experts_that_are_not_chosen_may_hold_anything(case: tuple) -> None:
    x, chosen, weights = _tokens(2, 6)
    chosen[:] = torch.tensor([1, 4, 6])
    others = [int(case[0].slots[expert]) for expert in (0, 2, 3, 5)]
    scales = case[0].scales.clone()
    scales[others] = -1  # e8m0's NaN
    expected = _run(case, x, chosen, weights)
    assert torch.equal(_run(case, x, chosen, weights, scales=scales), expected)
    scales[int(case[0].slots[4])] = -1
    assert _run(case, x, chosen, weights, scales=scales).isnan().all()


def test_a_step_reads_bands_of_a_row_and_of_all_experts_nothing_but_a_mark() -> None:
    layer = _Layer(FP4)
    body = routed_experts(FP4, layer.matrices)
    nodes, inner = [], list(body.node)
    while inner:
        nodes.append(inner.pop())
        inner += [node for attribute in nodes[-1].attribute for node in attribute.g.node]
    # The stacks meet a Slice of a band each, by matrix, and the slots a Gather of one. Their number is the size of the marks.
    stacks = ("codes", "scales", "slots")
    readers = {stack: sorted(node.op_type for node in nodes if stack in node.input) for stack in stacks}
    assert readers == {"codes": ["Slice"] * 3, "scales": ["Slice"] * 3, "slots": ["Gather", "Shape"]}
    assert np.all([size <= packed.BAND for size in _band_sizes(body)])


def _band_sizes(body: onnx.FunctionProto) -> list[int]:
    constants = {node.output[0]: onnx.numpy_helper.to_array(node.attribute[0].t) for node in body.node if not node.input
                 and node.attribute and node.attribute[0].name == "value"}  # fmt: skip
    return [int(constants[f"{part}_code_step"][0]) for part in PARTS]
