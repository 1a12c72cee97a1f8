"""Weights in engines without plugins: packed experts as words, e4m3 matrices as values; what the runtime loads is what they were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from lowered import run
from onnx_ir.passes.common import InlinePass, RemoveUnusedNodesPass

from foldkv.errors import BuildError, FoldkvError
from foldkv.export.checkpoint.formats import FP4, FP8, Format
from foldkv.export.checkpoint.values import dequantised
from foldkv.export.contract.engine_set import DEQUANTISED, WORDS
from foldkv.export.contract.lock import Part, Weight
from foldkv.export.operators import packed
from foldkv.export.operators.experts import routed_experts
from foldkv.export.operators.packed import Matrix
from foldkv.export.operators.packed_words import geometry
from foldkv.export.operators.registry import DOMAIN, ONNX_OPSET
from foldkv.export.roles import DTYPE_NAMES
from foldkv.optimize.passes.place_weights import Stored, place_weights
from foldkv.runtime.weight_files import WeightFiles
from foldkv.runtime.weight_forms import load_weight

LIMIT, TOP = 3.0, 2
EXPERTS, MATRIX = "ffn.experts", "attn.wq_a.weight"


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
            f"{EXPERTS}.codes": ir.tensor(self.codes.view(np.int8)),
            f"{EXPERTS}.scales": ir.tensor(self.scales.view(np.int8)),
            "slots": ir.tensor(self.slots.astype(np.int64)),
            MATRIX: ir.Tensor(self.matrix.view(ml_dtypes.float8_e4m3fn)),
            f"{MATRIX}.scale": ir.tensor(self.factors.view(np.int8)),
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

    def placed(self, dtype: ir.DataType = ir.DataType.FLOAT) -> tuple[ir.Model, Stored]:
        """The graph as an engine takes it."""
        model = self.model()
        stored = place_weights(model, dtype, low=lambda _: False)
        InlinePass()(model)
        RemoveUnusedNodesPass()(model)
        return model, stored

    def computed(self, x: torch.Tensor, folder: Path) -> np.ndarray:
        """What the engine's graph computes with weights that the runtime loads from a file of stored bytes."""
        model, stored = self.placed()
        bytes_ = {
            EXPERTS + ".codes": ("I8", self.codes), EXPERTS + ".scales": ("I8", self.scales),
            MATRIX: ("F8_E4M3", self.matrix), f"{MATRIX}.scale": ("F8_E8M0", self.factors),
        }  # fmt: skip
        folder.mkdir()
        weights, at = {}, 0
        with (folder / "stored.bin").open("wb") as out:
            for name, (kind, array) in bytes_.items():
                out.write(array.tobytes())
                weights[name] = Weight(kind, array.shape, (Part("stored.bin", at, array.nbytes),))
                at += array.nbytes
        files, given = WeightFiles(), {}
        files.open("stored.bin", folder / "stored.bin")
        for name, load in stored.loads.items():
            value = model.graph.initializers.pop(name)
            model.graph.inputs.append(value)
            assert value.dtype is not None and value.shape is not None
            taken = replace(load, dtype=DTYPE_NAMES[value.dtype], shape=tuple(int(size) for size in value.shape))
            made = np.ascontiguousarray(load_weight(taken, weights[name], files, weights.get(taken.scale)))
            given[name] = made.view(value.dtype.numpy()).reshape(taken.shape)
        return run(model, given, {"past": x.numpy()}, folder)[0]


def _value(name: str, shape: list[int | None]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))


@pytest.mark.parametrize("format_", [FP4, FP8])
@pytest.mark.parametrize("gap", [0, 3], ids=["whole words", "odd rows"])
@pytest.mark.parametrize("out", [384, 200], ids=["whole blocks", "a block cut off"])
def test_words_and_matrices_have_the_values_of_the_bytes(format_: str, gap: int, out: int, tmp_path: Path) -> None:
    layer = Layer(format_, 8, 128, 256, out, gap=gap)
    x = torch.randn(5, 1, 128, generator=torch.Generator().manual_seed(1))
    have = layer.computed(x, tmp_path / "run")
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
    have = layer.computed(x, tmp_path / "run")
    np.testing.assert_allclose(have[:, 0], want, atol=1e-5 * np.abs(want).max(), rtol=0)


def test_a_graph_does_not_grow_with_the_number_of_experts() -> None:
    counts = []
    for experts in (4, 64):
        model, _ = Layer(FP4, experts, 64, 32, 128).placed()
        loop = next(node for node in model.graph if node.op_type == "Loop")
        counts.append((len(model.graph), len(loop.attributes["body"].as_graph())))
        for stack in ("codes", "scales"):
            users = model.graph.initializers[f"{EXPERTS}.{stack}"].uses()
            assert [user.op_type for user, _ in users] == ["Gather"]
    assert counts[0] == counts[1]


def test_no_weight_is_read_and_what_is_widened_is_told() -> None:
    model, stored = Layer(FP4, 4, 128, 64, 200).placed(ir.DataType.BFLOAT16)
    assert {name: load.form for name, load in stored.loads.items()} == {
        f"{EXPERTS}.codes": WORDS, f"{EXPERTS}.scales": WORDS, MATRIX: DEQUANTISED,
    }  # fmt: skip
    assert stored.loads[MATRIX].block == (128, 128) and stored.loads[MATRIX].scale == f"{MATRIX}.scale"
    assert stored.widened == {(FP8, "no plugin reads it"): 1}
    for name in stored.loads:
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        with pytest.raises(FoldkvError, match="a build asked for the values"):
            tensor.numpy()


def test_experts_of_an_older_package_are_refused_with_the_way_out() -> None:
    with pytest.raises(BuildError, match=r"does not say where its matrices are.*export the checkpoint again"):
        place_weights(Layer(FP4, 4, 64, 32, 128).model(known=False), ir.DataType.BFLOAT16, low=lambda _: True)
