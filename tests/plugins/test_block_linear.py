"""Products with weights as stored: kernels in Triton's interpreter, the torch definition and the body in ONNX, against float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from interpreter import run
from onnx import TensorProto, helper
from torch import Tensor
from triton.runtime import interpreter

from foldkv.export.operators.linear import FoldkvBlockLinear, linear
from foldkv.plugins.launch import FEW_TOKENS, kernels, largest_workspace, plan

OPERATOR = "FoldkvBlockLinear"


class Weight(NamedTuple):
    """How a weight [groups * N, K] is stored; a ``block`` of None covers all of it."""

    rows: int
    columns: int
    block: tuple[int, int] | None = None
    weight_format: str = "e4m3"
    scale_format: str = "exponent"
    groups: int = 1
    terms: int = 1

    @property
    def attributes(self) -> dict[str, Any]:
        height, width = self.block or (self.rows, self.columns)
        return {
            "groups": self.groups, "block_rows": height, "block_columns": width, "terms": self.terms,
            "weight_format": self.weight_format, "scale_format": self.scale_format,
        }  # fmt: skip

    def drawn(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Stored elements and scales, and the values in float64, computed by hand."""
        height, width = self.block or (self.rows, self.columns)
        grid = (-(-self.rows // height), -(-self.columns // width))
        if self.weight_format == "bfloat16":
            stored = torch.randn(self.rows, self.columns, generator=generator).bfloat16()
            elements = stored.double()
        else:
            sizes = torch.randint(0, 0x7F, (self.rows, self.columns), generator=generator)  # not NaN, but all others
            codes = sizes | torch.randint(0, 2, sizes.shape, generator=generator) << 7
            exponent, fraction = sizes >> 3, (sizes & 7).double() / 8
            elements = torch.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7.0))
            elements = torch.where(codes >= 0x80, -elements, elements)
            stored = codes.to(torch.uint8).view(torch.int8)
        if self.scale_format == "exponent":
            powers = torch.randint(110, 140, grid, generator=generator)
            scale, factors = powers.to(torch.uint8).view(torch.int8), 2.0 ** (powers - 127.0).double()
        else:
            scale = torch.rand(grid, generator=generator)
            factors = scale.double()
        row, column = torch.arange(self.rows) // height, torch.arange(self.columns) // width
        return stored, scale, elements * factors[row][:, column]

    def sizes(self, scale: Tensor, tokens: int) -> dict[str, int]:
        return {"GN": self.rows, "K": self.columns, "SN": scale.shape[0], "SK": scale.shape[1], "M": tokens,
                "GK": self.groups * self.columns}  # fmt: skip


#: Sizes that no tile divides, spans shared by programs, cut-off blocks, small blocks, one block, groups, plain values.
WEIGHTS = [
    Weight(200, 600, (128, 128)), Weight(128, 1024, (128, 128), terms=3), Weight(96, 288, (32, 32)),
    Weight(96, 288, (32, 32), scale_format="float32", terms=3), Weight(72, 520), Weight(40, 24, scale_format="float32"),
    Weight(192, 160, (128, 128), groups=2), Weight(96, 32, (32, 32), groups=4), Weight(64, 96, (32, 96), groups=2, terms=3),
    Weight(40, 640, None, "bfloat16", "float32"), Weight(40, 640, None, "bfloat16", "float32", terms=3),
    Weight(64, 129, None, "bfloat16", "float32", groups=2),
]  # fmt: skip


def exact(x: Tensor, values: Tensor, weight: Weight) -> Tensor:
    taken = x.bfloat16().double() if weight.terms == 1 else x.double()
    parts = [
        part @ rows.T for part, rows in zip(taken.chunk(weight.groups, 1), values.chunk(weight.groups, 0), strict=True)
    ]
    return torch.cat(parts, 1)


