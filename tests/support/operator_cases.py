"""One call per operator and row format: inputs, and a check of the outputs against the definition in float64.

Rows that no kernel may read hold NaN, or bytes that decode to it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foldkv.export.layouts import DENSE, FP8_DS_MLA, INDEX_FP4, INDEX_FP8
from foldkv.export.model.hadamard import hadamard_matrix
from foldkv.export.operators.attention import dense_attention, sparse_attention, window_attention
from foldkv.export.operators.compress import compress
from foldkv.export.operators.compress_online import compress_online
from foldkv.export.operators.index import index_scores, index_select
from foldkv.export.operators.rows import pack, unpack
from foldkv.export.operators.window import window_update
from foldkv.plugins.spec import PLUGINS, STATE

WINDOW, HEADS, WIDTH, HALF = 16, 4, 64, 8
INDEX_HEADS, INDEX_WIDTH, TOPK = 8, 32, 8
ROTARY = 2 * HALF
_HALF_STATE, _HALF_SINGLE = 2.0**-8, 2.0**-24  # relative half unit in the last place of bfloat16 and of float32
_TORCH = {"float32": torch.float32, "int32": torch.int32, "int64": torch.int64}


@dataclass(frozen=True)
class Case:
    """A call. ``check`` takes the outputs in order and raises AssertionError.

    ``sizes`` are those of the spec's symbols that the shapes of packed rows do not tell.
    """

    operator: str
    rows: str
    inputs: list[Tensor]
    check: Callable[[Sequence[Tensor]], None]
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every symbol."""
        shapes = [tuple(value.shape) for value in self.inputs]
        return PLUGINS[self.operator].dimensions(shapes, rows=self.rows) | self.attributes

    def outputs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Copies of the inputs, and outputs full of NaN (or -7); those in place are inputs."""
        inputs, sizes, spec = [value.clone() for value in self.inputs], self.sizes, PLUGINS[self.operator]
        outputs = []
        for index, tensor in enumerate(spec.outputs):
            if index in spec.aliases:
                outputs.append(inputs[spec.aliases[index]])
                continue
            shape = [sum(sizes[part.strip()] for part in str(dim).split("+")) for dim in tensor.stored_dims(self.rows)]
            kind = (
                (torch.bfloat16 if self.rows == DENSE else torch.int8)
                if tensor.dtype == STATE
                else _TORCH[tensor.dtype]
            )
            outputs.append(torch.full(shape, torch.nan if kind.is_floating_point else -7, dtype=kind))
        return inputs, outputs


def _wide(*values: Tensor) -> list[Tensor]:
    return [value.double() if value.is_floating_point() else value for value in values]


def _ints(values: Sequence[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


def _frequencies() -> Tensor:
    return 10000.0 ** (-torch.arange(HALF) / HALF)


def _stored(values: Tensor, format_: str) -> tuple[Tensor, Tensor]:
    """Rows [..., D] of float32 as they are stored, and the float32 values that they stand for."""
    if format_ == DENSE:
        return values.bfloat16(), values.bfloat16().float()
    unread = values.isnan().any(-1, keepdim=True)
    data = pack(values.nan_to_num(), format_, ROTARY)
    read = unpack(data, format_, values.shape[-1], ROTARY)
    return data.masked_fill(unread, -1), read.masked_fill(unread, torch.nan)


def _ring(start: Sequence[int], real: Sequence[int], chunk: int, window: int = WINDOW) -> Tensor:
    rows = torch.randn(len(start), window + chunk, WIDTH)
    for b, (first, count) in enumerate(zip(start, real, strict=True)):
        rows[b, min(first, window) : window] = torch.nan
        rows[b, window + count :] = torch.nan
    return rows


def _entries(start: Sequence[int], real: Sequence[int], capacity: int, ratio: int, width: int = WIDTH) -> Tensor:
    entries = torch.randn(len(start), capacity, width)
    for b, (first, count) in enumerate(zip(start, real, strict=True)):
        entries[b, (first + count) // ratio :] = torch.nan
    return entries


def _near(found: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    error = (found.double() - expected.double()).abs()
    assert not error.isnan().any()
    assert (error <= bound).all(), float((error - bound).max())


def _window_update_case(rows: str, start: Sequence[int], real: Sequence[int], chunk: int) -> Case:
    """Exact, in every format."""
    window, _ = _stored(_ring(start, [0] * len(start), 0), rows)
    kv, tail = torch.randn(len(start), chunk, WIDTH), [_ints(start), _ints(real)]
    expected = window_update(window, _stored(kv, rows)[0], *tail)

    def check(found: Sequence[Tensor]) -> None:
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))

    return Case("FoldkvWindowUpdate", rows, [window, kv, *tail], check)


#: Half a step of a code, relative to the value, and half the least step, relative to the largest value of a row.
_STEPS = {DENSE: (_HALF_STATE, 0.0), FP8_DS_MLA: (2.0**-4, 2.0**-9 / 448), INDEX_FP8: (2.0**-4, 2.0**-9 / 448),
          INDEX_FP4: (2.0**-2, 0.5 / 6)}  # fmt: skip


def _compress_case(operator: str, rows: str, start: Sequence[int], real: Sequence[int], chunk: int) -> Case:
    """Entries within half a step of their code, carries exact or, of an online softmax, as accurate as float32; dense
    rows hold nothing but codes where they should."""
    batch, online = len(start), "Online" in operator
    ratio, series = (8, 1) if online else (4, 2)
    values_of = FP8_DS_MLA if operator.endswith("Fp8") else INDEX_FP4 if operator.endswith("Fp4") else rows
    width = INDEX_WIDTH if values_of in (INDEX_FP8, INDEX_FP4) else WIDTH
    held, values = _stored(torch.randn(batch, 24, width), rows)
    fresh = [torch.randn(batch, chunk, width * series) for _ in range(2)]
    for b, count in enumerate(real):
        for value in fresh:
            value[b, count:] = torch.nan
    bias, norm = torch.randn(ratio, width * series), 1 + torch.rand(width)
    if online:
        carry = torch.randn(batch, 3, width)
        carry[:, 1] = 1 + torch.rand(batch, width)
        for b, first in enumerate(start):
            if first % ratio == 0:
                carry[b] = torch.nan  # no window is open
        carries = [carry]
    else:
        carries = [torch.randn(batch, ratio * series, width * series) for _ in range(2)]
        for b, first in enumerate(start):
            for carry in carries:
                carry[b, first:] = torch.nan
    tail = [_frequencies(), _ints(start), _ints(real)]
    attributes: dict[str, Any] = {"ratio": ratio, "eps": 1e-6}
    given = [*carries, *fresh, bias, norm]
    definition = compress_online if online else compress
    expected = list(definition(*_wide(values, *given), *tail, **attributes))
    if operator.endswith("Fp8"):
        attributes = {"rotary": ROTARY, **attributes}
    elif operator.endswith("Fp4"):
        # One that is neither symmetric nor what a kernel could know without reading it.
        matrix = hadamard_matrix(width)[torch.randperm(width)]
        tail.append(matrix)
        expected[0] = torch.matmul(expected[0], matrix.double())
    half_step, smallest = _STEPS[values_of]
    slack = math.sqrt(2 * width) * float(norm.max()) * (128 * _HALF_SINGLE) * (width**0.5 if len(tail) > 3 else 1)

    def check(found: Sequence[Tensor]) -> None:
        closed = torch.zeros(held.shape[:2], dtype=torch.bool)
        for b, (first, count) in enumerate(zip(start, real, strict=True)):
            closed[b, first // ratio : (first + count) // ratio] = True
        assert closed.any()
        assert torch.equal(found[0][~closed], held[~closed])
        new, exact = found[0][closed], expected[0][closed]
        read = new.float() if rows == DENSE else unpack(new, rows, width, ROTARY)
        if rows != values_of:
            assert torch.equal(unpack(pack(read, values_of, ROTARY), values_of, width, ROTARY), read)
        _near(read, exact, half_step * exact.abs() + smallest * exact.abs().amax(-1, keepdim=True) + slack)
        for one, other in zip(found[1:], expected[1:], strict=True):
            if not online:
                assert torch.equal(one.nan_to_num(7.0), other.float().nan_to_num(7.0))
                continue
            for b, (first, count) in enumerate(zip(start, real, strict=True)):
                if (first + count) % ratio:
                    _near(one[b], other[b], 64 * _HALF_SINGLE * (1 + other[b].abs().max()))

    return Case(operator, rows, [held, *given, *tail], check, attributes)


def _index_scores_case(rows: str, start: Sequence[int], real: Sequence[int], chunk: int, capacity: int = 40) -> Case:
    """Scores of entries that a query may choose, as accurate as float32; others may be anything."""
    batch = len(start)
    q, weights = torch.randn(batch, chunk, INDEX_HEADS, INDEX_WIDTH), torch.randn(batch, chunk, INDEX_HEADS)
    stored, values = _stored(_entries(start, [chunk] * batch, capacity, 4, INDEX_WIDTH), rows)
    tail = [_ints(start), torch.tensor([max(start) + chunk])]
    expected = index_scores(*_wide(q, weights, values), *tail, 4)
    reach = q.double().norm(dim=-1).max() * values.double().nan_to_num().norm(dim=-1).max()
    # Queries are split in two halves of the state's type: what is lost of them is a square of its rounding.
    bound = float(reach * weights.abs().sum(-1).max() * (_HALF_STATE**2 + 2 * INDEX_WIDTH * _HALF_SINGLE))

    def check(found: Sequence[Tensor]) -> None:
        [scores] = found
        assert scores.shape == (batch, chunk, capacity)
        for b, first in enumerate(start):
            for s in range(chunk):
                seen = slice(0, min((first + s + 1) // 4, capacity))
                _near(scores[b, s, seen], expected[b, s, seen], bound)

    return Case("FoldkvIndexScores", rows, [q, weights, stored, *tail], check, {"ratio": 4})


def _index_select_case(rows: str, start: Sequence[int], real: Sequence[int], chunk: int) -> Case:
    """The same set of entries; the order is free."""
    scores, positions = torch.randn(len(start), chunk, 40), _ints(start)
    expected = index_select(scores, positions, 4, TOPK).sort(dim=-1).values

    def check(found: Sequence[Tensor]) -> None:
        assert torch.equal(found[0].sort(dim=-1).values, expected)

    return Case("FoldkvIndexSelect", rows, [scores, positions], check, {"ratio": 4, "topk": TOPK})


def _attention_case(
    operator: str, rows: str, start: Sequence[int], real: Sequence[int], chunk: int, *,
    capacity: int = 64, window: int = WINDOW, topk: int = TOPK,
) -> Case:  # fmt: skip
    """Within the rounding of weights."""
    batch, ratio = len(start), 8 if operator == "FoldkvDenseAttention" else 4
    q, sinks = torch.randn(batch, chunk, HEADS, WIDTH), torch.randn(HEADS)
    near, near_values = _stored(_ring(start, real, chunk, window), rows)
    far, far_values = _stored(_entries(start, real, capacity, ratio), rows)
    tail = [_frequencies(), _ints(start), _ints(real)]
    chosen = torch.full((batch, chunk, topk), -1, dtype=torch.int32)
    for b, (first, count) in enumerate(zip(start, real, strict=True)):
        for s in range(count):
            picked = torch.randperm(min((first + s + 1) // ratio, capacity))[:topk]
            chosen[b, s, torch.randperm(topk)[: len(picked)]] = picked.int()
    context = torch.tensor([max(first + count for first, count in zip(start, real, strict=True))])
    # The kernels round queries to the state's type, whatever the rows; so does the reference.
    wide_q, wide_near, wide_far, wide_sinks = _wide(q.bfloat16(), near_values, far_values, sinks)
    attributes: dict[str, Any] = {}
    if operator == "FoldkvWindowAttention":
        inputs, expected = [q, near], window_attention(wide_q, wide_near, wide_sinks, *tail)
        inputs, read = [*inputs, sinks, *tail], [near_values]
    elif operator == "FoldkvSparseAttention":
        inputs, read = [q, near, far, chosen, sinks, *tail], [near_values, far_values]
        expected = sparse_attention(wide_q, wide_near, wide_far, chosen, wide_sinks, *tail)
    else:
        inputs, read, attributes = [q, near, far, sinks, *tail, context], [near_values, far_values], {"ratio": ratio}
        expected = dense_attention(wide_q, wide_near, wide_far, wide_sinks, *tail, context, ratio)
    # Weights are rounded to the state's type; logits and sums are float32, and turning mixes two channels.
    values = torch.cat([part.double().nan_to_num().flatten(0, -2) for part in read])
    reach = float(q.double().norm(dim=-1).max() * values.norm(dim=-1).max()) / math.sqrt(WIDTH)
    bound = 2 * (_HALF_STATE + (2 * WIDTH * max(reach, 1.0) + 128) * _HALF_SINGLE) * float(values.abs().max())

    def check(found: Sequence[Tensor]) -> None:
        assert found[0].shape == expected.shape
        for b, count in enumerate(real):
            _near(found[0][b, :count], expected[b, :count], bound)

    return Case(operator, rows, inputs, check, attributes)


MAKERS: dict[str, Callable[..., Case]] = {
    "FoldkvWindowUpdate": _window_update_case,
    "FoldkvCompress": functools.partial(_compress_case, "FoldkvCompress"),
    "FoldkvCompressFp8": functools.partial(_compress_case, "FoldkvCompressFp8"),
    "FoldkvCompressFp4": functools.partial(_compress_case, "FoldkvCompressFp4"),
    "FoldkvCompressOnline": functools.partial(_compress_case, "FoldkvCompressOnline"),
    "FoldkvCompressOnlineFp8": functools.partial(_compress_case, "FoldkvCompressOnlineFp8"),
    "FoldkvIndexScores": _index_scores_case,
    "FoldkvIndexSelect": _index_select_case,
    "FoldkvWindowAttention": functools.partial(_attention_case, "FoldkvWindowAttention"),
    "FoldkvSparseAttention": functools.partial(_attention_case, "FoldkvSparseAttention"),
    "FoldkvDenseAttention": functools.partial(_attention_case, "FoldkvDenseAttention"),
}
#: Every operator with every row format that it touches.
FORMS = [(operator, rows) for operator, spec in PLUGINS.items() for rows in sorted(spec.rows) or [DENSE]]


def make_case(
    operator: str, rows: str = DENSE, *, start: Sequence[int], real: Sequence[int], chunk: int, **more: Any
) -> Case:
    """A call of ``operator`` with sequences that hold ``start`` tokens and get ``real`` of a chunk's; see MAKERS."""
    torch.manual_seed(0)
    return MAKERS[operator](rows, start, real, chunk, **more)
