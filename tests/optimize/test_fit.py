"""Targets: which formats they keep, how many GPUs a model takes, and how that changes with the question."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foldkv.errors import InputError
from foldkv.export.plan import parameter_count, parameter_groups, plan_memory
from foldkv.export.spec import ModelSpec
from foldkv.optimize.fit import TargetPlan, layout_gaps, plan_target, plan_targets
from foldkv.optimize.formats import FORMATS, fp8_gap, kept_formats, weight_bytes_in
from foldkv.optimize.targets import Target, load_targets

DATA = Path(__file__).parents[1] / "data"
FLASH, PRO = (ModelSpec.from_file(DATA / f"deepseek-v4-{name}.json") for name in ("flash", "pro"))
TARGETS = load_targets()
GPUS = [target for target in TARGETS.values() if target.sm]


def plan(target: Target, **sizes: int) -> TargetPlan:
    return plan_target(FLASH, target, **{"context": 1 << 20, "chunk": 1, **sizes})


@pytest.mark.parametrize("target", TARGETS.values(), ids=str)
def test_each_target_keeps_the_formats_of_its_gpu(target: Target) -> None:
    kept = kept_formats(target.sm)
    if target.sm is None:
        assert kept == ("float32",)
        return
    assert kept == ("bf16", "fp8", "fp4")  # the first is what `build` writes of a float32 export
    assert all(FORMATS[name].source for name in kept)
    # Experts are carried as words on every GPU; e4m3 matrices are kept from Ada on.
    wide, matrices = parameter_groups(FLASH), weight_bytes_in(FLASH, "fp4")
    if target.sm >= 89:
        assert not fp8_gap(target.sm) and weight_bytes_in(FLASH, "fp4", target.sm) == matrices
    else:
        assert f"sm{target.sm}" in fp8_gap(target.sm)
        index = 21 * 1024 * 64 * 128  # the indexers' queries, whose product is float32
        assert weight_bytes_in(FLASH, "fp4", target.sm) == matrices + wide["projections"] + 3 * index


def test_weights_as_released_weigh_what_was_released() -> None:
    # 148.66 GiB on disk, a draft layer of 3.6 GB among them; engines keep compressors in float32 where the file has bfloat16.
    assert weight_bytes_in(FLASH, "fp4") == pytest.approx(148.66 * 2**30 - 3.6e9, rel=0.02)


@pytest.mark.parametrize("model", [FLASH, PRO], ids=["flash", "pro"])
def test_a_narrower_format_weighs_less(model: ModelSpec) -> None:
    sizes = [weight_bytes_in(model, name) for name in FORMATS]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    assert sizes[0] == pytest.approx(4 * parameter_count(model), rel=1e-4)  # and the hash tables


@given(
    target=st.sampled_from(GPUS), context=st.integers(1, 1 << 20), batch=st.integers(1, 32), chunk=st.integers(1, 64),
    more=st.sampled_from(["context", "batch", "chunk"]),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_more_never_takes_fewer_gpus(target: Target, context: int, batch: int, chunk: int, more: str) -> None:
    sizes = {"context": context, "batch": batch, "chunk": chunk}
    less = plan(target, **sizes)
    sizes[more] = min(2 * sizes[more], 1 << 20)
    greater = plan(target, **sizes)
    for name in less.weights:
        assert greater.over(name) >= less.over(name)
        if (after := greater.devices(name)) is not None:
            before = less.devices(name)
            assert before is not None and after >= before
            # That many hold it, and one fewer do not.
            share = -(-greater.weights[name] // after)
            assert greater.replicated + share <= greater.capacity
            assert after == 1 or greater.replicated + greater.weights[name] / (after - 1) > greater.capacity
            assert (after == 1) == (greater.over(name) == 0)


def test_narrower_weights_never_take_more_gpus() -> None:
    for target in GPUS:
        needed = [plan(target).devices(name) for name in plan(target).weights]
        assert all(needed) and needed == sorted(needed, reverse=True)  # type: ignore[type-var]


def test_caches_alone_that_are_too_large_fit_no_number_of_gpus() -> None:
    full = plan(TARGETS["rtx4090"], batch=64)
    assert full.replicated > full.capacity
    assert {full.devices(name) for name in full.weights} == {None}
    assert all(full.over(name) > 0 for name in full.weights)


def test_dense_rows_are_as_wide_as_the_target_computes() -> None:
    for name, rows in (("cpu", "float32"), ("h200", "bf16")):
        assert plan(TARGETS[name]).memory == plan_memory(FLASH, context=1 << 20, layout=rows)


def test_layouts_are_those_that_build_takes() -> None:
    kept = {name: not gap for name, gap in layout_gaps(FLASH, TARGETS["h200"], plugins=True).items()}
    assert kept == {"dense": True, "fp8": True, "fp8+fp4": True, "nvfp4+fp4": False}
    for target, plugins in (("h200", False), ("cpu", True)):
        gaps = layout_gaps(FLASH, TARGETS[target], plugins=plugins)
        assert [name for name, gap in gaps.items() if not gap] == ["dense"]


def test_without_a_layout_every_kept_one_is_planned_and_the_cpu_stays_dense() -> None:
    plans = plan_targets(FLASH, [TARGETS["cpu"], TARGETS["a100"]], context=4096)
    assert [(p.target.name, p.layout) for p in plans] == [
        ("cpu", "dense"), ("a100", "dense"), ("a100", "fp8"), ("a100", "fp8+fp4"),
    ]  # fmt: skip
    plans = plan_targets(FLASH, [TARGETS["cpu"], TARGETS["a100"]], layout="fp8", context=4096)
    assert [(p.target.name, p.layout) for p in plans] == [("cpu", "dense"), ("a100", "fp8")]


@pytest.mark.parametrize(
    ("arguments", "finding"),
    [
        ({"layout": "int3"}, "'int3' is not known to targets; expected one of dense, fp8"),
        (
            {"layout": "nvfp4+fp4"},
            "h200: layout nvfp4.fp4 is not kept .*FoldkvWindowUpdate does not read rows in nvfp4",
        ),
        ({"layout": "fp8", "plugins": False}, "h200: layout fp8 needs plugins"),
        ({"context": 2 << 20}, "takes 1 to 1048576 tokens"),
        ({"batch": 0}, "batch is 0"),
    ],
)
def test_a_wrong_question_is_refused_once(arguments: dict[str, object], finding: str) -> None:
    with pytest.raises(InputError, match=finding) as caught:
        plan_targets(FLASH, [TARGETS["h200"]], **{"context": 4096, **arguments})  # type: ignore[arg-type]
    assert "found" not in str(caught.value)


def test_the_same_fault_of_several_targets_is_listed_by_target() -> None:
    with pytest.raises(InputError, match=r"2 found(.|\n)*a100: layout nvfp4(.|\n)*h200: layout nvfp4"):
        plan_targets(FLASH, [TARGETS["a100"], TARGETS["h200"]], layout="nvfp4+fp4", context=4096)
