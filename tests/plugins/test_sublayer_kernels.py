"""Kernels of hyper-connections and routing in Triton's interpreter against their definitions in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreter import run
from torch import Tensor

from foldkv.export.contract.weights import BFLOAT16, E4M3, FLOAT32, PLAIN_FORMATS
from foldkv.export.operators.hyper_connections import hc_post, hc_pre
from foldkv.export.operators.route import route, route_hashed
from foldkv.plugins.compile import compile_kernels
from foldkv.plugins.launch import kernels, plan

pytestmark = pytest.mark.slow

UNIT = 2.0**-24  # relative half unit in the last place of float32
MIXING: dict[str, Any] = {"norm_eps": 1e-6, "iterations": 20, "eps": 1e-6}
TOKENS = [1, 7, 33]  # a block of tokens has 16


def mixing_inputs(count: int, width: int, tokens: int, batch: int = 1) -> list[Tensor]:
    """streams, fn, base and scale of ``count`` streams of ``width`` channels, with numbers of about 1."""
    torch.manual_seed(count * width + tokens)
    rows, channels = (2 + count) * count, count * width
    streams = torch.randn(batch, tokens, count, width) * torch.rand(batch, tokens, count, 1) * 5
    fn = torch.randn(rows, channels) * channels**-0.5
    return [streams, fn, torch.randn(rows), 0.5 + torch.rand(3)]


def near(found: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    assert found.shape == expected.shape
    assert ((found.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("count", "width"), [(1, 96), (2, 100), (4, 128), (4, 330)])
def test_what_happens_before_a_sublayer(count: int, width: int, tokens: int) -> None:
    inputs = mixing_inputs(count, width, tokens)
    found = run("FoldkvHcPre", inputs, **MIXING)
    expected = hc_pre(*(value.double() for value in inputs), *MIXING.values())
    # A number is a sum of products whose errors are independent; a sigmoid, a softmax and a balance do not enlarge them.
    slack = 8 * (count * width) ** 0.5 * UNIT + 64 * UNIT
    weighted = inputs[0].double().abs().sum(dim=2)
    for value, other, reach in zip(found, expected, (weighted, 2.0, 1.0), strict=True):
        near(value, other, slack * reach)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("count", "width"), [(1, 96), (2, 100), (4, 330)])
def test_what_happens_after_a_sublayer(count: int, width: int, tokens: int) -> None:
    streams = mixing_inputs(count, width, tokens)[0]
    out, post = torch.randn(1, tokens, width), 2 * torch.rand(1, tokens, count)
    inputs = [streams, out, post, torch.rand(1, tokens, count, count)]
    [found] = run("FoldkvHcPost", inputs)
    wide = [value.double() for value in inputs]
    near(found, hc_post(*wide), (count + 2) * UNIT * hc_post(*(value.abs() for value in wide)))


def test_the_mix_of_lopsided_streams_is_balanced() -> None:
    """Also where the softmax gives nearly nothing to some streams, so the eps of every sum could matter."""
    streams, fn, base, _ = mixing_inputs(4, 64, 9)
    scale = torch.tensor([1.0, 1.0, 30.0])
    comb = run("FoldkvHcPre", [streams, fn, base, scale], **MIXING)[2]
    expected = hc_pre(*(value.double() for value in (streams, fn, base, scale)), *MIXING.values())[2]
    torch.testing.assert_close(comb.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(comb.sum(dim=-2), torch.ones(1, 9, 4), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_a_token_is_mixed_and_routed_alike_whoever_its_neighbours_are() -> None:
    """Bit for bit, in any place of a batch, next to NaN too: the order of sums depends on nothing else."""
    streams, *rest = mixing_inputs(4, 100, 10, batch=2)
    alone = run("FoldkvHcPre", [streams[1:, 7:8], *rest], **MIXING)
    streams[0, 3], streams[1, 8] = torch.nan, torch.nan
    for one, other in zip(alone, run("FoldkvHcPre", [streams, *rest], **MIXING), strict=True):
        assert torch.equal(one[0, 0], other[1, 7])
    x, weight, bias = routing_inputs(64, 300, 19, FLOAT32)
    attributes = {"topk": 6, "scaling": 1.5, "weight_format": FLOAT32}
    alone = run("FoldkvRoute", [x[17:18], weight, bias], **attributes)
    x[16] = torch.nan
    for one, other in zip(alone, run("FoldkvRoute", [x, weight, bias], **attributes), strict=True):
        assert torch.equal(one[0], other[17])


def routing_inputs(experts: int, width: int, tokens: int, weight_format: str) -> list[Tensor]:
    """x, weight as stored, and bias; logits of about 4."""
    torch.manual_seed(experts + tokens)
    weight = (torch.randn(experts, width) * 4 * width**-0.5).to(getattr(torch, weight_format))
    return [torch.randn(tokens, width), weight, torch.randn(experts) * 0.1]


@pytest.mark.parametrize("weight_format", PLAIN_FORMATS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("experts", "places", "width"), [(4, 1, 64), (256, 6, 100), (384, 8, 330)])
def test_routing_by_score(experts: int, places: int, width: int, tokens: int, weight_format: str) -> None:
    x, weight, bias = routing_inputs(experts, width, tokens, weight_format)
    attributes: dict[str, Any] = {"topk": places, "scaling": 1.5, "weight_format": weight_format}
    chosen, weights = run("FoldkvRoute", [x, weight, bias], **attributes)
    expected, shares = route(x.double(), weight.double(), bias.double(), *attributes.values())
    assert torch.equal(chosen, expected)
    near(weights, shares, 64 * width**0.5 * UNIT)


@pytest.mark.parametrize("weight_format", PLAIN_FORMATS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("experts", "places", "width"), [(4, 1, 64), (256, 6, 100), (384, 8, 600)])
def test_routing_by_token_id(experts: int, places: int, width: int, tokens: int, weight_format: str) -> None:
    x, weight, _ = routing_inputs(experts, width, tokens, weight_format)
    table = torch.stack([torch.randperm(experts)[:places] for _ in range(30)])
    ids = torch.randint(0, 30, (tokens,))
    chosen, weights = run("FoldkvRouteHashed", [x, weight, table, ids], scaling=2.5, weight_format=weight_format)
    expected, shares = route_hashed(x.double(), weight.double(), table, ids, 2.5, weight_format)
    assert torch.equal(chosen, expected)
    near(weights, shares, 64 * width**0.5 * UNIT)


def test_of_equal_scores_the_lowest_index_is_first() -> None:
    attributes: dict[str, Any] = {"topk": 8, "scaling": 1.0, "weight_format": FLOAT32}
    x, weight, bias = routing_inputs(256, 64, 5, FLOAT32)
    found = run("FoldkvRoute", [torch.zeros(5, 64), weight, torch.zeros(256)], **attributes)[0]
    assert torch.equal(found, torch.arange(8).expand(5, 8))
    order = torch.arange(256) // 4  # four of each
    inputs = [x, weight[order], bias[order]]
    assert torch.equal(run("FoldkvRoute", inputs, **attributes)[0], route(*inputs, *attributes.values())[0])


def test_scores_that_are_nearly_nothing_keep_their_ratios() -> None:
    """Of a logit of -40 the softplus is 4e-18: a logarithm of one plus that would be zero."""
    logits = torch.tensor([-40.0, -41.0, -20.0, -19.5, -5.0, 0.0, 5.0, 40.0])
    table = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    x, weight = torch.ones(4, 16), logits[:, None].expand(-1, 16) / 16
    inputs = [x, weight.contiguous(), table, torch.arange(4)]
    found = run("FoldkvRouteHashed", inputs, scaling=1.0, weight_format=FLOAT32)[1]
    wide = [value.double() if value.is_floating_point() else value for value in inputs]
    torch.testing.assert_close(found.double(), route_hashed(*wide, 1.0, FLOAT32)[1], rtol=2e-6, atol=0)


def test_a_token_of_nan_goes_to_experts_that_there_are() -> None:
    """A slot without tokens holds anything, and the experts' kernels read what is chosen for it."""
    x, weight, bias = routing_inputs(6, 32, 2, BFLOAT16)
    x[0] = torch.nan
    chosen, weights = run("FoldkvRoute", [x, weight, bias], topk=4, scaling=1.0, weight_format=BFLOAT16)
    assert ((chosen >= 0) & (chosen < 6)).all() and not weights[1].isnan().any()


