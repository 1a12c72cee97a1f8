"""The routed experts' kernels in Triton's interpreter, in every form, against the definition in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from cases import Draw
from expert_cases import ExpertCall, ExpertSizes, expert_call
from interpreter import launch, run
from torch import Tensor

from foldkv.export.checkpoint.formats import FP4, FP8, Format
from foldkv.export.checkpoint.values import dequantised
from foldkv.export.contract.operators import PACKED_EXPERTS, ROUTED_EXPERTS
from foldkv.export.contract.weights import BFLOAT16, E2M1, E4M3, EXPONENT, FLOAT32
from foldkv.plugins import launch_experts
from foldkv.plugins.declarations import PLUGINS
from foldkv.plugins.kernels import experts as kernels
from foldkv.plugins.kernels.weights import read_weights
from foldkv.plugins.launch import largest_workspace, plan
from foldkv.plugins.launch_experts import FEW_PAIRS
from foldkv.plugins.model import EXPERT_FORMS

pytestmark = pytest.mark.slow

SMALL = ExpertSizes(hidden=64, inner=32, count=9, chosen=2)
FP4_FORM, FP8_FORM = (PACKED_EXPERTS[weight, EXPONENT] for weight in (E2M1, E4M3))


def computed(operator: str, call: ExpertCall) -> Tensor:
    [y] = run(operator, call.inputs, dtype="bfloat16", **call.attributes)
    return y


def check(operator: str, call: ExpertCall) -> Tensor:
    """The result, within the bound of every value."""
    found, (expected, bound) = computed(operator, call), call.expected()
    error = (found.double() - expected).abs()
    assert not error.isnan().any() and float((error - bound).max()) <= 0
    assert float(error.norm()) <= 2.0**-6 * float(expected.norm()) > 0
    return found


@pytest.mark.parametrize(("tokens", "chosen"), [(1, 1), (2, 3), (5, 6), (16, 4), (40, 5)])
@pytest.mark.parametrize("operator", EXPERT_FORMS)
def test_tokens_and_choices(operator: str, tokens: int, chosen: int) -> None:
    call = expert_call(operator, Draw(f"{operator} {tokens} {chosen}"), replace(SMALL, chosen=chosen), tokens)
    assert (call.inputs[1] != SMALL.count - 1).all(), "the last expert, which is NaN, is not chosen"
    check(operator, call)


#: Rows and columns that fill no tile; blocks narrower than a step, as wide as one, and several in one. For few and many tokens.
EDGES = {
    E2M1: [(160, 96, 2), (24, 16, 33), (544, 16, 2)], E4M3: [(384, 128, 2), (48, 40, 33), (16, 256, 2)],
    BFLOAT16: [(80, 48, 2), (24, 136, 33), (8, 8, 2)],
}  # fmt: skip
WEIGHTS = {ROUTED_EXPERTS: BFLOAT16} | {name: weight for (weight, _), name in PACKED_EXPERTS.items()}


@pytest.mark.parametrize(
    ("operator", "hidden", "inner", "tokens"), [(name, *size) for name in EXPERT_FORMS for size in EDGES[WEIGHTS[name]]]
)
def test_sizes_at_the_edge_of_tiles_and_blocks(operator: str, hidden: int, inner: int, tokens: int) -> None:
    of = ExpertSizes(hidden, inner, count=4, chosen=2)
    check(operator, expert_call(operator, Draw(f"{operator} {hidden} {inner}"), of, tokens, gap=16))


@pytest.mark.parametrize("gap", [1, 5])
@pytest.mark.parametrize("operator", list(PACKED_EXPERTS.values()))
def test_matrices_may_begin_anywhere_in_a_row(operator: str, gap: int) -> None:
    check(operator, expert_call(operator, Draw("gap"), SMALL, 2, gap=gap))


@pytest.mark.parametrize("tokens", [2, 40])
def test_the_limit_bites(tokens: int) -> None:
    calls = [expert_call(FP4_FORM, Draw("limit"), SMALL, tokens, limit=limit) for limit in (0.25, 1e30)]
    one, other = (check(FP4_FORM, call) for call in calls)
    assert float((one - other).abs().max()) > float(calls[0].expected()[1].max())


def test_nan_of_a_token_stays_with_it_and_is_not_clamped_away() -> None:
    call = expert_call(ROUTED_EXPERTS, Draw("nan"), SMALL, 5)
    call.inputs[0][3] = torch.nan
    found = computed(ROUTED_EXPERTS, call)
    assert found[3].isnan().all() and not found[[0, 1, 2, 4]].isnan().any()


@pytest.mark.parametrize("operator", [ROUTED_EXPERTS, FP4_FORM, FP8_FORM])
def test_few_and_many_pairs_agree(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same call by both ways differs less than the rounding that both have in common."""
    call = expert_call(operator, Draw("ways"), replace(SMALL, chosen=6), 10)
    few = computed(operator, call)
    monkeypatch.setattr(launch_experts, "FEW_PAIRS", 1)
    many = computed(operator, call)
    expected, bound = call.expected()
    assert ((few - many).abs() <= bound).all()
    assert float((few - many).norm()) < 0.25 * float((few.double() - expected).norm())


