"""Every kernel in Triton's interpreter against the operator's definition in float64.

Unread rows hold NaN. Tolerances follow from the types: half a unit in the last place per rounding, times
the largest sum that it can be part of.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from interpreter import DTYPES, run
from torch import Tensor

from foldkv.export.contract.operators import operator_specs
from foldkv.export.contract.rows import DENSE, FP8_DS_MLA, INDEX_FP4, INDEX_FP8
from foldkv.export.model.hadamard import hadamard_matrix
from foldkv.export.operators.attention import dense_attention, sparse_attention, window_attention
from foldkv.export.operators.compress import compress, compress_fp4, compress_fp8
from foldkv.export.operators.compress_online import compress_online, compress_online_fp8
from foldkv.export.operators.index import index_scores, index_select
from foldkv.export.operators.registry import operators
from foldkv.export.operators.row_formats import pack, unpack
from foldkv.export.operators.window import window_update
from foldkv.plugins import launch
from foldkv.plugins.declarations import BODIES, PLUGINS
from foldkv.plugins.launch import SPARSE_SPAN, plan

pytestmark = pytest.mark.slow

# Relative half unit in the last place.
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8}
STATES = list(ROUNDING)
WINDOW, WIDTH, HEADS = 16, 32, 4


def wide(values: list[Tensor]) -> list[Tensor]:
    """Activations in float64; state keeps its type, which the definition widens itself, and so do angles."""
    return [value.double() if value.dtype == torch.float32 else value for value in values]


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def frequencies(half: int) -> Tensor:
    return 10000.0 ** (-torch.arange(half) / half)


def ring_and_chunk(start: list[int], real: list[int], chunk: int, width: int, kind: torch.dtype) -> Tensor:
    """Rows [B, W + S, D]: those never written hold NaN."""
    rows = torch.randn(len(start), WINDOW + chunk, width).to(kind)
    for b, (first, count) in enumerate(zip(start, real, strict=True)):
        for slot in range(WINDOW):
            if slot >= first:
                rows[b, slot] = torch.nan
        rows[b, WINDOW + count :] = torch.nan
    return rows


def real_queries(value: Tensor, real: list[int]) -> Tensor:
    """The rows of queries that are no padding, one after another."""
    return torch.cat([value[b, :count] for b, count in enumerate(real)])


def test_every_operator_has_kernels_or_a_reason() -> None:
    # Forms that read weights as stored stand for an operator with a definition.
    forms = {name: spec.form_of for name, spec in operator_specs().items() if spec.form_of}
    assert set(operators()) == (set(PLUGINS) | set(BODIES)) - set(forms) and set(forms.values()) <= set(operators())
    assert set(launch._PLANS) == set(PLUGINS) and all(BODIES.values())
    for spec in PLUGINS.values():
        assert all(spec.inputs[i].name == spec.outputs[o].name for o, i in spec.aliases.items())


# Batches of (tokens held, tokens of the chunk): empty, partial window, full, wrapped, an idle slot.
CHUNKS = [([0], [1], 1), ([5, 0], [3, 1], 3), ([40, 16, 15], [1, 1, 1], 1), ([33, 7], [0, 20], 20)]


@pytest.mark.parametrize("dtype", STATES)
@pytest.mark.parametrize(("start", "real", "chunk"), CHUNKS)
def test_window_update_is_exact(dtype: str, start: list[int], real: list[int], chunk: int) -> None:
    torch.manual_seed(0)
    window = ring_and_chunk(start, [0] * len(start), 0, WIDTH, DTYPES[dtype])
    kv = torch.randn(len(start), chunk, WIDTH)
    inputs = [window, kv, ints(*start), ints(*real)]
    found, expected = run("FoldkvWindowUpdate", inputs, dtype=dtype), window_update(*inputs)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


def attention_bound(q: Tensor, parts: list[Tensor], dtype: str) -> float:
    """Queries and weights are rounded to the state's type; a logit's error changes a weight by as much twice."""
    u = ROUNDING[dtype] + (WIDTH + SPARSE_SPAN) * ROUNDING["float32"]
    rows = torch.cat([part.double().nan_to_num().flatten(0, -2) for part in parts])
    reach = q.double().norm(dim=-1).max() * rows.norm(dim=-1).max() / math.sqrt(q.shape[-1])
    return float((4 * u * max(reach, 1.0) + 4 * u) * rows.abs().max())


def attention_inputs(start: list[int], real: list[int], chunk: int, dtype: str, heads: int, width: int) -> Any:
    torch.manual_seed(1)
    kind = DTYPES[dtype]
    q = torch.randn(len(start), chunk, heads, width)
    rows = ring_and_chunk(start, real, chunk, width, kind)
    tail = [torch.randn(heads), frequencies(width // 8), ints(*start), ints(*real)]
    return q, rows, tail


def compare(found: Tensor, expected: Tensor, real: list[int], bound: float) -> None:
    error = (real_queries(found, real).double() - real_queries(expected, real).double()).abs()
    assert not error.isnan().any()
    assert error.numel() == 0 or float(error.max()) <= bound


@pytest.mark.parametrize("dtype", STATES)
@pytest.mark.parametrize(("start", "real", "chunk"), CHUNKS)
def test_window_attention(dtype: str, start: list[int], real: list[int], chunk: int) -> None:
    q, rows, tail = attention_inputs(start, real, chunk, dtype, HEADS, WIDTH)
    [found] = run("FoldkvWindowAttention", [q, rows, *tail], dtype=dtype)
    expected = window_attention(*wide([q, rows, tail[0]]), *tail[1:])
    compare(found, expected, real, attention_bound(q, [rows], dtype))


def chosen_of(start: list[int], real: list[int], chunk: int, places: int, ratio: int) -> Tensor:
    chosen = torch.full((len(start), chunk, places), -1, dtype=torch.int32)
    for b, (first, count) in enumerate(zip(start, real, strict=True)):
        for s in range(count):
            visible = (first + s + 1) // ratio
            picked = torch.randperm(visible)[:places]
            chosen[b, s, torch.randperm(places)[: len(picked)]] = picked.int()
    return chosen


@pytest.mark.parametrize(("dtype", "places"), [*((dtype, 8) for dtype in STATES), ("bfloat16", 300)])
@pytest.mark.parametrize(("start", "real", "chunk"), [*CHUNKS, ([1999, 100], [1, 1], 1)])
def test_sparse_attention(dtype: str, start: list[int], real: list[int], chunk: int, places: int) -> None:
    q, rows, tail = attention_inputs(start, real, chunk, dtype, HEADS, WIDTH)
    entries = torch.randn(len(start), 512, WIDTH).to(DTYPES[dtype])
    for b, first in enumerate(start):
        entries[b, (first + real[b]) // 4 :] = torch.nan
    chosen = chosen_of(start, real, chunk, places, 4)
    [found] = run("FoldkvSparseAttention", [q, rows, entries, chosen, *tail], dtype=dtype)
    expected = sparse_attention(*wide([q, rows, entries, chosen, tail[0]]), *tail[1:])
    compare(found, expected, real, attention_bound(q, [rows, entries], dtype))


@pytest.mark.parametrize("dtype", STATES)
@pytest.mark.parametrize(("start", "real", "chunk"), [*CHUNKS, ([4999, 1500], [1, 1], 1)])
def test_dense_attention(dtype: str, start: list[int], real: list[int], chunk: int) -> None:
    q, rows, tail = attention_inputs(start, real, chunk, dtype, HEADS, WIDTH)
    entries = torch.randn(len(start), 640, WIDTH).to(DTYPES[dtype])
    for b, first in enumerate(start):
        entries[b, (first + real[b]) // 8 :] = torch.nan
    context = torch.tensor([max(s + r for s, r in zip(start, real, strict=True))])
    inputs = [q, rows, entries, *tail, context]
    [found] = run("FoldkvDenseAttention", inputs, dtype=dtype, ratio=8)
    expected = dense_attention(*wide([q, rows, entries, tail[0]]), *tail[1:], context, 8)
    compare(found, expected, real, attention_bound(q, [rows, entries], dtype))


@pytest.mark.parametrize("sm", [80, 90, 100, 120])
@pytest.mark.parametrize("heads", [64, 128])
def test_attention_at_the_width_of_the_released_models(sm: int, heads: int) -> None:
    start, real = [700], [1]
    q, rows, tail = attention_inputs(start, real, 1, "bfloat16", heads, 512)
    entries = torch.randn(1, 256, 512).to(torch.bfloat16)
    entries[:, 175:] = torch.nan
    chosen = chosen_of(start, real, 1, 64, 4)
    [found] = run("FoldkvSparseAttention", [q, rows, entries, chosen, *tail], dtype="bfloat16", sm=sm)
    expected = sparse_attention(*wide([q, rows, entries, chosen, tail[0]]), *tail[1:])
    compare(found, expected, real, attention_bound(q, [rows, entries], "bfloat16"))


def test_a_sequence_is_attended_alike_in_any_batch_and_any_capacity() -> None:
    start, real = [4999, 1500, 37], [1, 1, 1]
    q, rows, tail = attention_inputs(start, real, 1, "bfloat16", HEADS, WIDTH)
    entries = torch.randn(3, 640, WIDTH).to(torch.bfloat16)
    context = torch.tensor([5000])
    [together] = run("FoldkvDenseAttention", [q, rows, entries, *tail, context], dtype="bfloat16", ratio=8)
    for b in range(3):
        one = slice(b, b + 1)
        longer = torch.cat((entries[one], torch.full((1, 2000, WIDTH), torch.nan).bfloat16()), dim=1)
        inputs = [q[one], rows[one], longer, tail[0], tail[1], tail[2][one], tail[3][one], context]
        [alone] = run("FoldkvDenseAttention", inputs, dtype="bfloat16", ratio=8)
        assert torch.equal(alone[0], together[b])


def compress_inputs(
    operator: str, start: list[int], real: list[int], chunk: int, ratio: int, dtype: str, width: int = WIDTH
) -> list[Tensor]:
    """The inputs of a compressing operator up to num_tokens."""
    torch.manual_seed(2)
    batch, online = len(start), "Online" in operator
    columns = width if online else 2 * width
    entries = torch.randn(batch, 24, width).to(DTYPES[dtype])
    kv, gate = torch.randn(batch, chunk, columns), 3 * torch.randn(batch, chunk, columns)
    for b, count in enumerate(real):
        kv[b, count:] = gate[b, count:] = torch.nan
    bias, norm = torch.randn(ratio, columns), 1 + torch.rand(width)
    if online:
        carries = [
            torch.stack((3 * torch.randn(batch, width), 1 + torch.rand(batch, width), torch.randn(batch, width)), 1)
        ]
    else:
        carries = [torch.randn(batch, 2 * ratio, columns) for _ in range(2)]
    for b, first in enumerate(start):
        for carry in carries:  # rows never written, or those of no open window
            carry[b, (first % ratio > 0) * 3 if online else first :] = torch.nan
    return [entries, *carries, kv, gate, bias, norm, frequencies(width // 8), ints(*start), ints(*real)]


def compare_carries(
    operator: str, found: list[Tensor], expected: list[Tensor], start: list[int], real: list[int], ratio: int
) -> None:
    """Rows are copied; of an online softmax the rows are sums, and without an open window they are anything."""
    for one, other in zip(found, expected, strict=True):
        if "Online" not in operator:
            assert torch.equal(one.nan_to_num(7.0), other.float().nan_to_num(7.0))
            continue
        for b, (first, count) in enumerate(zip(start, real, strict=True)):
            if (first + count) % ratio:
                error = (one[b].double() - other[b].double()).abs()
                assert float(error.max()) <= 64 * ROUNDING["float32"] * (1 + float(other[b].abs().max()))


COMPRESSING = pytest.mark.parametrize(("operator", "ratio"), [("FoldkvCompress", 4), ("FoldkvCompressOnline", 16)])
DEFINITIONS = {
    "FoldkvCompress": (compress, compress_fp8), "FoldkvCompressOnline": (compress_online, compress_online_fp8)
}  # fmt: skip


@pytest.mark.parametrize("dtype", STATES)
@COMPRESSING
@pytest.mark.parametrize(
    ("start", "real", "chunk"),
    [([0], [1], 1), ([3, 7, 0], [1, 1, 1], 1), ([15, 2], [1, 0], 1), ([2, 9], [11, 3], 11), ([1, 30], [40, 37], 41),
     ([16, 32], [16, 33], 33), ([5, 20], [14, 20], 20)],
)  # fmt: skip
def test_compress(operator: str, ratio: int, dtype: str, start: list[int], real: list[int], chunk: int) -> None:
    inputs = compress_inputs(operator, start, real, chunk, ratio, dtype)
    found = run(operator, inputs, dtype=dtype, ratio=ratio, eps=1e-6)
    expected = DEFINITIONS[operator][0](*wide(inputs), ratio, 1e-6)
    # A channel of the normalized row is at most sqrt(D) times its norm weight, before rotation mixes two.
    reach = math.sqrt(2 * WIDTH) * float(inputs[-4].max())
    bound = reach * (ROUNDING[dtype] + 64 * ROUNDING["float32"])
    assert float((found[0].double() - expected[0].double()).abs().max()) <= bound
    changed = (expected[0].double() != inputs[0].double()).any(-1)
    assert torch.equal(found[0][~changed], inputs[0][~changed]), "rows that do not close keep their bits"
    compare_carries(operator, found[1:], expected[1:], start, real, ratio)


@COMPRESSING
def test_windows_past_the_capacity_are_not_written(operator: str, ratio: int) -> None:
    """Row 4 of the first sequence would be row 0 of the second, which gets no token."""
    inputs = compress_inputs(operator, [3 * ratio, 0], [2 * ratio + 1, 0], 2 * ratio + 1, ratio, "float32")
    inputs[0] = inputs[0][:, :4].contiguous()
    found = run(operator, inputs, ratio=ratio, eps=1e-6)[0]
    expected = DEFINITIONS[operator][0](*inputs, ratio, 1e-6)[0]
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[1], inputs[0][1]) and not torch.equal(found[0, 3], inputs[0][0, 3])


def test_a_bias_of_another_ratio_is_refused() -> None:
    sizes = {"B": 1, "S": 1, "E": 8, "T": 8, "D": 32, "P": 8}
    with pytest.raises(ValueError, match="a bias of 8 rows does not fit ratio 4"):
        plan("FoldkvCompressOnline", sizes, {"ratio": 4, "eps": 1e-6}, sm=80, dtype="bfloat16")


@pytest.mark.parametrize("start", [5, 16])
def test_a_sequence_without_tokens_keeps_every_bit_of_its_online_carry(start: int) -> None:
    inputs = compress_inputs("FoldkvCompressOnline", [start, 3], [0, 20], 20, 16, "float32")
    found = run("FoldkvCompressOnline", inputs, ratio=16, eps=1e-6)
    defined = compress_online(*inputs, 16, 1e-6)
    for entries, carry in (found, defined):
        assert torch.equal(carry[0].view(torch.int32), inputs[1][0].view(torch.int32))
        assert torch.equal(entries[0], inputs[0][0])
        assert not torch.equal(carry[1], inputs[1][1])


@pytest.mark.parametrize("dtype", STATES)
@pytest.mark.parametrize(("heads", "width"), [(8, 32), (64, 128)])
@pytest.mark.parametrize(("start", "chunk"), [([0, 3], 2), ([700, 41], 1)])
def test_index_scores(dtype: str, heads: int, width: int, start: list[int], chunk: int) -> None:
    torch.manual_seed(3)
    batch = len(start)
    q, weights = torch.randn(batch, chunk, heads, width), torch.randn(batch, chunk, heads)
    entries = torch.randn(batch, 200, width).to(DTYPES[dtype])
    for b, first in enumerate(start):
        entries[b, (first + chunk) // 4 :] = torch.nan
    tail = [ints(*start), torch.tensor([max(start) + chunk])]
    [found] = run("FoldkvIndexScores", [q, weights, entries, *tail], dtype=dtype, ratio=4)
    check_scores(found, q, weights, entries, tail, dtype)


def check_scores(found: Tensor, q: Tensor, weights: Tensor, entries: Tensor, tail: list[Tensor], dtype: str) -> None:
    """A query is two numbers of the state's type; what the second leaves out is its rounding."""
    expected = index_scores(*wide([q, weights, entries]), *tail, 4)
    unit = ROUNDING["float32"] * sum(q.shape[2:]) + (0 if dtype == "float32" else ROUNDING[dtype] ** 2)
    reach = torch.einsum("bshd,bed->bshe", q.abs().double(), entries.double().nan_to_num().abs())
    bound = (reach * weights.abs()[..., None]).sum(2) * 2 * unit
    for b, first in enumerate(tail[0].tolist()):
        for s in range(q.shape[1]):
            seen = slice(0, min((first + s + 1) // 4, entries.shape[1]))
            assert ((found[b, s, seen].double() - expected[b, s, seen]).abs() <= bound[b, s, seen]).all()


def sets(chosen: Tensor) -> list[list[int]]:
    return [sorted(row) for row in chosen.flatten(0, -2).tolist()]


@pytest.mark.parametrize("topk", [16, 512, 1024])
@pytest.mark.parametrize("levels", [3, 100, 1 << 20])
def test_index_select_takes_the_best_and_of_equals_the_first(topk: int, levels: int) -> None:
    torch.manual_seed(4)
    scores = (torch.randint(-levels, levels, (2, 3, 5000)).float() / levels) * 37.0
    scores[0, 0, :100] = -0.0
    positions = ints(19_990, 2_000)
    [found] = run("FoldkvIndexSelect", [scores, positions], ratio=4, topk=topk)
    assert sets(found) == sets(index_select(scores, positions, 4, topk))


def test_a_parted_selection_is_the_same_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many parts there are, and where fewer entries are visible than places; ties lie on both sides of a part."""
    torch.manual_seed(5)
    scores = torch.randint(-40, 40, (3, 1, 9000)).float()
    positions = ints(35_990, 20_001, 100)
    attributes = {"ratio": 4, "topk": 512}
    with monkeypatch.context() as patch:
        patch.setattr(launch, "SELECT_SPAN", 9000)
        [whole] = run("FoldkvIndexSelect", [scores, positions], **attributes)
    for span, parts in ((4096, 64), (2048, 2)):
        monkeypatch.setattr(launch, "SELECT_SPAN", span)
        monkeypatch.setattr(launch, "SELECT_PARTS", parts)
        [parted] = run("FoldkvIndexSelect", [scores, positions], **attributes)
        assert torch.equal(parted, whole)


@pytest.mark.parametrize("held", [0, 3, 63, 64, 66])
def test_index_select_with_fewer_entries_than_places(held: int) -> None:
    scores = torch.randn(1, 2, 40)
    positions = ints(held)
    [found] = run("FoldkvIndexSelect", [scores, positions], ratio=4, topk=16)
    assert sets(found) == sets(index_select(scores, positions, 4, 16))


def test_index_select_over_a_million_tokens() -> None:
    torch.manual_seed(5)
    scores = torch.randn(1, 1, 262_144).round(decimals=2)
    [found] = run("FoldkvIndexSelect", [scores, ints(1_048_575)], ratio=4, topk=1024)
    assert sets(found) == sets(index_select(scores, ints(1_048_575), 4, 1024))


def packed(rows: Tensor, format_: str, rope_dim: int = 0) -> tuple[Tensor, Tensor]:
    """Bytes of rows [..., D], and the float32 values they stand for. Rows of NaN become bytes that no format can read

    as anything but NaN or infinity, and values of NaN.
    """
    unwritten = rows.isnan().any(-1, keepdim=True)
    data = pack(rows.nan_to_num(), format_, rope_dim)
    values = unpack(data, format_, rows.shape[-1], rope_dim)
    return data.masked_fill(unwritten, -1), values.masked_fill(unwritten, torch.nan)


def uneven(*shape: int) -> Tensor:
    """Values of every magnitude: zeros of both signs, some below the floor of a scale, and some halfway between codes."""
    values = torch.randn(*shape) * 10.0 ** torch.randint(-7, 6, shape)
    values = torch.where(torch.rand(shape) < 0.3, (values * 16).round() / 16, values)
    return torch.where(torch.rand(shape) < 0.1, torch.randn(shape).sign() * 0.0, values)


@pytest.mark.parametrize(("start", "real", "chunk"), CHUNKS)
@pytest.mark.parametrize(("width", "rope_dim"), [(32, 8), (48, 16), (160, 32), (512, 64)])
def test_window_update_packs_bit_for_bit(
    width: int, rope_dim: int, start: list[int], real: list[int], chunk: int
) -> None:
    torch.manual_seed(0)
    window, _ = packed(ring_and_chunk(start, [0] * len(start), 0, width, torch.float32), FP8_DS_MLA, rope_dim)
    kv = uneven(len(start), chunk, width)
    tail = [ints(*start), ints(*real)]
    found = run(
        "FoldkvWindowUpdate", [window, kv, *tail], dtype="bfloat16", row_format=FP8_DS_MLA, rope_dim=rope_dim, D=width
    )
    expected = window_update(window, pack(kv, FP8_DS_MLA, rope_dim), *tail)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def closed_rows(entries: Tensor, start: list[int], real: list[int], ratio: int) -> Tensor:
    """Which entries [B, E] close in this chunk."""
    closed = torch.zeros(entries.shape[:2], dtype=torch.bool)
    for b, (first, count) in enumerate(zip(start, real, strict=True)):
        closed[b, first // ratio : (first + count) // ratio] = True
    return closed


#: Half a step of a code, and half the smallest code relative to the largest.
STEPS = {FP8_DS_MLA: (2.0**-4, 2.0**-9 / 448), INDEX_FP8: (2.0**-4, 2.0**-9 / 448), INDEX_FP4: (2.0**-2, 0.5 / 6)}


@pytest.mark.parametrize(
    ("operator", "ratio", "format_"),
    [*(("FoldkvCompress", 4, format_) for format_ in STEPS), ("FoldkvCompressOnline", 16, FP8_DS_MLA)],
)
@pytest.mark.parametrize(("start", "real", "chunk"), [([3, 7, 0], [1, 1, 1], 1), ([1, 30], [40, 37], 41)])
def test_compress_packs_the_row_that_it_computes(
    operator: str, ratio: int, format_: str, start: list[int], real: list[int], chunk: int
) -> None:
    inputs = compress_inputs(operator, start, real, chunk, ratio, "float32")
    rope_dim = 2 * len(inputs[-3])
    held, values = packed(inputs[0], format_, rope_dim)
    attributes = {"ratio": ratio, "eps": 1e-6}
    found = run(
        operator, [held, *inputs[1:]], dtype="bfloat16", row_format=format_, rope_dim=rope_dim, D=WIDTH, **attributes
    )
    dense = run(operator, inputs, dtype="float32", **attributes)
    closed = closed_rows(held, start, real, ratio)
    assert torch.equal(found[0], torch.where(closed[..., None], pack(dense[0], format_, rope_dim), held))
    for one, other in zip(found[1:], dense[1:], strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
    # And against the definition: half a step of a code, or of the smallest code of a scale below 2 * largest / 448.
    expected = DEFINITIONS[operator][0](values.double(), *wide(inputs[1:]), **attributes)[0][closed]
    slack = math.sqrt(2 * WIDTH) * float(inputs[-4].max()) * 64 * ROUNDING["float32"]
    half_step, smallest = STEPS[format_]
    bound = half_step * expected.abs() + smallest * expected.abs().amax(-1, keepdim=True) + 2 * slack
    assert ((unpack(found[0], format_, WIDTH, rope_dim)[closed].double() - expected).abs() <= bound).all()


ROUNDING_CASES = [
    *(("FoldkvCompress", format_, *rest) for format_ in (FP8_DS_MLA, INDEX_FP4)
      for rest in ((32, 4, [3, 7, 0], [1, 1, 1], 1), (128, 4, [6], [9], 9))),
    ("FoldkvCompressOnline", FP8_DS_MLA, 32, 16, [15], [1], 1),
    ("FoldkvCompressOnline", FP8_DS_MLA, 128, 16, [6, 30], [29, 2], 29),
]  # fmt: skip


@pytest.mark.parametrize("packs", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(("operator", "format_", "width", "ratio", "start", "real", "chunk"), ROUNDING_CASES)
def test_compress_of_served_graphs_rounds_what_compress_computes(
    packs: bool, operator: str, format_: str, width: int, ratio: int, start: list[int], real: list[int], chunk: int
) -> None:
    """Bit for bit, and nearly everywhere the definition in float32, whose sums may fall on the other side of a border."""
    inputs = compress_inputs(operator, start, real, chunk, ratio, "float32", width)
    rope_dim, attributes = 2 * len(inputs[-3]), {"ratio": ratio, "eps": 1e-6}
    kept: dict[str, Any] = {"rope_dim": rope_dim} | ({"row_format": format_, "dtype": "bfloat16"} if packs else {})
    exact, *carries = run(operator, inputs, **attributes)
    held = packed(inputs[0], format_, rope_dim)[0] if packs else inputs[0]
    closed = closed_rows(held, start, real, ratio)
    assert closed.any()
    if format_ == FP8_DS_MLA:
        found = run(f"{operator}Fp8", [held, *inputs[1:]], **kept, **attributes)
        defined = DEFINITIONS[operator][1](*inputs, rope_dim, *attributes.values())[0]
    else:
        # Of a permutation every product is exact; the Hadamard matrix is the definition's.
        order = torch.randperm(width)
        moved = [torch.eye(width)[order], hadamard_matrix(width)]
        found, other = (run(f"{operator}Fp4", [held, *inputs[1:], m], **kept, **attributes) for m in moved)
        exact = torch.where(closed[..., None], exact @ moved[0], exact)
        defined = compress_fp4(*inputs, moved[1], *attributes.values())[0]
    written = pack(exact, format_, rope_dim)
    if not packs:
        written = unpack(written, format_, width, rope_dim)
    assert torch.equal(found[0], torch.where(closed[..., None], written, held))
    for one, same in zip(found[1:], carries, strict=True):
        assert torch.equal(one.nan_to_num(7.0), same.nan_to_num(7.0))
    last = (found if format_ == FP8_DS_MLA else other)[0][closed]
    read = unpack(last, format_, width, rope_dim) if packs else last
    assert float((read == defined[closed]).double().mean()) > 0.99
    assert float((read - defined[closed]).abs().max()) <= float(defined[closed].abs().max()) * 0.35


@pytest.mark.parametrize(
    ("operator", "width", "rows", "rope_dim", "reason"),
    [
        ("FoldkvCompressFp8", 48, DENSE, 8, "keeps 8 channels in bfloat16, but rows have 16 rotated"),
        ("FoldkvCompressFp4", 96, DENSE, None, "96 wide; a Hadamard matrix needs a power of two"),
        ("FoldkvCompressFp4", 96, INDEX_FP4, None, "96 wide; a Hadamard matrix needs a power of two"),
        ("FoldkvCompressFp4", 16, DENSE, None, "cannot be stored as index_fp4"),
        ("FoldkvCompressFp4", 32, INDEX_FP8, None, "rows in index_fp8; its kernels read dense, index_fp4"),
        ("FoldkvCompressOnline", 32, INDEX_FP4, None, "rows in index_fp4; its kernels read dense, fp8_ds_mla"),
        ("FoldkvCompress", 32, DENSE, None, "carries of 4 rows by 32 do not fit"),
    ],
)
def test_sizes_that_no_kernel_takes_are_refused(
    operator: str, width: int, rows: str, rope_dim: int | None, reason: str
) -> None:
    sizes = {"B": 1, "S": 1, "E": 8, "R": 4, "C": width, "T": 4, "D": width, "P": 8}
    attributes: dict[str, Any] = {"ratio": 4, "eps": 1e-6} | ({} if rope_dim is None else {"rope_dim": rope_dim})
    with pytest.raises(ValueError, match=reason):
        plan(operator, sizes, attributes, sm=80, dtype="bfloat16", row_format=rows, rope_dim=16)


PACKED_CASES = [*CHUNKS, ([1999, 100], [1, 1], 1)]


def packed_attention(
    operator: str, start: list[int], real: list[int], chunk: int, heads: int, width: int, **options: Any
) -> tuple[Tensor, Tensor, float, list[Tensor]]:
    """What an attention of packed rows gives, what the definition gives of their values, the bound, and the inputs."""
    q, dense, tail = attention_inputs(start, real, chunk, "float32", heads, width)
    rope_dim, ratio = 2 * len(tail[1]), 4 if operator == "FoldkvSparseAttention" else 8
    rows, values = packed(dense, FP8_DS_MLA, rope_dim)
    entries = torch.randn(len(start), 512, width)
    for b, first in enumerate(start):
        entries[b, (first + real[b]) // ratio :] = torch.nan
    written, read = packed(entries, FP8_DS_MLA, rope_dim)
    chosen = chosen_of(start, real, chunk, 40, ratio)
    context = torch.tensor([max(s + r for s, r in zip(start, real, strict=True))])
    kept = {"dtype": "bfloat16", "row_format": FP8_DS_MLA, "rope_dim": rope_dim} | options
    first, exact = [q, rows], wide([q, values])
    ends = [*wide(tail[:1]), *tail[1:]]
    if operator == "FoldkvWindowAttention":
        inputs, expected = [*first, *tail], window_attention(*exact, *ends)
        read = values
    elif operator == "FoldkvSparseAttention":
        inputs, expected = [*first, written, chosen, *tail], sparse_attention(*exact, *wide([read]), chosen, *ends)
    else:
        inputs, kept["ratio"] = [*first, written, *tail, context], ratio
        expected = dense_attention(*exact, *wide([read]), *ends, context, ratio)
    [found] = run(operator, inputs, **kept)
    return found, expected, attention_bound(q, [values, read], "bfloat16"), inputs


ATTENTIONS = ["FoldkvWindowAttention", "FoldkvSparseAttention", "FoldkvDenseAttention"]


@pytest.mark.parametrize("operator", ATTENTIONS)
@pytest.mark.parametrize(("start", "real", "chunk"), PACKED_CASES)
def test_attention_of_packed_rows(operator: str, start: list[int], real: list[int], chunk: int) -> None:
    found, expected, bound, _ = packed_attention(operator, start, real, chunk, HEADS, WIDTH)
    compare(found, expected, real, bound)


@pytest.mark.parametrize("sm", [80, 90, 100])
@pytest.mark.parametrize("operator", ATTENTIONS[1:])
def test_attention_of_packed_rows_at_the_width_of_the_released_models(operator: str, sm: int) -> None:
    found, expected, bound, _ = packed_attention(operator, [700], [1], 1, 64, 512, sm=sm)
    compare(found, expected, [1], bound)


@pytest.mark.parametrize("operator", ATTENTIONS)
def test_attention_of_packed_rows_does_not_depend_on_the_places_in_a_batch(operator: str) -> None:
    order = [2, 0, 1]
    found, _, _, inputs = packed_attention(operator, [1999, 5, 0], [1, 1, 1], 1, HEADS, WIDTH)
    batched = [value[order] if value.shape[0] == 3 else value for value in inputs]
    options = {"ratio": 8} if operator == "FoldkvDenseAttention" else {}
    [moved] = run(operator, batched, dtype="bfloat16", row_format=FP8_DS_MLA, rope_dim=2 * (WIDTH // 8), **options)
    assert torch.equal(moved, found[order])


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("format_", [INDEX_FP8, INDEX_FP4])
@pytest.mark.parametrize(("heads", "width"), [(8, 32), (64, 128)])
@pytest.mark.parametrize(("start", "chunk"), [([0, 3], 2), ([1300, 41], 1)])
def test_index_scores_of_packed_rows(
    format_: str, heads: int, width: int, start: list[int], chunk: int, sm: int
) -> None:
    torch.manual_seed(3)
    q, weights = torch.randn(len(start), chunk, heads, width), torch.randn(len(start), chunk, heads)
    dense = torch.randn(len(start), 400, width) * 10.0 ** torch.randint(-3, 3, (len(start), 400, 1))
    for b, first in enumerate(start):
        dense[b, (first + chunk) // 4 :] = torch.nan
    rows, values = packed(dense, format_)
    tail = [ints(*start), torch.tensor([max(start) + chunk])]
    [found] = run("FoldkvIndexScores", [q, weights, rows, *tail], dtype="bfloat16", row_format=format_, sm=sm, ratio=4)
    check_scores(found, q, weights, values, tail, "bfloat16")


def test_rows_of_another_size_format_or_version_are_refused() -> None:
    sizes = {"B": 1, "S": 1, "H": 4, "D": 512, "W": 16, "P": 32, "ROW": 584}
    given: dict[str, Any] = {"sm": 80, "dtype": "bfloat16", "row_format": FP8_DS_MLA, "rope_dim": 64}
    assert plan("FoldkvWindowAttention", sizes, {}, **given).launches
    with pytest.raises(ValueError, match="rows of 592 bytes; 512 channels in fp8_ds_mla take 584"):
        plan("FoldkvWindowAttention", sizes | {"ROW": 592}, {}, **given)
    with pytest.raises(ValueError, match="rows have 32 rotated channels but frequencies for 64"):
        plan("FoldkvWindowAttention", sizes, {}, **given | {"rope_dim": 32})
    with pytest.raises(ValueError, match="rows in nvfp4; its kernels read dense, fp8_ds_mla"):
        plan("FoldkvWindowAttention", sizes, {}, **given | {"row_format": "nvfp4"})
    with pytest.raises(ValueError, match="layout version 2; its kernels read 1"):
        plan("FoldkvWindowAttention", sizes, {}, **given | {"layout_version": 2})
    with pytest.raises(ValueError, match="cannot be stored as index_fp4"):
        plan(
            "FoldkvIndexScores",
            {"H": 4, "D": 48, "B": 1, "S": 1, "E": 9},
            {"ratio": 4},
            **given | {"row_format": INDEX_FP4},
        )


def test_sizes_that_the_kernels_cannot_take_are_refused() -> None:
    sizes = {"B": 1, "S": 1, "H": 4, "D": 40, "W": 16, "P": 4}
    with pytest.raises(ValueError, match="40 wide"):
        plan("FoldkvWindowAttention", sizes, {}, sm=80, dtype="bfloat16")
    with pytest.raises(ValueError, match="power of two"):
        plan("FoldkvWindowAttention", sizes | {"D": 48, "P": 3}, {}, sm=80, dtype="bfloat16")
    with pytest.raises(ValueError, match="expected"):
        PLUGINS["FoldkvIndexSelect"].dimensions([(2, 1, 40), (3,)])
