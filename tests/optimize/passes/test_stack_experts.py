"""Experts by QMoE: what numpy computes in float64 from the same codes, whoever chose the experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import pytest

from foldkv.export.checkpoint.formats import FP4, FP8
from foldkv.export.operators import packed
from foldkv.export.operators.packed import PARTS, Matrix
from foldkv.export.operators.packed_words import geometry
from foldkv.export.operators.registry import DOMAIN, ONNX_OPSET
from foldkv.export.trace import add_functions
from foldkv.optimize.passes.stack_experts import stack_experts

Array = npt.NDArray[Any]
ROLE = "ffn.experts"
#: The values of e2m1 (OCP microscaling formats 1.0).
GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
SCALING, VOCABULARY = 1.5, 40


@dataclass
class Layer:
    """A gate and random experts. ``parts`` has codes [E, R, C / 2] and exponents [E, R, C / 32] of every matrix."""

    hidden: int
    inner: int
    experts: int
    chosen: int
    hashed: bool = False
    limit: float = 10.0
    seed: int = 0
    parts: dict[str, tuple[Array, Array]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = self.rng = np.random.default_rng([self.seed, self.hidden, self.inner, self.experts, self.chosen])
        for part in PARTS:
            rows, columns = (self.hidden, self.inner) if part == "w2" else (self.inner, self.hidden)
            codes = rng.integers(0, 256, (self.experts, rows, columns // 2), dtype=np.uint8)
            self.parts[part] = codes, rng.integers(120, 127, (self.experts, rows, columns // 32), dtype=np.uint8)
        self.gate = rng.normal(size=(self.experts, self.hidden)).astype(np.float32)
        self.bias = rng.normal(size=self.experts).astype(np.float32)
        self.table = np.stack([rng.permutation(self.experts)[: self.chosen] for _ in range(VOCABULARY)])

    def x(self, tokens: int) -> tuple[Array, Array]:
        """Input [M, C] and token ids [M]."""
        return self.rng.normal(size=(tokens, self.hidden)).astype(np.float32), self.rng.integers(0, VOCABULARY, tokens)

    def value(self, part: str, expert: int) -> Array:
        """One matrix in float64."""
        codes, exponents = (array[expert] for array in self.parts[part])
        elements = GRID[np.stack([codes & 15, codes >> 4], axis=-1)].reshape(len(codes), -1)
        product: Array = elements * np.repeat(2.0 ** (exponents.astype(np.float64) - 127), 32, axis=1)
        return product

    def expected(self, x: Array, ids: Array) -> Array:
        """The layer in float64, a token and an expert at a time."""
        found = np.zeros((len(x), self.hidden))
        for row, token in enumerate(x.astype(np.float64)):
            scores = np.sqrt(np.log1p(np.exp(self.gate.astype(np.float64) @ token)))
            # Best first, of equal ones the lowest.
            best = sorted(range(self.experts), key=lambda one: (-(scores[one] + self.bias[one]), one))[: self.chosen]
            chosen = self.table[ids[row]] if self.hashed else np.array(best)
            weights = scores[chosen] / scores[chosen].sum() * SCALING
            for expert, weight in zip(chosen, weights, strict=True):
                gate = np.minimum(self.value("w1", expert) @ token, self.limit)
                up = np.clip(self.value("w3", expert) @ token, -self.limit, self.limit)
                found[row] += weight * (self.value("w2", expert) @ (gate / (1 + np.exp(-gate)) * up))
        return found

    def model(self, format_: str = FP4, block: int = 32) -> ir.Model:
        """x [M, C], ids [M] -> y [M, C] as an exported layer says it: the gate and the packed experts are nodes."""
        matrices, at, scale_at = {}, 0, 0
        for part, (codes, _) in self.parts.items():
            rows, columns = codes.shape[1], 2 * codes.shape[2]
            matrices[part] = Matrix(at, scale_at, (rows, columns), (rows, columns // block))
            at, scale_at = at + rows * columns // 2, scale_at + rows * columns // block
        x, y = value("x", ir.DataType.FLOAT, ["M", self.hidden]), value("y", ir.DataType.FLOAT, ["M", self.hidden])
        ids = value("ids", ir.DataType.INT64, ["M"])
        codes_in = value(f"{ROLE}.codes", ir.DataType.INT8, [self.experts, at])
        scales_in = value(f"{ROLE}.scales", ir.DataType.INT8, [self.experts, scale_at])
        fixed = {"gate": self.gate, "bias": self.bias, "table": self.table, f"{ROLE}.slots": np.arange(self.experts)}
        given = {
            name: ir.Value(
                name=name, type=ir.TensorType(ir.tensor(array).dtype), shape=ir.Shape(array.shape),
                const_value=ir.tensor(array, name=name),
            )
            for name, array in fixed.items()
        }  # fmt: skip
        attributes: dict[str, Any] = {"scaling": SCALING, "weight_format": "float32"}
        if self.hashed:
            inputs, op_type = [x, given["gate"], given["table"], ids], "FoldkvRouteHashed"
        else:
            inputs, op_type, attributes["topk"] = [x, given["gate"], given["bias"]], "FoldkvRoute", self.chosen
        chosen = value("chosen", ir.DataType.INT64, ["M", self.chosen])
        weights = value("weights", ir.DataType.FLOAT, ["M", self.chosen])
        route = ir.node(op_type, inputs, attributes, domain=DOMAIN, outputs=[chosen, weights], name="route")
        places = {key: ir.AttrInt64s(key, row) for key, row in geometry(matrices).items()}
        experts = ir.Node(
            DOMAIN, packed.EXPERTS[format_], [x, chosen, weights, codes_in, scales_in, given[f"{ROLE}.slots"]],
            [ir.AttrFloat32("limit", self.limit), *places.values()], outputs=[y], name="experts",
        )  # fmt: skip
        graph = ir.Graph(
            [x, ids, codes_in, scales_in], [y], nodes=[route, experts], initializers=list(given.values()),
            opset_imports={"": ONNX_OPSET, DOMAIN: 1}, name="layer",
        )  # fmt: skip
        return ir.Model(graph, ir_version=10)

    def stacked(self) -> dict[str, Array]:
        """What the changed graph takes: rows of w1 and w3 in turn."""
        found = {}
        for at, kind in enumerate(("codes", "scales")):
            w1, w2, w3 = (self.parts[part][at] for part in PARTS)
            both = np.empty((self.experts, 2 * self.inner, w1.shape[2]), np.uint8)
            both[:, 0::2], both[:, 1::2] = w1, w3
            found[f"{ROLE}.w13.{kind}"], found[f"{ROLE}.w2.{kind}"] = both, w2
        return found


class Run:
    """The changed graph of a layer in ONNX Runtime."""

    def __init__(self, layer: Layer, threads: int = 1) -> None:
        model = layer.model()
        self.stacks = stack_experts(model, ROLE)
        add_functions(model)
        self.layer = layer
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)

    def __call__(self, x: Array, ids: Array) -> Array:
        binding = self.session.io_binding()
        taken = {value.name for value in self.session.get_inputs()}
        binding.bind_cpu_input("x", x)
        if "ids" in taken:
            binding.bind_cpu_input("ids", ids)
        for role, array in self.layer.stacked().items():
            number = 24 if role.endswith("scales") else 2
            binding.bind_ortvalue_input(role, onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, number))
        binding.bind_output("y", "cpu")
        self.session.run_with_iobinding(binding)
        found: Array = binding.get_outputs()[0].numpy()
        return found


def value(name: str, dtype: ir.DataType, shape: list[Any]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def error(found: Array, expected: Array) -> float:
    """Of the whole, relative to its size."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


