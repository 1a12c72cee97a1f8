"""Calls of every operator: inputs that are the same on every machine, and what the outputs must be.

What is expected comes from the operators' definitions in float64 and can be kept in a file, so a machine with a GPU does
not have to compute it. Inputs are drawn from a counter by exact arithmetic: they have the same bits wherever they are made, whatever
the version of torch or numpy. Rows that no kernel may read hold NaN, or bytes that decode to it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from expert_cases import ExpertSizes, expert_call
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from foldkv.export.checkpoint.config_reader import spec_from_file
from foldkv.export.contract.geometry import CSA, HCA, ModelSpec
from foldkv.export.contract.layouts import LAYOUTS
from foldkv.export.contract.operators import STATE, TensorSpec, operator_spec
from foldkv.export.contract.products import EXACT, Product, layer_products
from foldkv.export.contract.profiles import HF, SERVED
from foldkv.export.contract.rows import DENSE, FP8_DS_MLA, INDEX_FP4, INDEX_FP8
from foldkv.export.contract.weights import BFLOAT16, WEIGHT_FORMAT
from foldkv.export.model.hadamard import hadamard_matrix
from foldkv.export.operators.attention import dense_attention, sparse_attention, window_attention
from foldkv.export.operators.compress import compress
from foldkv.export.operators.compress_online import compress_online
from foldkv.export.operators.hyper_connections import hc_post, hc_pre
from foldkv.export.operators.index import index_scores, index_select
from foldkv.export.operators.linear import block_linear
from foldkv.export.operators.route import route, route_hashed
from foldkv.export.operators.row_formats import pack, unpack
from foldkv.export.operators.window import window_update
from foldkv.plugins.declarations import PLUGINS
from foldkv.plugins.launch import plan
from foldkv.plugins.launch_sublayers import PRODUCT_SPAN
from foldkv.plugins.model import EXPERT_FORMS, operator_calls, product_call
from foldkv.plugins.plans import Plan

_HALF_STATE, _HALF_SINGLE = 2.0**-8, 2.0**-24  # relative half unit in the last place of bfloat16 and of float32
_TORCH = {"float32": torch.float32, "int32": torch.int32, "int64": torch.int64}


@dataclass(frozen=True)
class Geometry:
    """The sizes of a model that its operators see. ``index_*`` are the indexer's, ``rope_dim`` the channels that RoPE turns.

    ``experts`` has fewer experts than the model: their number only changes where an expert lies. ``gates`` are
    the experts that routing scores.
    """

    name: str
    window: int
    heads: int
    width: int
    rope_dim: int
    index_heads: int
    index_width: int
    topk: int
    ratio: int  # of CSA
    online_ratio: int  # of HCA
    streams: int
    gates: int
    experts: ExpertSizes
    products: tuple[Product, ...] = ()

    @classmethod
    def of_model(cls, name: str, spec: ModelSpec) -> Geometry:
        """The sizes of a model."""
        ratios = dict(zip(spec.layer_types, spec.ratios, strict=True))
        return cls(
            name, spec.sliding_window, spec.num_heads, spec.head_dim, spec.rope_dim, spec.index_heads,
            spec.index_head_dim, spec.index_topk, ratios[CSA], ratios[HCA], spec.hc_mult, spec.num_experts,
            ExpertSizes(spec.hidden_size, spec.moe_intermediate_size, spec.experts_per_token + 2, spec.experts_per_token),
            tuple({p.role: p for kind in (HCA, CSA) for p in layer_products(spec, kind)}.values()),
        )  # fmt: skip

    def product(self, group: str) -> Product:
        """The product of a weight's role, or else the first."""
        return next((product for product in self.products if product.role == group), self.products[0])


#: Of the small geometry: blocks that are cut off, channels that spans share, groups, and plain values.
_PRODUCTS = (
    Product("attn.wq_a.weight", 200, 600), Product("attn.wo_a.weight", 192, 160, groups=2),
    Product("attn.compressor.wkv.weight", 40, 320, EXACT, BFLOAT16),
)  # fmt: skip
SMALL = Geometry("small", window=16, heads=4, width=64, rope_dim=16, index_heads=8, index_width=32, topk=8, ratio=4,
                 online_ratio=8, streams=4, gates=24, experts=ExpertSizes(hidden=64, inner=32, count=5, chosen=2), products=_PRODUCTS)  # fmt: skip


@dataclass(frozen=True)
class Expectation:
    """What one output must hold.

    ``kind`` says how it is compared: "bits" with ``values``, "kept" with the bits of input ``source``, "near" within
    ``bound`` of ``values`` and, as a whole, within ``relative`` of their norm, "set" with ``values`` in any order along the
    last axis, "codes": values of the row format ``format_``. ``where`` picks rows by a mask over the leading axes.
    """

    output: int
    kind: str
    where: Tensor | None = None
    values: Tensor | None = None
    bound: Tensor | float = 0.0
    relative: float = math.inf
    source: int = -1
    format_: str = ""


