"""The planner against the published figures and against what is allocated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from foldkv.errors import InputError
from foldkv.export.model.decoder import Decoder
from foldkv.export.plan import parameter_count, plan_memory
from foldkv.export.spec import ModelSpec
from foldkv.export.state import state_tensors, total_bytes

DATA = Path(__file__).parents[1] / "data"
MILLION, GIB = 1 << 20, 1 << 30


def spec(name: str) -> ModelSpec:
    return ModelSpec.from_file(DATA / f"deepseek-v4-{name}.json")


@pytest.mark.parametrize(
    ("name", "layout", "gib"),
    [
        ("flash", "fp8+fp4", 3.43), ("pro", "fp8+fp4", 4.91), ("flash", "fp8", 3.76), ("pro", "fp8", 5.38),
        ("flash", "bf16", 6.72), ("pro", "bf16", 9.62), ("flash", "nvfp4+fp4", 2.38), ("pro", "nvfp4+fp4", 3.40),
    ],
)  # fmt: skip
def test_the_growing_caches_at_one_million_tokens_have_the_published_sizes(name: str, layout: str, gib: float) -> None:
    assert plan_memory(spec(name), context=MILLION, layout=layout).growing / GIB == pytest.approx(gib, abs=0.006)


@pytest.mark.parametrize(("name", "share"), [("flash", 0.0731), ("pro", 0.1047)])
def test_the_share_of_v32_is_the_published_one(name: str, share: float) -> None:
    plan = plan_memory(spec(name), context=MILLION)
    assert plan.v32 / GIB == pytest.approx(46.94, abs=0.005)
    assert plan.share_of_v32 == pytest.approx(share, abs=0.00005)


def test_the_parts_that_do_not_grow_have_the_published_sizes() -> None:
    plan = plan_memory(spec("flash"), context=MILLION)
    assert plan.groups["window"] / (1 << 20) == pytest.approx(3.07, abs=0.005)
    carry = sum(size for group, size in plan.groups.items() if "carry" in group)
    assert carry / (1 << 20) == pytest.approx(11.6, abs=0.1)


@pytest.mark.parametrize("context", [1, 255, 4096, MILLION])
def test_the_float32_plan_is_what_the_state_takes(context: int) -> None:
    model = spec("flash")
    plan = plan_memory(model, context=context, batch=3, layout="float32")
    assert plan.total == total_bytes(state_tensors(model), context, 3)


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_parameters_are_counted_as_the_model_has_them(name: str) -> None:
    model = spec(name)
    with torch.device("meta"):
        decoder = Decoder(model)
    assert parameter_count(model) == sum(parameter.numel() for parameter in decoder.parameters())
    assert parameter_count(model) / 1e9 == pytest.approx({"flash": 284, "pro": 1573}[name], rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "finding"),
    [
        ({"context": 0}, "context is 0"),
        ({"context": 2 * MILLION}, "takes 1 to 1048576"),
        ({"context": 1, "batch": 0}, "batch is 0"),
        ({"context": 1, "layout": "int3"}, "layout 'int3' is not known"),
    ],
)
def test_a_wrong_question_is_refused(arguments: dict[str, int], finding: str) -> None:
    with pytest.raises(InputError, match=finding):
        plan_memory(spec("flash"), **arguments)  # type: ignore[arg-type]
