"""Targets: which formats they keep, how many GPUs a model takes, and how that changes with the question."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import released_tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from foldkv.backends import ONNX_RUNTIME_CUDA
from foldkv.errors import InputError
from foldkv.export.checkpoint.config_reader import spec_from_file
from foldkv.export.contract.geometry import ModelSpec
from foldkv.export.memory import parameter_count, parameter_groups, plan_memory
from foldkv.optimize.fit import TargetPlan, graph_bytes, plan_target, plan_targets, within_model
from foldkv.optimize.kept_weights import FORMATS, stored_format, weight_bytes_in
from foldkv.optimize.targets import Target, load_targets, resolve_targets

DATA = Path(__file__).parents[1] / "data"
FLASH, PRO = (spec_from_file(DATA / f"deepseek-v4-{name}.json") for name in ("flash", "pro"))
FLASH_CONFIG = json.loads((DATA / "deepseek-v4-flash.json").read_text())
TARGETS = load_targets()
GPUS = [target for target in TARGETS.values() if target.sm]


def released_bytes(model: ModelSpec) -> list[int]:
    """Of the released tensors: every one at a multiple of 256 bytes, norms in float32, the experts of a layer together."""
    found: dict[str, dict[str, int]] = {}
    for name, size in released_tensors(model):
        if name.startswith("mtp."):
            continue
        owner, role = re.match(r"(layers\.\d+|)\.?(.*)", name).groups()  # type: ignore[union-attr]
        role = re.sub(r"experts\.\d+\..*\.(weight|scale)", r"experts.\1", role) if ".experts." in name else role
        wide = 2 if re.search(r"norm\.weight$", role) else 1
        roles = found.setdefault(owner, {})
        roles[role] = roles.get(role, 0) + wide * size
    return [sum(-(-size // 256) * 256 for size in roles.values()) for roles in found.values()]


def plan(target: Target, **sizes: int) -> TargetPlan:
    return plan_target(FLASH, target, **{"context": 1 << 20, "chunk": 1, **sizes})


@pytest.mark.parametrize("target", TARGETS.values(), ids=str)
def test_each_target_keeps_the_formats_of_its_gpu(target: Target) -> None:
    kept = target.backend.weights
    if target.sm is None:  # the cpu computes in float32, and reads quantised experts as they are stored
        assert kept == ("float32", "fp8", "fp4")
        return
    assert kept == ("bf16", "fp8", "fp4")  # the first is what `build` writes of a float32 export
    assert all(FORMATS[name].source for name in kept)
    # Experts are carried as words on every GPU.
    wide, matrices = parameter_groups(FLASH), weight_bytes_in(FLASH, "fp4")
    # Products in float32: the indexers' queries are stored in e4m3; routers, compressors and head weights in bfloat16.
    index = 21 * 1024 * 64 * 128
    exact = 4096 * (43 * 256 + 21 * (2 * 1024 + 64 + 2 * 256) + 20 * 2 * 512)
    assert weight_bytes_in(FLASH, "fp4", widened=True) == matrices + wide["projections"] + 3 * index + 2 * exact
    bare, given = plan(target, context=4096, plugins=False).weights["fp4"], plan(target, context=4096).weights["fp4"]
    assert given == sum(released_bytes(FLASH)), "plugins read them as stored"
    assert bare - given == pytest.approx(wide["projections"] + 3 * index + 2 * exact, rel=0.01)


def test_weights_as_released_weigh_what_was_released() -> None:
    # 148.66 GiB on disk, a draft layer of 3.6 GB among them.
    assert weight_bytes_in(FLASH, "fp4") == pytest.approx(148.66 * 2**30 - 3.6e9, rel=0.005)


@pytest.mark.parametrize("model", [FLASH, PRO], ids=["flash", "pro"])
def test_a_narrower_format_weighs_less(model: ModelSpec) -> None:
    sizes = [weight_bytes_in(model, name) for name in FORMATS]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    assert sizes[0] == pytest.approx(4 * parameter_count(model), rel=1e-4)  # and the hash tables


def fullest(planned: TargetPlan, format_: str, count: int) -> int:
    """Bytes on the fullest of ``count`` GPUs; together they hold everything once, but the activations."""
    shares = planned.shares(format_, count)
    assert sum(share.weights for share in shares) == planned.weights[format_]
    assert sum(share.state for share in shares) == planned.caches
    assert [share.calls[0] for share in shares] == [0, *(share.calls[1] + 1 for share in shares[:-1])]
    return max(share.held for share in shares) + planned.activation_bytes


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
            assert fullest(greater, name, after) <= greater.capacity
            assert after == 1 or fullest(greater, name, after - 1) > greater.capacity
            assert (after == 1) == (greater.over(name) == 0)


def test_narrower_weights_never_take_more_gpus() -> None:
    for target in GPUS:
        needed = [plan(target).devices(name) for name in plan(target).weights]
        assert all(needed) and needed == sorted(needed, reverse=True)  # type: ignore[type-var]


def test_caches_alone_that_are_too_large_fit_no_number_of_gpus() -> None:
    full = plan(TARGETS["rtx4090"], batch=64)
    assert fullest(full, "fp4", FLASH.num_layers + 2) > full.capacity
    assert {full.devices(name) for name in full.weights} == {None}
    assert all(full.over(name) > 0 for name in full.weights)


def test_dense_rows_are_as_wide_as_the_target_computes() -> None:
    for name, rows in (("cpu", "float32"), ("h200", "bf16")):
        assert plan(TARGETS[name]).memory == plan_memory(FLASH, context=1 << 20, layout=rows)


def test_without_a_layout_every_kept_one_is_planned_and_the_cpu_stays_dense() -> None:
    plans = plan_targets(FLASH, [TARGETS["cpu"], TARGETS["a100"]], context=4096)
    assert [(p.target.name, p.layout) for p in plans] == [
        ("cpu", "dense"), ("a100", "dense"), ("a100", "fp8"), ("a100", "fp8+fp4"),
    ]  # fmt: skip
    plans = plan_targets(FLASH, [TARGETS["cpu"], TARGETS["a100"]], layout="fp8", context=4096)
    assert [(p.target.name, p.layout) for p in plans] == [("cpu", "dense"), ("a100", "fp8")]


def test_the_cpu_is_planned_with_the_packed_rows_that_build_gives_it() -> None:
    plans = plan_targets(FLASH, [TARGETS["cpu"]], profile="served", context=4096)
    assert [p.layout for p in plans] == ["dense", "fp8+fp4"]
    assert plans[1].memory == plan_memory(FLASH, context=4096, layout="fp8+fp4")
    with pytest.raises(InputError, match="cpu: layout fp8 is not supported"):
        plan_targets(FLASH, [TARGETS["cpu"]], layout="fp8", context=4096)


@pytest.mark.parametrize("stored", ["float32", "bf16", "fp8", "fp4"])
def test_the_bundle_is_counted_in_the_format_that_build_writes(stored: str) -> None:
    for name, wide in (("cpu", "float32"), ("a100", "bf16"), ("rtx4090", "bf16")):
        found = plan_target(FLASH, TARGETS[name], context=4096, stored=stored)
        assert found.built_in == (stored if stored in ("fp8", "fp4") else wide)
        if name != "cpu":
            assert 10_000_000 < found.bundle < 100_000_000  # plans hold no weights
    assert 0 < graph_bytes(FLASH, stored) < 10_000_000


def test_a_cpu_bundle_holds_what_it_converts_and_no_more() -> None:
    plans = {
        stored: plan_target(FLASH, TARGETS["cpu"], context=4096, stored=stored) for stored in ("float32", "bf16", "fp8", "fp4")
    }  # fmt: skip
    groups, embedding = parameter_groups(FLASH), FLASH.vocab_size * FLASH.hidden_size
    sizes = {name: size for name, size in released_tensors(FLASH) if not name.startswith("mtp.")}
    dense = {name: size for name, size in sizes.items() if ".experts." not in name or ".shared_" in name}
    e4m3 = sum(size for name, size in dense.items() if f"{name.removesuffix('weight')}scale" in dense)
    narrow = (
        sum(size for name, size in dense.items() if re.search(r"compressor\.w|weights_proj|^head\.weight", name)) // 2
    )
    converted = groups["projections"] + groups["ends"] - embedding + groups["precise"] - e4m3 - narrow
    assert converted < 0.02 * (e4m3 + narrow), "no matrix of a product"
    assert [plan.placed // 4 for plan in plans.values()] == [0, converted + groups["experts"], converted, converted]
    for stored, plan in plans.items():
        assert 0 < plan.bundle - plan.placed == graph_bytes(FLASH, stored) and plan.to_dict()["placed"] == plan.placed
    # The rest is mapped: from the checkpoint, experts as stored, and what is in bfloat16; from the first run's copy, the values of e4m3.
    mapped = groups["experts"] * 17 / 32 + 2 * embedding + 2 * narrow + 2 * e4m3
    assert plans["fp4"].weights["fp4"] - 4 * converted == pytest.approx(mapped, rel=1e-3)
    assert plans["fp8"].stacked == 2 * e4m3 and plans["bf16"].stacked == plans["float32"].stacked == 0


def test_the_format_of_the_experts_is_read_off_headers_or_config() -> None:
    assert stored_format(FLASH_CONFIG) == "fp4"
    first = {key: value for key, value in FLASH_CONFIG.items() if key != "expert_dtype"}
    assert stored_format(first) == "fp4" and stored_format({"torch_dtype": "bfloat16"}) == "bf16"
    assert stored_format({}) == stored_format({"dtype": "float32"}) == "float32"
    for dtype, name in (("I8", "fp4"), ("F8_E4M3", "fp8"), ("BF16", "bf16"), ("F32", "float32")):
        assert stored_format(FLASH_CONFIG, {"layers.0.ffn.experts.0.w1.weight": dtype}) == name


@pytest.mark.parametrize(("target", "batch"), [("b300", 1), ("b300", 8), ("rtx4090", 1)])
def test_the_largest_context_fits_and_one_token_more_does_not(target: str, batch: int) -> None:
    found = plan_target(FLASH, TARGETS[target], context=4096, batch=batch, chunk=64, max_context=True).max_context
    for name, context in found.items():
        if context:
            assert plan(TARGETS[target], context=context, batch=batch, chunk=64).over(name) == 0
        if context < FLASH.max_position_embeddings:
            assert plan(TARGETS[target], context=context + 1, batch=batch, chunk=64).over(name) > 0
    assert any(found.values()) == (target == "b300")


def test_a_context_above_the_models_is_planned_as_the_largest_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert within_model(FLASH, 2 << 20) == 1 << 20 and "at most 1,048,576 tokens" in caplog.text
    caplog.clear()
    assert within_model(FLASH, 1 << 20) == 1 << 20 and not caplog.text


def test_a_plan_says_what_this_machine_cannot_build() -> None:
    for name, here in (("cpu", True), ("h100", False)):
        found = plan(TARGETS[name]).to_dict()
        assert found["builds_here"] == here == (not found["missing"])
    assert "TensorRT 11" in plan(TARGETS["h100"]).missing


@pytest.mark.parametrize(
    ("arguments", "finding"),
    [
        ({"layout": "int3"}, "'int3' is not known; expected one of dense, fp8, fp8"),
        ({"layout": "nvfp4+fp4"}, "'nvfp4.fp4' is not supported by any target; expected one of dense, fp8, fp8"),
        ({"layout": "fp8", "plugins": False}, "h200: layout fp8 needs plugins"),
        ({"layout": "fp8", "profile": "served"}, "h200: layout fp8 is not supported: FoldkvCompressFp4 does not read"),
        ({"profile": "bf16"}, "profile 'bf16' is not known"),
        ({"context": 2 << 20}, "takes 1 to 1048576 tokens"),
        ({"batch": 0}, "batch is 0"),
        ({"batch": 10**12}, "batch is 1,000,000,000,000; expected 1 to 65,535"),
        ({"chunk": 10**6}, "chunk is 1,000,000; expected 1 to 65,535"),
    ],
)
def test_a_wrong_question_is_refused_once(arguments: dict[str, object], finding: str) -> None:
    with pytest.raises(InputError, match=finding) as caught:
        plan_targets(FLASH, [TARGETS["h200"]], **{"context": 4096, **arguments})  # type: ignore[arg-type]
    assert "found" not in str(caught.value)


def test_the_same_fault_of_several_targets_is_listed_by_target() -> None:
    with pytest.raises(InputError, match=r"2 found(.|\n)*a100: layout fp8 needs(.|\n)*h200: layout fp8 needs"):
        plan_targets(FLASH, [TARGETS["a100"], TARGETS["h200"]], layout="fp8", plugins=False, context=4096)


@pytest.mark.parametrize("model", [FLASH, PRO], ids=["flash", "pro"])
def test_experts_that_are_stacked_are_counted(model: ModelSpec) -> None:
    """Codes of half a byte and a scale for 32 of them, of three matrices of every expert."""
    layer = 3 * model.hidden_size * model.moe_intermediate_size * model.num_experts
    cpu, *_ = resolve_targets(["cpu"])
    sizes = {
        stored: plan_target(model, cpu, context=4096, stored=stored).stacked for stored in ("float32", "fp8", "fp4")
    }
    assert sizes["float32"] == 0 and sizes["fp4"] - sizes["fp8"] == model.num_layers * (layer // 2 + layer // 32)
    assert plan(GPUS[0]).stacked == 0
    odd = replace(model, moe_intermediate_size=model.moe_intermediate_size + 16)
    fp8 = plan_target(odd, cpu, context=4096, stored="fp8")
    assert plan_target(odd, cpu, context=4096, stored="fp4").stacked == fp8.stacked, "matrices alone"


def test_a_gpu_for_onnx_runtime_holds_the_weights_of_the_cpu_bundle_and_caches_once_in_float32() -> None:
    [target] = resolve_targets(["b200"], ONNX_RUNTIME_CUDA.name)
    found = plan_target(FLASH, target, context=1 << 16, stored="fp4")
    cpu = plan_target(FLASH, TARGETS["cpu"], context=1 << 16, stored="fp4")
    # On the cpu large matrices stay narrow; a GPU has all of them in float32 in its bundle.
    assert found.placed > 50 * cpu.placed and found.weights["fp4"] > cpu.weights["fp4"] and found.built_in == "fp4"
    assert found.capacity == 180 << 30 and found.copies == 1 and not found.plugins
    assert found.memory == plan_memory(FLASH, context=1 << 16, layout="float32")
    assert found.devices("fp4") == 1 and found.over("fp8") and found.devices("fp8") is None
    with pytest.raises(InputError, match="ONNX Runtime CUDA uses one device; only engines share a model among GPUs"):
        found.shares("fp4", 2)
    assert found.to_dict()["backend"] == "onnxruntime-cuda" and found.bundle < 0.2 * found.weights["fp4"]