@dataclass(frozen=True)
class Case:
    """A call, and how to find out what is expected of it.

    ``width`` are the channels of a row of the state that it writes, which the shapes of packed rows do not tell. ``batch`` is
    the number of sequences.
    """

    operator: str
    row_format: str
    inputs: list[Tensor]
    expect: Callable[[], list[Expectation]]
    attributes: dict[str, Any] = field(default_factory=dict)
    geometry: Geometry = SMALL
    width: int = 0
    batch: int = 1

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every symbol."""
        shapes = [tuple(value.shape) for value in self.inputs]
        return PLUGINS[self.operator].dimensions(shapes, row_format=self.row_format) | self.attributes

    def plan(self, *, sm: int, **options: Any) -> Plan:
        """What the call launches."""
        return plan(
            self.operator, self.sizes, self.attributes, sm=sm, dtype="bfloat16", row_format=self.row_format,
            rope_dim=self.geometry.rope_dim, **options,
        )  # fmt: skip

    def outputs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Copies of the inputs, and outputs full of NaN (or -7); those in place are inputs."""
        inputs, sizes, spec = [value.clone() for value in self.inputs], self.sizes, PLUGINS[self.operator]
        outputs, shapes = [], spec.output_shapes(sizes, row_format=self.row_format)
        for index, (tensor, shape) in enumerate(zip(spec.outputs, shapes, strict=True)):
            if index in spec.aliases:
                outputs.append(inputs[spec.aliases[index]])
                continue
            kind = (
                (torch.bfloat16 if self.row_format == DENSE else torch.int8)
                if tensor.dtype == STATE
                else _TORCH[tensor.dtype]
            )
            outputs.append(torch.full(shape, torch.nan if kind.is_floating_point else -7, dtype=kind))
        return inputs, outputs

    def alone(self, sequence: int) -> Case:
        """The same call with one of its sequences only."""
        spec = PLUGINS[self.operator]
        inputs = [self.part(tensor, value, sequence) for tensor, value in zip(spec.inputs, self.inputs, strict=True)]
        return replace(self, inputs=inputs, expect=list, batch=1)

    def part(self, declared: TensorSpec, value: Tensor, sequence: int) -> Tensor:
        """What one sequence has of a tensor: its row, its tokens, or all of a tensor that sequences share."""
        if declared.dims[0] == "M":
            return value.unflatten(0, (self.batch, -1))[sequence]
        return value[sequence : sequence + 1] if declared.dims[0] == "B" else value

    def digest(self) -> str:
        """sha256 of the inputs."""
        digest = hashlib.sha256()
        for value in self.inputs:
            digest.update(value.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def check(self, found: Sequence[Tensor], expected: Sequence[Expectation] | None = None) -> dict[str, float]:
        """Compare outputs with what is expected.

        Returns:
            ``error``, ``bound`` and ``relative`` of the output that came nearest to its bound.

        Raises:
            AssertionError: an output is not what is expected; the message says which, and by how much.
        """
        report = {"error": 0.0, "bound": 0.0, "relative": 0.0}
        for one in self.expect() if expected is None else expected:
            name = PLUGINS[self.operator].outputs[one.output].name
            value = found[one.output] if one.where is None else found[one.output][one.where]
            if one.kind == "kept":
                other = self.inputs[one.source] if one.where is None else self.inputs[one.source][one.where]
                _same(name, value, other)
            elif one.kind == "bits":
                assert one.values is not None
                _same(name, value, one.values)
            elif one.kind == "set":
                assert one.values is not None
                _same(name, value.sort(dim=-1).values, one.values.sort(dim=-1).values)
            elif one.kind == "codes":
                read = (
                    value.float()
                    if self.row_format == DENSE
                    else unpack(value, self.row_format, self.width, self.rope_dim)
                )
                again = unpack(pack(read, one.format_, self.rope_dim), one.format_, self.width, self.rope_dim)
                _same(name, read, again)
            else:
                read = value if value.dtype != torch.int8 else unpack(value, self.row_format, self.width, self.rope_dim)
                near = _near(name, read, one)
                if near["error"] * report["bound"] >= report["error"] * near["bound"]:
                    report = near
        return report

    @property
    def rope_dim(self) -> int:
        """Rotated channels of a row."""
        return self.geometry.rope_dim


def _same(name: str, found: Tensor, expected: Tensor) -> None:
    one, other = (value.nan_to_num(7.0) if value.is_floating_point() else value for value in (found, expected))
    if not torch.equal(one, other.to(one.dtype)):
        assert one.shape == other.shape, f"{name} has shape {tuple(one.shape)}, expected {tuple(other.shape)}"
        wrong = one != other
        first = tuple(int(place) for place in wrong.nonzero()[0])
        raise AssertionError(
            f"{name} differs in {int(wrong.sum())} of {wrong.numel()} values, first at {first}: "
            f"{found[first].item()} instead of {expected[first].item()}"
        )


def _near(name: str, found: Tensor, one: Expectation) -> dict[str, float]:
    assert one.values is not None
    assert found.shape == one.values.shape, f"{name} has shape {tuple(found.shape)}, expected {tuple(one.values.shape)}"
    error = (found.double() - one.values.double()).abs()
    assert not error.isnan().any(), f"{name} has NaN in {int(error.isnan().sum())} of {error.numel()} values"
    if not error.numel():
        return {"error": 0.0, "bound": 0.0, "relative": 0.0}
    bound = torch.as_tensor(one.bound, dtype=torch.float64).expand(error.shape)
    worst = int((error - bound).argmax())
    report = {
        "error": float(error.flatten()[worst]), "bound": float(bound.flatten()[worst]),
        "relative": float(error.norm() / one.values.double().norm().clamp(min=1e-30)),
    }  # fmt: skip
    over = int((error > bound).sum())
    assert not over, (
        f"{name} is off in {over} of {error.numel()} values: by {report['error']:.3g}, bound {report['bound']:.3g}"
    )
    assert report["relative"] <= one.relative, (
        f"{name} is off by {report['relative']:.3g} of its norm, bound {one.relative:.3g}"
    )
    return report


class Draw:
    """Random values from a counter. The counter's bits are the same everywhere, and what follows is exact."""

    def __init__(self, seed: str) -> None:
        """The seed is any text."""
        self._bits = np.random.Philox(key=int.from_bytes(hashlib.sha256(seed.encode()).digest()[:16], "little"))

    def _raw(self, count: int) -> Any:
        return self._bits.random_raw(count)

    def normal(self, *shape: int) -> Tensor:
        """float32 of mean 0 and deviation 1: sums of four uniform values."""
        count = math.prod(shape)
        halves = self._raw(count).view(np.uint16).reshape(count, 4).astype(np.int32).sum(axis=1)
        return torch.from_numpy(((halves - 131_070) / 37_837.0).astype(np.float32).reshape(shape))

    def uniform(self, *shape: int) -> Tensor:
        """float32 from 0 to 1."""
        return torch.from_numpy(((self._raw(math.prod(shape)) >> 40) / 2.0**24).astype(np.float32).reshape(shape))

    def bytes(self, *shape: int) -> Tensor:
        """uint8 of any value."""
        count = math.prod(shape)
        return torch.from_numpy(self._raw(-(-count // 8)).view(np.uint8)[:count].reshape(shape))

    def codes(self, *shape: int) -> Tensor:
        """e4m3 codes as int8, any but NaN."""
        drawn = self.bytes(*shape).view(torch.int8)
        return torch.where(drawn & 0x7F == 0x7F, 0, drawn)

    def permutation(self, count: int) -> Tensor:
        """The numbers below ``count`` in random order."""
        return torch.from_numpy(np.argsort(self._raw(count), kind="stable"))


def _wide(*values: Tensor) -> list[Tensor]:
    return [value.double() if value.is_floating_point() else value for value in values]


def _ints(values: Sequence[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


def _frequencies(rope_dim: int) -> Tensor:
    # Powers of two: the same bits everywhere.
    return 2.0 ** (-torch.arange(rope_dim // 2) * 16.0 / (rope_dim // 2))


@dataclass(frozen=True)
class _Call:
    """What a maker is given: the sequences, the sizes and the random values."""

    draw: Draw
    of: Geometry
    row_format: str
    start: Sequence[int]
    real: Sequence[int]
    chunk: int
    group: str

    @property
    def batch(self) -> int:
        return len(self.start)

    @property
    def tail(self) -> list[Tensor]:
        """positions and num_tokens."""
        return [_ints(self.start), _ints(self.real)]

    def stored(self, values: Tensor, *, decode: bool = True) -> tuple[Tensor, Tensor]:
        """Rows [..., D] of float32 as stored, and the float32 values that they represent."""
        if self.row_format == DENSE:
            return values.bfloat16(), values.bfloat16().float()
        unread = values.isnan().any(-1, keepdim=True)
        data = pack(values.nan_to_num(), self.row_format, self.of.rope_dim)
        if not decode:
            return data.masked_fill(unread, -1), data
        read = unpack(data, self.row_format, values.shape[-1], self.of.rope_dim)
        return data.masked_fill(unread, -1), read.masked_fill(unread, torch.nan)

    def ring(self, window: int, chunk: int, real: Sequence[int]) -> Tensor:
        rows = self.draw.normal(self.batch, window + chunk, self.of.width)
        for b, (first, count) in enumerate(zip(self.start, real, strict=True)):
            rows[b, min(first, window) : window] = torch.nan
            rows[b, window + count :] = torch.nan
        return rows

    def entries(self, ratio: int, width: int, capacity: int, real: Sequence[int]) -> Tensor:
        entries = self.draw.normal(self.batch, capacity, width)
        for b, (first, count) in enumerate(zip(self.start, real, strict=True)):
            entries[b, (first + count) // ratio :] = torch.nan
        return entries

    def capacity(self, ratio: int, capacity: int | None) -> int:
        """Entries of the longest sequence and a few more, unless given."""
        return capacity or (max(self.start) + self.chunk) // ratio + 5


def _window_update_case(call: _Call, **_: Any) -> Case:
    """Exact, in every format."""
    window, _values = call.stored(call.ring(call.of.window, 0, [0] * call.batch))
    kv = call.draw.normal(call.batch, call.chunk, call.of.width)

    def expect() -> list[Expectation]:
        expected = window_update(window, call.stored(kv)[0], *call.tail)
        return [Expectation(i, "bits", values=value) for i, value in enumerate(expected)]

    return Case("FoldkvWindowUpdate", call.row_format, [window, kv, *call.tail], expect)


#: Half a step of a code, relative to the value, and half the least step, relative to the largest value of a row.
_STEPS = {DENSE: (_HALF_STATE, 0.0), FP8_DS_MLA: (2.0**-4, 2.0**-9 / 448), INDEX_FP8: (2.0**-4, 2.0**-9 / 448),
          INDEX_FP4: (2.0**-2, 0.5 / 6)}  # fmt: skip


def _compress_case(operator: str, call: _Call, *, capacity: int | None = None, **_: Any) -> Case:
    """Entries within half a step of their code, carries exact or, of an online softmax, as accurate as float32; dense
    rows hold nothing but codes where they should."""
    batch, draw, rows, start, real = call.batch, call.draw, call.row_format, call.start, call.real
    online = "Online" in operator
    ratio, series = (call.of.online_ratio, 1) if online else (call.of.ratio, 2)
    values_of = operator_spec(operator).rounds or rows
    width = call.of.index_width if call.group == "index_entries" else call.of.width
    held, _values = call.stored(draw.normal(batch, call.capacity(ratio, capacity), width), decode=False)
    fresh = [draw.normal(batch, call.chunk, width * series) for _ in range(2)]
    for b, count in enumerate(real):
        for value in fresh:
            value[b, count:] = torch.nan
    bias, norm = draw.normal(ratio, width * series), 1 + draw.uniform(width)
    if online:
        carry = draw.normal(batch, 3, width)
        carry[:, 1] = 1 + draw.uniform(batch, width)
        for b, first in enumerate(start):
            if first % ratio == 0:
                carry[b] = torch.nan  # no window is open
        carries = [carry]
    else:
        carries = [draw.normal(batch, ratio * series, width * series) for _ in range(2)]
        for b, first in enumerate(start):
            for carry in carries:
                carry[b, first:] = torch.nan
    tail = [_frequencies(call.of.rope_dim), *call.tail]
    attributes: dict[str, Any] = {"ratio": ratio, "eps": 1e-6}
    given = [*carries, *fresh, bias, norm]
    own = {"rope_dim": call.of.rope_dim, **attributes} if operator.endswith("Fp8") else attributes
    matrices = []
    if operator.endswith("Fp4"):
        # One that is neither symmetric nor what a kernel could know without reading it.
        matrices = [hadamard_matrix(width)[draw.permutation(width)].contiguous()]

    def expect() -> list[Expectation]:
        definition = compress_online if online else compress
        # The rows that a definition may read and keep are all that closes: values of other entries play no part.
        places = torch.zeros(batch, held.shape[1], width, dtype=torch.float64)
        expected = list(definition(places, *_wide(*given), *tail, **attributes))
        for matrix in matrices:
            expected[0] = torch.matmul(expected[0], matrix.double())
        half_step, smallest = _STEPS[values_of]
        spread = width**0.5 if matrices else 1
        slack = math.sqrt(2 * width) * float(norm.max()) * (128 * _HALF_SINGLE) * spread
        closed = torch.zeros(held.shape[:2], dtype=torch.bool)
        for b, (first, count) in enumerate(zip(start, real, strict=True)):
            closed[b, first // ratio : (first + count) // ratio] = True
        assert closed.any(), f"no window of {operator} closes"
        exact = expected[0][closed]
        bound = half_step * exact.abs() + smallest * exact.abs().amax(-1, keepdim=True) + slack
        found = [
            Expectation(0, "kept", where=~closed, source=0),
            Expectation(0, "near", where=closed, values=exact, bound=bound),
        ]
        if rows != values_of:
            found.append(Expectation(0, "codes", where=closed, format_=values_of))
        for i, other in enumerate(expected[1:], 1):
            if not online:
                found.append(Expectation(i, "bits", values=other.float()))
                continue
            for b, (first, count) in enumerate(zip(start, real, strict=True)):
                if (first + count) % ratio:
                    where = torch.arange(batch) == b
                    limit = 64 * _HALF_SINGLE * (1 + float(other[b].abs().max()))
                    found.append(Expectation(i, "near", where=where, values=other[b : b + 1], bound=limit))
        return found

    return Case(operator, rows, [held, *given, *tail, *matrices], expect, own, width=width)


def _index_scores_case(call: _Call, *, capacity: int | None = None, **_: Any) -> Case:
    """Scores of entries that a query may choose, as accurate as float32; others may be anything."""
    of, batch, chunk = call.of, call.batch, call.chunk
    q = call.draw.normal(batch, chunk, of.index_heads, of.index_width)
    weights = call.draw.normal(batch, chunk, of.index_heads)
    size = call.capacity(of.ratio, capacity)
    stored, values = call.stored(call.entries(of.ratio, of.index_width, size, [chunk] * batch))
    tail = [_ints(call.start), torch.tensor([max(call.start) + chunk])]

    def expect() -> list[Expectation]:
        expected = index_scores(*_wide(q, weights, values), *tail, of.ratio)
        reach = q.double().norm(dim=-1).max() * values.double().nan_to_num().norm(dim=-1).max()
        # Queries are split in two halves of the state's type: what is lost of them is a square of its rounding.
        unit = _HALF_STATE**2 + 2 * of.index_width * _HALF_SINGLE
        bound = float(reach * weights.abs().sum(-1).max() * unit)
        seen = torch.zeros(batch, chunk, size, dtype=torch.bool)
        for b, first in enumerate(call.start):
            for s in range(chunk):
                seen[b, s, : (first + s + 1) // of.ratio] = True
        return [Expectation(0, "near", where=seen, values=expected[seen], bound=bound, relative=2.0**-14)]

    return Case("FoldkvIndexScores", call.row_format, [q, weights, stored, *tail], expect, {"ratio": of.ratio})


def _index_select_case(call: _Call, *, capacity: int | None = None, **_: Any) -> Case:
    """The same set of entries; the order is free. Some scores are equal, as where every head's ReLU gives zero."""
    of = call.of
    scores = call.draw.normal(call.batch, call.chunk, call.capacity(of.ratio, capacity))
    scores[call.draw.uniform(*scores.shape) < 0.3] = 0.0
    tail = [_ints(call.start)]

    def expect() -> list[Expectation]:
        return [Expectation(0, "set", values=index_select(scores, *tail, of.ratio, of.topk))]

    attributes = {"ratio": of.ratio, "topk": of.topk}
    return Case("FoldkvIndexSelect", call.row_format, [scores, *tail], expect, attributes)


def _attention_case(
    operator: str, call: _Call, *, capacity: int | None = None, window: int | None = None, topk: int | None = None
) -> Case:
    """Within the rounding of weights."""
    of, batch, chunk, start, real = call.of, call.batch, call.chunk, call.start, call.real
    ratio, topk = of.online_ratio if operator == "FoldkvDenseAttention" else of.ratio, topk or of.topk
    q, sinks = call.draw.normal(batch, chunk, of.heads, of.width), call.draw.normal(of.heads)
    near, near_values = call.stored(call.ring(window or of.window, chunk, real))
    tail = [_frequencies(of.rope_dim), *call.tail]
    context = torch.tensor([max(first + count for first, count in zip(start, real, strict=True))])
    attributes: dict[str, Any] = {}
    read = [near_values]
    if operator == "FoldkvWindowAttention":
        inputs = [q, near, sinks, *tail]
    else:
        size = call.capacity(ratio, capacity)
        far, far_values = call.stored(call.entries(ratio, of.width, size, real))
        read.append(far_values)
        inputs = [q, near, far, sinks, *tail, context]
        attributes = {"ratio": ratio}
        if operator == "FoldkvSparseAttention":
            chosen = torch.full((batch, chunk, topk), -1, dtype=torch.int32)
            for b, (first, count) in enumerate(zip(start, real, strict=True)):
                for s in range(count):
                    picked = call.draw.permutation(min((first + s + 1) // ratio, size))[:topk]
                    chosen[b, s, call.draw.permutation(topk)[: len(picked)]] = picked.int()
            inputs, attributes = [q, near, far, chosen, sinks, *tail], {}

    def expect() -> list[Expectation]:
        # The kernels round queries to the state's type, whatever the rows; so does the reference.
        wide = _wide(q.bfloat16(), *read)
        if operator == "FoldkvWindowAttention":
            expected = window_attention(*wide, sinks.double(), *tail)
        elif operator == "FoldkvSparseAttention":
            expected = sparse_attention(*wide, inputs[3], sinks.double(), *tail)
        else:
            expected = dense_attention(*wide, sinks.double(), *tail, context, ratio)
        # Weights are rounded to the state's type; logits and sums are float32, and turning mixes two channels.
        values = torch.cat([part.double().nan_to_num().flatten(0, -2) for part in read])
        reach = float(q.double().norm(dim=-1).max() * values.norm(dim=-1).max()) / math.sqrt(of.width)
        unit = _HALF_STATE + (2 * of.width * max(reach, 1.0) + 128) * _HALF_SINGLE
        valid = torch.arange(chunk)[None, :] < call.tail[1][:, None]
        bound = 2 * unit * float(values.abs().max())
        # Roundings of many weights are independent, so the whole is nearer than the worst case of one value.
        return [Expectation(0, "near", where=valid, values=expected[valid], bound=bound, relative=2 * _HALF_STATE)]

    return Case(operator, call.row_format, inputs, expect, attributes)


def _narrow(width: int) -> float:
    """The power of two nearest to ``width ** -0.5``, for weights whose products are about 1 and have the same bits everywhere."""
    return float(2.0 ** -round(math.log2(width) / 2))


def _product_unit(width: int) -> float:
    """The error of a float32 product over ``width`` channels in parts of PRODUCT_SPAN, relative to the factors' norms."""
    return (PRODUCT_SPAN + width / PRODUCT_SPAN + 16) * _HALF_SINGLE


def _hc_pre_case(call: _Call, **_: Any) -> Case:
    """As accurate as float32 where a token's numbers are: those that follow from them differ by as much, and not more."""
    of, width = call.of, call.of.streams * call.of.experts.hidden
    rows = (2 + of.streams) * of.streams
    streams = call.draw.normal(call.batch, call.chunk, of.streams, of.experts.hidden) * 4
    fn = call.draw.normal(rows, width) * _narrow(width)
    inputs = [streams, fn, call.draw.normal(rows), 1 + call.draw.uniform(3)]
    attributes: dict[str, Any] = {"norm_eps": 1e-6, "iterations": 20, "eps": 1e-6}

    def expect() -> list[Expectation]:
        x, post, comb = hc_pre(*_wide(*inputs), *attributes.values())
        number = 2 * _product_unit(width) * math.sqrt(width) * float(fn.double().norm(dim=-1).max())
        slack = number + 256 * _HALF_SINGLE
        bounds = (slack * float(streams.abs().sum(2).max()), slack, slack)
        return [
            Expectation(i, "near", values=value, bound=bound, relative=2.0**-16)
            for i, (value, bound) in enumerate(zip((x, post, comb), bounds, strict=True))
        ]

    return Case("FoldkvHcPre", call.row_format, inputs, expect, attributes)


def _hc_post_case(call: _Call, **_: Any) -> Case:
    """A rounding per term."""
    of, shape = call.of, (call.batch, call.chunk, call.of.streams)
    streams, out = (
        call.draw.normal(*shape, of.experts.hidden),
        call.draw.normal(call.batch, call.chunk, of.experts.hidden),
    )
    inputs = [streams, out, 2 * call.draw.uniform(*shape), call.draw.uniform(*shape, of.streams)]

    def expect() -> list[Expectation]:
        largest = hc_post(*(value.abs() for value in _wide(*inputs)))
        bound = (of.streams + 2) * _HALF_SINGLE * largest
        return [Expectation(0, "near", values=hc_post(*_wide(*inputs)), bound=bound)]

    return Case("FoldkvHcPost", call.row_format, inputs, expect)


def _route_case(operator: str, call: _Call, **_: Any) -> Case:
    """The same experts, those of equal scores in the order of their indices; weights as accurate as float32."""
    of, tokens, hashed = call.of, call.batch * call.chunk, operator == "FoldkvRouteHashed"
    x = call.draw.normal(tokens, of.experts.hidden)
    half = call.draw.normal(of.gates // 2, of.experts.hidden) * _narrow(of.experts.hidden)
    weight = half.repeat_interleave(2, dim=0).bfloat16()  # of two neighbours both are equally good
    attributes: dict[str, Any] = {"scaling": 1.5, WEIGHT_FORMAT: BFLOAT16}
    if hashed:
        table = torch.stack([call.draw.permutation(of.gates)[: of.experts.chosen] for _ in range(40)])
        inputs = [x, weight, table, call.draw.permutation(40).repeat(1 + tokens // 40)[:tokens]]
    else:
        inputs = [x, weight, (call.draw.normal(of.gates // 2) / 8).repeat_interleave(2)]
        attributes = {"topk": of.experts.chosen, **attributes}

    def expect() -> list[Expectation]:
        given = [*_wide(*inputs[:2]), *(inputs[2:] if hashed else _wide(inputs[2]))]
        chosen, weights = (route_hashed if hashed else route)(*given, *attributes.values())
        logit = _product_unit(of.experts.hidden) * float(
            x.double().norm(dim=-1).max() * weight.double().norm(dim=-1).max()
        )
        bound = 4 * (logit + 16 * _HALF_SINGLE)
        return [
            Expectation(0, "bits", values=chosen),
            Expectation(1, "near", values=weights, bound=bound, relative=2.0**-16),
        ]

    return Case(operator, call.row_format, inputs, expect, attributes)


def _experts_case(operator: str, call: _Call, **more: Any) -> Case:
    """Every token of the chunk is computed, also those that are no sequence's."""
    of = call.of.experts
    made = expert_call(operator, call.draw, of, call.batch * call.chunk, **more)

    def expect() -> list[Expectation]:
        values, bound = made.expected()
        # Roundings of many values are independent, so the whole is nearer than the worst case of one.
        return [Expectation(0, "near", values=values, bound=bound, relative=4 * _HALF_STATE)]

    return Case(operator, DENSE, made.inputs, expect, made.attributes)


def _linear_case(call: _Call, **_: Any) -> Case:
    """Within the rounding of float32 sums; tokens of no sequence are NaN."""
    product, draw = call.of.product(call.group), call.draw
    _, _, sizes, attributes = product_call(product)
    x = draw.normal(call.batch, call.chunk, product.groups * product.columns)
    valid = torch.arange(call.chunk)[None, :] < call.tail[1][:, None]
    x[~valid] = torch.nan
    tokens, shape, grid = x.flatten(0, 1), (product.rows, product.columns), (sizes["SN"], sizes["SK"])
    if product.released == BFLOAT16:
        weight, scale = draw.normal(*shape).bfloat16(), torch.ones(grid)
    else:
        weight, scale = draw.codes(*shape), (121 + 6 * draw.uniform(*grid)).to(torch.int8)

    def expect() -> list[Expectation]:
        values = tokens.nan_to_num().double()
        expected = block_linear(values, weight, scale, **attributes)
        plain = weight.abs() if product.released == BFLOAT16 else weight & 0x7F  # without its signs
        reach = block_linear(values.abs(), plain, scale, **attributes).amax(1, keepdim=True)
        where = valid.flatten()
        bound = reach[where] * (product.columns * _HALF_SINGLE)
        return [Expectation(0, "near", where=where, values=expected[where], bound=bound, relative=2.0**-17)]

    return Case("FoldkvBlockLinear", call.row_format, [tokens, weight, scale], expect, attributes)


MAKERS: dict[str, Callable[..., Case]] = {
    "FoldkvBlockLinear": _linear_case,
    **{name: functools.partial(_experts_case, name) for name in EXPERT_FORMS},
    "FoldkvWindowUpdate": _window_update_case,
    "FoldkvIndexScores": _index_scores_case,
    "FoldkvIndexSelect": _index_select_case,
    "FoldkvHcPre": _hc_pre_case,
    "FoldkvHcPost": _hc_post_case,
    **{name: functools.partial(_route_case, name) for name in ("FoldkvRoute", "FoldkvRouteHashed")},
    **{name: functools.partial(_compress_case, name) for name in PLUGINS if "Compress" in name},
    **{name: functools.partial(_attention_case, name) for name in PLUGINS if "Attention" in name},
}
#: Every operator with every row format that it touches.
FORMS = [(operator, rows) for operator, spec in PLUGINS.items() for rows in sorted(spec.row_formats) or [DENSE]]
ROTARY = SMALL.rope_dim


def make_case(
    operator: str, rows: str = DENSE, *, start: Sequence[int], real: Sequence[int], chunk: int,
    geometry: Geometry = SMALL, group: str = "", **more: Any,
) -> Case:  # fmt: skip
    """A call of ``operator`` with sequences that hold ``start`` tokens and get ``real`` of a chunk's; see MAKERS.

    ``group`` is the state that it touches; the default is what its rows can only be, or the entries.
    """
    group = group or ("index_entries" if rows in (INDEX_FP8, INDEX_FP4) or operator.endswith("Fp4") else "entries")
    sizes = {name: value for name, value in asdict(geometry).items() if name != "products"}
    draw = Draw(json.dumps([operator, rows, list(start), list(real), chunk, sizes, group, more]))
    case = MAKERS[operator](_Call(draw, geometry, rows, start, real, chunk, group), **more)
    return replace(case, geometry=geometry, batch=len(start))


@dataclass(frozen=True)
class Form:
    """An operator as a model's engines call it: with rows of one state group in one format, and the sequences of a call."""

    operator: str
    group: str
    row_format: str
    shape: str
    start: tuple[int, ...]
    real: tuple[int, ...]
    chunk: int

    @property
    def name(self) -> str:
        """A name that is unique within a model."""
        return f"{self.operator}-{self.group}-{self.row_format}-{self.shape}"

    def case(self, geometry: Geometry) -> Case:
        """The call with its inputs."""
        return make_case(
            self.operator, self.row_format, start=self.start, real=self.real, chunk=self.chunk, geometry=geometry, group=self.group,
        )  # fmt: skip


def model_forms(spec: ModelSpec, geometry: Geometry, *, million: bool = False) -> list[Form]:
    """Every form that engines of a model launch, in all layouts and profiles, for a token per sequence and for a chunk.

    A chunk longer than the window is fed to what writes it. Sequences of a batch are at different positions: one with more entries than are chosen, one that has not filled its
    window, one between. ``million`` adds calls at the end of a context of 1,048,576 tokens.
    """
    found: dict[tuple[str, str, str], None] = {}
    for profile in (HF, SERVED):
        for name in ("dense", "fp8", "fp8+fp4"):
            for call in operator_calls(spec, profile, EXPERT_FORMS):
                rows = LAYOUTS[name].format_of(call.group) or DENSE
                known = PLUGINS[call.operator].row_formats
                if not known or rows in known:
                    found[call.operator, call.group, rows if known else DENSE] = None
    forms = []
    for operator, group, rows in found:
        far = _longest(operator, geometry)
        forms.append(Form(operator, group, rows, "token", (far, 7, far // 3), (1, 1, 1), 1))
        forms.append(Form(operator, group, rows, "chunk", (far, 6), (4, 2), 9))
        if operator == "FoldkvBlockLinear":  # more tokens than those that share a row's channels
            forms.append(Form(operator, group, rows, "long", (far, 6), (40, 2), 40))
        if operator == "FoldkvWindowUpdate":  # a chunk that fills the ring more than once
            forms.append(
                Form(operator, group, rows, "long", (far, 6), (2 * geometry.window + 9, 2), 2 * geometry.window + 9)
            )
        if (
            operator == "FoldkvIndexSelect"
        ):  # more entries than one program selects from, and parts that depend on the batch
            forms.append(Form(operator, group, rows, "parted", (36_003, 9_001, 4 * geometry.topk - 2), (1, 1, 1), 1))
        if million and operator in ("FoldkvIndexScores", "FoldkvIndexSelect", "FoldkvDenseAttention"):
            forms.append(Form(operator, group, rows, "million", (1_048_574,), (1,), 1))
    return forms


def drawn(forms: Sequence[Form], geometry: Geometry) -> Iterator[tuple[Form, Case]]:
    """The forms with their inputs, which are drawn ahead on every processor that there is, a few at a time."""
    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:
        waiting: deque[tuple[Form, Future[Case]]] = deque()
        for form in forms:
            waiting.append((form, pool.submit(form.case, geometry)))
            if len(waiting) > 16:
                first, future = waiting.popleft()
                yield first, future.result()
        for form, future in waiting:
            yield form, future.result()


def _longest(operator: str, geometry: Geometry) -> int:
    """Tokens of the longest sequence of a batch: enough for what its operator does only then."""
    if operator == "FoldkvDenseAttention":
        return 546 * geometry.online_ratio + geometry.online_ratio - 1  # three spans of keys
    if "Online" in operator:
        return 20 * geometry.online_ratio - 1  # this token closes a window
    if "Compress" in operator:
        return 2_500 * geometry.ratio + geometry.ratio - 1
    return geometry.ratio * (geometry.topk + 80) - 1


def models(root: Path) -> Iterator[tuple[Geometry, ModelSpec]]:
    """The models whose shapes are tested."""
    for name, file in (
        ("tiny-v4", "examples/tiny-v4/config.json"), ("v4-flash", "export/configs/deepseek-v4-flash.json"),
        ("v4-pro", "export/configs/deepseek-v4-pro.json"),
    ):  # fmt: skip
        spec = spec_from_file(root / file)
        yield Geometry.of_model(name, spec), spec


def save_expectations(path: Path, expected: Mapping[str, Sequence[Expectation]], digests: Mapping[str, str]) -> None:
    """Write what is expected of cases, by name, with the digests of their inputs; float64 becomes float32."""
    tensors: dict[str, Tensor] = {}
    table: dict[str, Any] = {}
    for name, many in expected.items():
        rows = []
        for i, one in enumerate(many):
            row = {key: getattr(one, key) for key in ("output", "kind", "relative", "source", "format_")}
            for key in ("where", "values", "bound"):
                value = getattr(one, key)
                if isinstance(value, Tensor):
                    kept = value.float() if value.dtype == torch.float64 else value
                    tensors[f"{name}/{i}/{key}"] = kept.clone(memory_format=torch.contiguous_format)
                elif key == "bound":
                    row[key] = value
            rows.append(row)
        table[name] = {"inputs_sha256": digests[name], "expectations": rows}
    save_file(tensors, path, metadata={"cases": json.dumps(table)})


def load_expectations(path: Path) -> dict[str, tuple[str, list[Expectation]]]:
    """What :func:`save_expectations` wrote: by name the digest of the inputs, and what is expected."""
    found = {}
    with safe_open(path, framework="pt") as file:
        known = set(file.keys())
        for name, case in json.loads(file.metadata()["cases"]).items():
            many = []
            for i, row in enumerate(case["expectations"]):
                keys = [key for key in ("where", "values", "bound") if f"{name}/{i}/{key}" in known]
                many.append(Expectation(**row | {key: file.get_tensor(f"{name}/{i}/{key}") for key in keys}))
            found[name] = (case["inputs_sha256"], many)
    return found