def bound(x: Tensor, values: Tensor, weight: Weight) -> Tensor:
    """A float32 sum of K products, and what three bfloat16 lose of an activation."""
    return exact(x.abs(), values.abs(), weight) * (weight.columns + 4) * 2.0**-24


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 2, 7, 17, 64, 70])
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_the_kernels_compute_the_product(weight: Weight, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    stored, scale, values = weight.drawn(generator)
    x = torch.randn(tokens, weight.groups * weight.columns, generator=generator)
    [found] = run(OPERATOR, [x, stored, scale], **weight.attributes)
    assert ((found - exact(x, values, weight)).abs() <= bound(x, values, weight)).all()


@pytest.mark.parametrize("sm", [90, 100, 120])
def test_the_kernels_of_other_gpus_compute_the_same(sm: int) -> None:
    """Their tiles differ."""
    generator = torch.Generator().manual_seed(0)
    for weight in (WEIGHTS[0], WEIGHTS[10]):
        stored, scale, values = weight.drawn(generator)
        x = torch.randn(70, weight.columns, generator=generator)
        [found] = run(OPERATOR, [x, stored, scale], sm=sm, **weight.attributes)
        assert ((found - exact(x, values, weight)).abs() <= bound(x, values, weight)).all()


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_definition_and_body_compute_the_product(weight: Weight) -> None:
    generator = torch.Generator().manual_seed(5)
    stored, scale, values = weight.drawn(generator)
    x = torch.randn(3, weight.groups * weight.columns, generator=generator)
    for found in (linear(x, stored, scale, *weight.attributes.values()), body(x, stored, scale, weight)):
        assert ((found - exact(x, values, weight)).abs() <= bound(x, values, weight)).all()


def body(x: Tensor, stored: Tensor, scale: Tensor, weight: Weight) -> Tensor:
    """What the function body gives in ONNX Runtime."""
    types = {torch.int8: TensorProto.INT8, torch.bfloat16: TensorProto.BFLOAT16, torch.float32: TensorProto.FLOAT}
    given = {"weight": stored, "scale": scale}
    constants = []
    for name, tensor in given.items():
        array = tensor.float().numpy().astype(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
        constants.append(helper.make_tensor(name, types[tensor.dtype], tensor.shape, array.tobytes(), raw=True))
    graph = helper.make_graph(
        [helper.make_node(OPERATOR, ["x", *given], ["y"], domain="foldkv", **weight.attributes)], "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", x.shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", weight.rows])], constants,
    )  # fmt: skip
    model = helper.make_model(
        graph, functions=[FoldkvBlockLinear.to_function_proto()], ir_version=10,
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("foldkv", 1)],
    )  # fmt: skip
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@pytest.fixture
def ordered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of tiles whose sums do not depend on the tile, as on a GPU: NumPy's depend on it in the last bit."""
    dot = interpreter.InterpreterBuilder.create_dot

    def exact_dot(self: Any, a: Any, b: Any, total: Any, *rest: Any) -> Any:
        found = dot(self, a, b, total, *rest)
        left, right = (value.data.view(ml_dtypes.bfloat16).astype(np.float64) for value in (a, b))
        found.data[...] = (left @ right + total.data).astype(np.float32)
        return found

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", exact_dot)


@pytest.mark.slow
@pytest.mark.parametrize("weight", [WEIGHTS[0], WEIGHTS[3], WEIGHTS[6], WEIGHTS[10]], ids=str)
def test_a_token_does_not_depend_on_the_others_nor_on_their_number(weight: Weight, ordered: None) -> None:
    generator = torch.Generator().manual_seed(2)
    stored, scale, _ = weight.drawn(generator)
    x = torch.randn(FEW_TOKENS + 3, weight.groups * weight.columns, generator=generator)
    x[-1] = torch.nan
    [many] = run(OPERATOR, [x, stored, scale], **weight.attributes)
    assert not many[:-1].isnan().any() and many[-1].isnan().all()
    for count in (1, 5, FEW_TOKENS):
        [few] = run(OPERATOR, [x[:count], stored, scale], **weight.attributes)
        assert torch.equal(few, many[:count])
    [moved] = run(OPERATOR, [x[1:2], stored, scale], **weight.attributes)
    assert torch.equal(moved, many[1:2])


def test_programs_fill_a_gpu_and_spans_do_not_depend_on_the_tokens() -> None:
    """wkv of V4-Flash: few rows, so that many programs share each."""
    weight = Weight(512, 4096, (128, 128))
    scale = torch.zeros(4, 32)
    options: dict[str, Any] = {"sm": 90, "dtype": "bfloat16"}
    one, most, many = (
        plan(OPERATOR, weight.sizes(scale, tokens), weight.attributes, **options) for tokens in (1, FEW_TOKENS, 256)
    )
    assert np.prod(one.launches[0].grid) >= 128 and len(one.launches) == len(most.launches) == 2
    assert len(many.launches) == 1 and many.workspace == 0
    steps = [
        next(i for i, (name, _) in enumerate(each.launches[0].kernel.arguments) if name == "steps")
        for each in (one, most, many)
    ]
    assert len({each.launches[0].arguments[at].value for at, each in zip(steps, (one, most, many), strict=True)}) == 1
    told = largest_workspace(OPERATOR, weight.sizes(scale, 256), weight.attributes, **options)
    assert told == most.workspace == FEW_TOKENS * one.workspace
    foretold = set(kernels(OPERATOR, weight.sizes(scale, 1), weight.attributes, **options))
    assert {launch.kernel for each in (one, most, many) for launch in each.launches} == foretold


@pytest.mark.parametrize(
    ("weight", "grid", "reason"),
    [
        (Weight(64, 64, (32, 32), "e2m1"), (2, 2), "weights are in e2m1; its kernels read e4m3 and bfloat16"),
        (Weight(64, 64, (32, 32), terms=2), (2, 2), "activations have 2 terms; expected 1 or 3"),
        (Weight(64, 64, (32, 32), groups=3), (2, 2), "192 channels and 64 rows are not those of 3 groups"),
        (Weight(64, 64, (32, 32)), (2, 3), "2 x 3 scales do not fit blocks of 32 x 32"),
        (Weight(64, 72, (8, 24)), (8, 3), "blocks have 24 channels; expected a multiple of 16, or one block"),
        (Weight(1 << 16, 1 << 16), (1, 1), "a tensor has more elements than an int32 counts"),
    ],
)  # fmt: skip
def test_weights_that_no_kernel_reads_are_refused(weight: Weight, grid: tuple[int, int], reason: str) -> None:
    with pytest.raises(ValueError, match=f"FoldkvBlockLinear: {reason}") as refused:
        plan(OPERATOR, weight.sizes(torch.empty(grid), 1), weight.attributes, sm=80, dtype="bfloat16")
    assert "Build with --plugins off." in str(refused.value)