SIZES = [(32, 32, 4, 2), (64, 32, 8, 3), (32, 96, 5, 5), (160, 64, 16, 6)]


@pytest.mark.parametrize("hashed", [False, True], ids=["scores", "table"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_it_is_the_layer_in_float64(sizes: tuple[int, ...], hashed: bool) -> None:
    layer = Layer(*sizes, hashed=hashed)
    run = Run(layer)
    assert {name: stack.shape for name, stack in run.stacks.items()} == {
        name: array.shape for name, array in layer.stacked().items()
    }
    for tokens in (1, 2, 7, 40):
        given = layer.x(tokens)
        assert error(run(*given), layer.expected(*given)) < 1e-6


@pytest.mark.parametrize("limit", [0.25, 10.0, 1e30])
def test_the_limit_bites(limit: float) -> None:
    layer = Layer(64, 64, 4, 2, limit=limit)
    layer.parts["w1"][1][:], layer.parts["w3"][1][:] = 127, 127  # values of some ten
    x, ids = layer.x(5)
    expected = layer.expected(x, ids)
    assert error(Run(layer)(x, ids), expected) < 1e-6
    other = Layer(64, 64, 4, 2, limit=2 * limit, parts={})
    other.parts, other.gate, other.bias = layer.parts, layer.gate, layer.bias
    assert (error(other.expected(x, ids), expected) > 1e-3) is (limit < 100)


def test_of_equal_scores_the_lowest_experts_are_chosen() -> None:
    layer = Layer(32, 32, 8, 3)
    layer.gate[:], layer.bias[:] = layer.gate[0], 0
    given = layer.x(9)
    assert error(Run(layer)(*given), layer.expected(*given)) < 1e-6


def test_experts_that_nobody_chose_are_not_read() -> None:
    """The scales of all others are NaN."""
    layer = Layer(32, 64, 12, 4, hashed=True)
    layer.table = np.stack([np.random.default_rng(row).permutation(6)[:4] for row in range(VOCABULARY)])
    for part in PARTS:
        layer.parts[part][1][6:] = 255
    given = layer.x(30)
    found = Run(layer)(*given)
    assert error(found, layer.expected(*given)) < 1e-6


def test_a_table_may_name_an_expert_twice() -> None:
    layer = Layer(32, 32, 8, 3, hashed=True)
    layer.table[::2, 1] = layer.table[::2, 0]
    layer.table[1] = 5
    x, _ = layer.x(VOCABULARY)
    ids = np.arange(VOCABULARY)
    assert error(Run(layer)(x, ids), layer.expected(x, ids)) < 1e-6


@pytest.mark.parametrize("hashed", [False, True], ids=["scores", "table"])
def test_a_token_does_not_depend_on_its_neighbours_nor_on_threads(hashed: bool) -> None:
    layer = Layer(64, 96, 8, 3, hashed=hashed)
    x, ids = layer.x(33)
    run = Run(layer)
    together = run(x, ids)
    assert np.array_equal(together, Run(layer, threads=2)(x, ids))
    order = np.random.default_rng(0).permutation(33)
    assert np.array_equal(together[order], run(x[order], ids[order]))
    for row in range(0, 33, 8):
        np.testing.assert_allclose(run(x[row : row + 1], ids[row : row + 1])[0], together[row], rtol=0, atol=1e-6)


def test_nan_of_a_token_stays_with_it() -> None:
    layer = Layer(32, 32, 4, 2, hashed=True)
    x, ids = layer.x(5)
    x[3] = np.nan
    found = Run(layer)(x, ids)
    assert np.isnan(found[3]).all() and not np.isnan(found[[0, 1, 2, 4]]).any()


@pytest.mark.parametrize("other", ["e4m3", "blocks of 16", "48 channels"])
def test_what_qmoe_does_not_compute_is_left_as_it_is(other: str) -> None:
    layer = Layer(48 if other == "48 channels" else 64, 32, 4, 2)
    model = layer.model(FP8 if other == "e4m3" else FP4, 16 if other == "blocks of 16" else 32)
    before = [node.op_type for node in model.graph], [value.name for value in model.graph.inputs]
    assert stack_experts(model, ROLE) == {}
    assert ([node.op_type for node in model.graph], [value.name for value in model.graph.inputs]) == before