@pytest.mark.parametrize(("operator", "tokens"), [(ROUTED_EXPERTS, 7), (FP8_FORM, 7), (FP4_FORM, 40)])
def test_a_token_does_not_depend_on_its_neighbours_and_runs_agree(operator: str, tokens: int) -> None:
    one, other = (expert_call(operator, Draw(f"neighbours {seed}"), SMALL, tokens) for seed in (0, 1))
    for mine, theirs in zip(one.inputs[3:], other.inputs[3:], strict=True):
        theirs.copy_(mine)
    here, there = 3, tokens - 2  # at another place, among others that choose other experts
    for mine, theirs in zip(one.inputs[:3], other.inputs[:3], strict=True):
        theirs[there] = mine[here]
    found = computed(operator, one)
    assert torch.equal(found, computed(operator, one))
    assert torch.equal(found[here], computed(operator, other)[there])


class Counted:
    """A function of a kernel that counts its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        return self.function(*arguments)


@pytest.mark.parametrize(("tokens", "tiles"), [(8, 1), (16, 1), (24, 2), (32, 2)])
def test_tokens_that_share_an_expert_read_it_once(tokens: int, tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few pairs, sixteen in a tile: 3 matrices of each of the 2 experts, and no more."""
    counted = Counted(read_weights)
    monkeypatch.setattr(kernels, "read_weights", counted)
    chosen = torch.tensor([[5, 2]] * tokens)
    check(FP8_FORM, expert_call(FP8_FORM, Draw("shared"), SMALL, tokens, chosen=chosen))
    assert counted.calls == 2 * tiles * (1 + 1 + 2), "down has two blocks of rows"


def test_experts_beyond_two_gigabytes_are_found(tmp_path: Path) -> None:
    """Rows of a megabyte in a file with holes, of which the last are used."""
    call = expert_call(FP4_FORM, Draw("far"), replace(SMALL, count=4), 2, gap=1 << 20)
    codes, slots = call.inputs[3], call.inputs[5]
    rows = (1 << 31) // codes.shape[1] + 8
    far = np.memmap(tmp_path / "codes", np.int8, "w+", shape=(rows, codes.shape[1]))
    far[-len(codes) :] = codes.numpy()
    scales = torch.zeros(rows, call.inputs[4].shape[1], dtype=torch.int8)
    scales[-len(codes) :] = call.inputs[4]
    inputs = [*call.inputs[:3], torch.from_numpy(far), scales, slots + rows - len(codes)]
    plugin = PLUGINS[FP4_FORM]
    sizes = plugin.dimensions([tuple(value.shape) for value in inputs])
    y = torch.full((2, SMALL.hidden), torch.nan)
    launch(plan(FP4_FORM, sizes, call.attributes, sm=80, dtype="bfloat16"), inputs, [y])
    assert torch.equal(y, computed(FP4_FORM, call))


def test_plain_experts_beyond_two_to_the_31_elements_are_found(tmp_path: Path) -> None:
    call = expert_call(ROUTED_EXPERTS, Draw("far"), replace(SMALL, count=4), 2)
    count = (1 << 31) // (2 * SMALL.inner * SMALL.hidden) + 8
    inputs = [call.inputs[0], call.inputs[1] + count - 4, call.inputs[2]]
    for i, stack in enumerate(call.inputs[3:]):
        far = np.memmap(tmp_path / str(i), np.int16, "w+", shape=(count, *stack.shape[1:]))
        far[-4:] = stack.view(torch.int16).numpy()
        inputs.append(torch.from_numpy(far).view(torch.bfloat16))
    sizes = PLUGINS[ROUTED_EXPERTS].dimensions([tuple(value.shape) for value in inputs])
    y = torch.full((2, SMALL.hidden), torch.nan)
    launch(plan(ROUTED_EXPERTS, sizes, call.attributes, sm=80, dtype="bfloat16"), inputs, [y])
    assert torch.equal(y, computed(ROUTED_EXPERTS, call))


@triton.jit
def decode(
    codes, scales, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GRID_ROWS: tl.constexpr, GRID_COLUMNS: tl.constexpr,
    WEIGHT: tl.constexpr, SCALE: tl.constexpr, WITHIN: tl.constexpr,
):  # fmt: skip
    """A whole matrix, decoded at once."""
    row, k = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    value, factor = read_weights(
        codes, scales, row, 0, COLUMNS, ROWS, COLUMNS, GRID_ROWS, GRID_COLUMNS, WEIGHT, SCALE, COLUMNS, WITHIN
    )
    tl.store(out + row[:, None] * COLUMNS + k[None, :], value.to(tl.float32) * factor[:, None])


