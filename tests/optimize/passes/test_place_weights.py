"""Weights in engines: packed experts as words, e4m3 matrices where they are kept; values, bytes in the plan, refusals."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from lowered import session
from onnx_ir.passes.common import InlinePass, RemoveUnusedNodesPass

from foldkv.errors import ArtifactError, BuildError
from foldkv.export.checkpoint.formats import FP4, FP8, Format
from foldkv.export.checkpoint.values import dequantised
from foldkv.export.contract.state import StateTensor
from foldkv.export.external import read_lazily, read_values
from foldkv.export.operators import packed
from foldkv.export.operators.experts import routed_experts
from foldkv.export.operators.packed import Matrix
from foldkv.export.operators.packed_words import geometry
from foldkv.export.operators.registry import DOMAIN, ONNX_OPSET
from foldkv.optimize.engine_build import build_plan
from foldkv.optimize.kept_weights import fp8_gap
from foldkv.optimize.passes.place_weights import Stored, place_weights
from foldkv.optimize.recipe import Shapes

LIMIT, TOP = 3.0, 2
#: What TensorRT-RTX puts into a plan beside weights for a graph of this size: code, seen to be 1.4 to 2 MB.
CODE = 5 << 19


class Layer:
    """Routed experts and the matrix behind them, random, as a graph with weights as stored and as dequantised tensors.

    Rows of experts have ``gap`` unused bytes at their end, and lie in an order of their own.
    """

    def __init__(self, format_: str, experts: int, hidden: int, inner: int, out: int, *, gap: int = 0, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.hidden, self.out, self.experts = hidden, out, experts
        self.slots = rng.permutation(experts)
        shapes = {"w1": (inner, hidden), "w2": (hidden, inner), "w3": (inner, hidden)}
        block = (1, 32) if format_ == FP4 else (128, 128)
        matrices, codes, scales, values = {}, [], [], {}
        at = scale_at = 0
        for part, (rows, columns) in shapes.items():
            grid = (-(-rows // block[0]), -(-columns // block[1]))
            size = rows * columns // (2 if format_ == FP4 else 1)
            matrices[part] = Matrix(at, scale_at, (rows, columns), grid)
            at, scale_at = at + size, scale_at + grid[0] * grid[1]
            codes.append(self._codes(rng, experts, size, format_))
            scales.append(rng.integers(118, 124, (experts, grid[0] * grid[1]), dtype=np.uint8))
            stored = torch.from_numpy(codes[-1]).reshape(experts, rows, -1)
            if format_ == FP8:
                stored = stored.view(torch.float8_e4m3fn)
            exponents = torch.from_numpy(scales[-1]).reshape(experts, *grid)
            values[part] = dequantised(stored, exponents, Format(format_, block))[self.slots]
        unused = np.full((experts, gap), 255, np.uint8)
        self.codes, self.scales = np.concatenate([*codes, unused], axis=1), np.concatenate([*scales, unused], axis=1)
        self.w13, self.w2 = torch.cat([values["w1"], values["w3"]], dim=1), values["w2"]
        self.matrix = self._codes(rng, out, hidden, FP8)
        self.factors = rng.integers(118, 124, (-(-out // 128), -(-hidden // 128)), dtype=np.uint8)
        one = torch.from_numpy(self.matrix).view(torch.float8_e4m3fn)
        self.dense = dequantised(one, torch.from_numpy(self.factors), Format(FP8, (128, 128)))
        self.format, self.matrices = format_, matrices

    @staticmethod
    def _codes(rng: np.random.Generator, rows: int, size: int, format_: str) -> np.ndarray:
        codes = rng.integers(0, 256, (rows, size), dtype=np.uint8)
        return codes if format_ == FP4 else np.where(codes & 0x7F == 0x7F, 0, codes).astype(np.uint8)  # no NaN

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        """The experts that x itself asks for, then the matrix, in float32."""
        shares, chosen = x[:, : self.experts].topk(TOP)
        return routed_experts(x, chosen, shares, self.w13, self.w2, LIMIT) @ self.dense.T

    def model(self, *, known: bool = True) -> ir.Model:
        """past [B, 1, C] -> present [B, 1, out], as an exported layer says it."""
        past, present = _value("past", [None, 1, self.hidden]), _value("present", [None, 1, self.out])
        weights = {
            "layers.0.ffn.experts.codes": ir.tensor(self.codes.view(np.int8)),
            "layers.0.ffn.experts.scales": ir.tensor(self.scales.view(np.int8)),
            "slots": ir.tensor(self.slots.astype(np.int64)),
            "layers.0.attn.wq_a.weight": ir.Tensor(self.matrix.view(ml_dtypes.float8_e4m3fn)),
            "layers.0.attn.wq_a.weight.scale": ir.tensor(self.factors.view(np.int8)),
            "flat": ir.tensor(np.array([-1, self.hidden])), "k": ir.tensor(np.array([TOP])),
            "rows": ir.tensor(np.array([-1, 1, self.out])),
            "from": ir.tensor(np.array([0])), "to": ir.tensor(np.array([self.experts])), "axis": ir.tensor(np.array([1])),
        }  # fmt: skip
        given = {}
        for name, tensor in weights.items():
            tensor.name = name
            given[name] = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        codes, scales, slots, matrix, scale, *_ = given.values()
        x = ir.node("Reshape", [past, given["flat"]])
        asked = ir.node("Slice", [x.outputs[0], given["from"], given["to"], given["axis"]])
        top = ir.node("TopK", [asked.outputs[0], given["k"]], num_outputs=2)
        places = geometry(self.matrices) if known else {}
        attributes = [ir.AttrFloat32("limit", LIMIT), *(ir.AttrInt64s(key, value) for key, value in places.items())]
        experts = ir.Node(
            DOMAIN, packed.EXPERTS[self.format],
            [x.outputs[0], top.outputs[1], top.outputs[0], codes, scales, slots], attributes, name="experts",
        )  # fmt: skip
        one = ir.node("Constant", [], attributes={"value_float": 1.0})
        elements = ir.node("DequantizeLinear", [matrix, one.outputs[0]])
        factors = ir.Node(DOMAIN, packed.EXPONENTS, [scale])
        grid = self.factors.shape
        whole = self.out % 128 == 0 and self.hidden % 128 == 0
        sizes = {
            "blocks": [grid[0], 128, grid[1], 128],
            "grid": [grid[0], 1, grid[1], 1],
            "shape": [self.out, self.hidden],
        }
        sizes |= {} if whole else {"whole": [128 * grid[0], 128 * grid[1]]}
        scaled = ir.Node(
            DOMAIN, packed.BLOCK if whole else packed.PARTIAL, [elements.outputs[0], factors.outputs[0]],
            [ir.AttrInt64s(key, value) for key, value in sizes.items()], name="scaled",
        )  # fmt: skip
        turned = ir.node("Transpose", [scaled.outputs[0]], attributes={"perm": [1, 0]})
        product = ir.node("MatMul", [experts.outputs[0], turned.outputs[0]])
        last = ir.node("Reshape", [product.outputs[0], given["rows"]], outputs=[present])
        nodes = [x, asked, top, experts, one, elements, factors, scaled, turned, product, last]
        graph = ir.Graph(
            [past], [present], nodes=nodes, initializers=list(given.values()),
            opset_imports={"": ONNX_OPSET, DOMAIN: 1}, name="layer",
        )  # fmt: skip
        bodies = [packed.exponents(), packed.block_scale(), packed.partial_block_scale()]
        return ir.Model(graph, ir_version=10, functions=[ir.serde.deserialize_function(body) for body in bodies])

    def placed(self, folder: Path, *, sm: int, dtype: ir.DataType = ir.DataType.FLOAT) -> tuple[ir.Model, Stored]:
        """The graph as an engine of that GPU takes it, written to ``folder``."""
        model = self.model()
        stored = place_weights(model, dtype, low=lambda _: False, no_fp8=fp8_gap(sm))
        InlinePass()(model)
        RemoveUnusedNodesPass()(model)
        folder.mkdir()
        ir.save(model, folder / "model.onnx", external_data="weights.bin")
        return model, stored


def _value(name: str, shape: list[int | None]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))


@pytest.mark.parametrize("format_", [FP4, FP8])
@pytest.mark.parametrize("gap", [0, 3], ids=["whole words", "odd rows"])
@pytest.mark.parametrize("sm", [80, 120])
def test_words_and_matrices_have_the_values_of_the_bytes(format_: str, gap: int, sm: int, tmp_path: Path) -> None:
    layer = Layer(format_, 8, 128, 256, 384, gap=gap)
    layer.placed(tmp_path / "out", sm=sm)
    x = torch.randn(5, 1, 128, generator=torch.Generator().manual_seed(1))
    [have] = session(tmp_path / "out", tmp_path / "run").run(None, {"past": x.numpy()})
    want = layer.expected(x[:, 0]).numpy()
    np.testing.assert_allclose(have[:, 0], want, atol=1e-5 * np.abs(want).max(), rtol=0)
    assert np.abs(want).max() > 1


@pytest.mark.parametrize("format_", [FP4, FP8])
def test_experts_that_are_not_chosen_are_not_read(format_: str, tmp_path: Path) -> None:
    layer = Layer(format_, 8, 128, 128, 128)
    x = torch.zeros(3, 1, 128)
    x[:, 0, :8] = torch.tensor([0.0, 0, 5, 0, 0, 3, 0, 0])
    want = layer.expected(x[:, 0]).numpy()
    others = [slot for expert, slot in enumerate(layer.slots) if expert not in (2, 5)]
    layer.scales[others] = 255  # NaN, if anything looked
    layer.placed(tmp_path / "out", sm=80)
    [have] = session(tmp_path / "out", tmp_path / "run").run(None, {"past": x.numpy()})
    np.testing.assert_allclose(have[:, 0], want, atol=1e-5 * np.abs(want).max(), rtol=0)


def test_a_graph_does_not_grow_with_the_number_of_experts(tmp_path: Path) -> None:
    counts = []
    for experts in (4, 64):
        model, _ = Layer(FP4, experts, 64, 32, 128).placed(tmp_path / str(experts), sm=89)
        loop = next(node for node in model.graph if node.op_type == "Loop")
        counts.append((len(model.graph), len(loop.attributes["body"].as_graph())))
        for stack in ("codes", "scales"):
            users = model.graph.initializers[f"layers.0.ffn.experts.{stack}"].uses()
            assert [user.op_type for user, _ in users] == ["Gather"]
    assert counts[0] == counts[1]


def test_a_matrix_whose_last_block_is_cut_off_is_widened_and_says_why(tmp_path: Path) -> None:
    layer = Layer(FP8, 4, 128, 128, 200)
    model, stored = layer.placed(tmp_path / "out", sm=120)
    assert [(row["weights"], "cut off" in row["reason"]) for row in stored.facts(model)["widened"]] == [(1, True)]
    x = torch.randn(2, 1, 128, generator=torch.Generator().manual_seed(2))
    [have] = session(tmp_path / "out", tmp_path / "run").run(None, {"past": x.numpy()})
    want = layer.expected(x[:, 0]).numpy()
    np.testing.assert_allclose(have[:, 0], want, atol=1e-5 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize("sm", [80, 89, 120, 121])
def test_a_plan_weighs_what_its_weights_weigh_in_the_file(sm: int, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="engines need TensorRT-RTX")
    layer = Layer(FP4, 16, 1024, 256, 4096)
    model, stored = layer.placed(tmp_path / "out", sm=sm, dtype=ir.DataType.BFLOAT16)
    kept = {name: row["bytes"] for name, row in stored.facts(model)["kept"].items()}
    matrix = layer.out * layer.hidden
    assert kept["fp4"] == layer.codes.nbytes + layer.scales.nbytes  # 4.25 bits per weight
    assert kept.get("fp8", 0) == (0 if fp8_gap(sm) else matrix + 4 * layer.factors.size)
    plan = tmp_path / "plan"
    state = [StateTensor("s", 0, "window", "past", "present", 1, None, layer.hidden)]
    build_plan(tmp_path / "out" / "model.onnx", plan, sm=sm, state=state, shapes=Shapes(chunk=(1, 1, 16)))
    weights = kept["fp4"] + (4 if fp8_gap(sm) else 1) * matrix
    assert weights <= plan.stat().st_size < weights + CODE


def test_experts_of_an_older_package_are_refused_with_the_way_out() -> None:
    with pytest.raises(BuildError, match=r"does not say where its matrices are.*export the checkpoint again"):
        place_weights(Layer(FP4, 4, 64, 32, 128).model(known=False), ir.DataType.BFLOAT16, low=lambda _: True)


def test_weights_are_read_from_their_own_bytes_and_from_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    file = tmp_path / "in" / "w.bin"
    file.write_bytes(bytes(range(40)))
    (tmp_path / "in" / "linked.bin").hardlink_to(file)
    (tmp_path / "out.bin").write_bytes(bytes(40))

    def tensor(location: str, offset: int = 3, length: int = 8) -> ir.ExternalTensor:
        return ir.ExternalTensor(
            location, offset, length, ir.DataType.INT16, shape=ir.Shape([2, 2]), name="w", base_dir=tmp_path / "in"
        )

    want = np.frombuffer(bytes(range(3, 11)), "<i2").reshape(2, 2)
    np.testing.assert_array_equal(read_values(tensor("linked.bin")), want)
    for bad, what in (
        (tensor("../out.bin"), "leads out"), (tensor("w.bin", 36), "ends within weight w"),
        (tensor("w.bin", 3, 9), "has 8 bytes; the graph says 9"),
    ):  # fmt: skip
        with pytest.raises(ArtifactError, match=what):
            read_values(bad)
    value = ir.Value(name="w", const_value=tensor("linked.bin"))
    model = ir.Model(ir.Graph([], [], nodes=[], initializers=[value]), ir_version=10)
    lazy = read_lazily(model, tmp_path / "in").graph.initializers["w"].const_value
    assert lazy is not None
    file.write_bytes(bytes(range(100, 140)))  # nothing was read before it is asked for
    np.testing.assert_array_equal(lazy.numpy(), np.frombuffer(bytes(range(103, 111)), "<i2").reshape(2, 2))