STREAMS = {"B": 1, "S": 1, "N": 4, "C": 64, "J": 24, "NC": 256}
GATE = {"M": 1, "X": 6, "C": 64}


@pytest.mark.parametrize(
    ("operator", "sizes", "attributes", "reason"),
    [
        ("FoldkvHcPre", STREAMS | {"N": 3, "J": 15, "NC": 192}, MIXING, "3 streams; expected a power of two"),
        ("FoldkvHcPre", STREAMS | {"J": 16}, MIXING, r"weights \(16, 256\) for 4 .* expected \(24, 256\)"),
        ("FoldkvHcPost", STREAMS | {"N": 6}, {}, "6 streams; expected a power of two"),
        ("FoldkvRoute", GATE, {"topk": 7, "scaling": 1.0, "weight_format": FLOAT32}, "7 chosen of 6 experts"),
        ("FoldkvRoute", GATE, {"topk": 2, "scaling": 1.0, "weight_format": E4M3}, "a gate in e4m3; its kernels read"),
        ("FoldkvRouteHashed", GATE | {"K": 8, "V": 9}, {"scaling": 1.0, "weight_format": FLOAT32}, "8 chosen of 6"),
    ],
)
def test_sizes_and_formats_that_no_kernel_takes_are_refused(
    operator: str, sizes: dict[str, int], attributes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        plan(operator, sizes, attributes, sm=80, dtype="bfloat16")


@pytest.mark.parametrize("sm", [80, 89, 120])
def test_products_are_float32(sm: int) -> None:
    """A matrix unit would round their factors to TF32, whose 10 bits would change which experts are chosen."""
    attributes = {"topk": 2, "scaling": 1.0, "weight_format": BFLOAT16}
    kernel = kernels("FoldkvRoute", {"X": 6, "C": 512}, attributes, sm=sm, dtype="bfloat16")[0]
    [compiled] = compile_kernels([(kernel, sm)])
    assert "fma.rn.f32" in compiled.ptx and "mma" not in compiled.ptx.replace("fma.rn", "") and not compiled.spills