@pytest.mark.parametrize("weight", [E2M1, E4M3])
@pytest.mark.parametrize("scale", [EXPONENT, FLOAT32])
def test_every_code_is_decoded_exactly(weight: str, scale: str) -> None:
    columns = 32 if weight == E2M1 else 16
    codes = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    codes = codes.masked_fill(codes & 0x7F == 0x7F, 0) if weight == E4M3 else codes  # no NaN
    kind = Format(FP4, (1, 32)) if weight == E2M1 else Format(FP8, (1, 16))
    for first in (1, 100, 225):  # scales up to 2^113
        exponents = (first + torch.arange(16)).to(torch.uint8)[:, None]
        scales = exponents if scale == EXPONENT else torch.linspace(0.1, 3, 16)[:, None]
        out = torch.full((16, columns), torch.nan)
        stored = codes if weight == E2M1 else codes.view(torch.float8_e4m3fn)
        given = scales.view(torch.int8) if scale == EXPONENT else scales
        decode[(1,)](codes.view(torch.int8), given, out, 16, columns, 16, 1, weight, scale, True)
        expected = dequantised(stored, scales, kind)
        assert torch.equal(out.nan_to_num(), expected.nan_to_num()), first


def test_scales_that_several_blocks_of_a_step_have_are_their_own() -> None:
    codes = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (16, 64), dtype=np.uint8))
    scales = torch.from_numpy(np.random.default_rng(1).integers(100, 150, (16, 4), dtype=np.uint8))
    out = torch.full((16, 128), torch.nan)
    decode[(1,)](codes.view(torch.int8), scales.view(torch.int8), out, 16, 128, 16, 4, E2M1, EXPONENT, False)
    assert torch.equal(out, dequantised(codes, scales, Format(FP4, (1, 32))))


def test_what_kernels_cannot_read_is_refused_with_its_reason() -> None:
    call = expert_call(FP8_FORM, Draw("refused"), SMALL, 2)
    sizes = PLUGINS[FP8_FORM].dimensions([tuple(value.shape) for value in call.inputs])
    for changes, reason in (
        ({"grids": (3, 1, 1, 1, 3, 1)}, r"3 x 1 scales do not divide w1 of 32 x 64 into equal blocks"),
        ({"codes_at": (0, 2048, 5000)}, r"the codes of w3 end at element 7048 of a row of 6144"),
        ({"shapes": (32, 64, 64, 32, 32, 32)}, r"w1, w2 and w3 are \(32, 64\), \(64, 32\) and \(32, 32\)"),
        ({"grids": (1, 1, 1, 1, 1, 2), "scales_at": (0, 1, 0)}, r"w1 has \(1, 1\) scales, w3 \(1, 2\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"FoldkvRoutedExpertsFp8: .*{reason}.*--plugins off"):
            plan(FP8_FORM, sizes, call.attributes | changes, sm=80, dtype="bfloat16")
    odd = {"shapes": (32, 63, 63, 32, 32, 63), "grids": (32, 1, 63, 1, 32, 1)}
    with pytest.raises(ValueError, match="w1 has blocks of 63 columns; expected whole elements of e2m1"):
        plan(FP4_FORM, sizes | {"C": 63, "SCALES": 300}, call.attributes | odd, sm=80, dtype="bfloat16")


def test_grids_and_the_workspace_follow_from_sizes_alone() -> None:
    sizes = {"X": 256, "K": 6, "C": 4096, "CODES": 1 << 24, "SCALES": 1 << 20}
    attributes = {
        "limit": 10.0, "codes_at": (0, 1 << 22, 1 << 23), "scales_at": (0, 1 << 18, 1 << 19),
        "shapes": (2048, 4096, 4096, 2048, 2048, 4096), "grids": (2048, 128, 4096, 64, 2048, 128),
    }  # fmt: skip
    for tokens, launches in ((1, 3), (FEW_PAIRS // 6, 3), (FEW_PAIRS // 6 + 1, 4), (256, 4)):
        steps = plan(FP4_FORM, sizes | {"M": tokens}, attributes, sm=80, dtype="bfloat16")
        pairs = 6 * tokens
        assert len(steps.launches) == launches
        most = pairs if launches == 3 else min(256, pairs) + (pairs - min(256, pairs)) // 32
        assert steps.launches[-2].grid[0] == most
        # Rows in float32, hidden values in bfloat16, and of many pairs their order and the experts' counts.
        exact = pairs * (4 * 4096 + 2 * 2048) + (launches == 4) * 4 * (pairs + 256)
        assert exact <= steps.workspace < exact + 4 * 256
        assert (
            largest_workspace(FP4_FORM, sizes | {"M": tokens}, attributes, sm=80, dtype="bfloat16") == steps.workspace
        )
