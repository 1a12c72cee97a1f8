"""The launcher, run on a CPU: the driver is a stand-in whose kernels run in Triton's interpreter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import FORMS, ROTARY, Case, make_case
from driver import CUresult, FakeDriver

from foldkv.errors import FoldkvError, MissingDependencyError
from foldkv.export.contract.rows import DENSE, FP8_DS_MLA
from foldkv.plugins.cuda import KernelImage, Launcher, cuda_driver, device_capability
from foldkv.plugins.launch import plan
from foldkv.plugins.plans import Argument, Plan

DECODE: dict[str, Any] = {"start": [43, 7], "real": [1, 1], "chunk": 1}
PREFILL: dict[str, Any] = {"start": [35, 6], "real": [11, 2], "chunk": 11}
#: Key counts that are split over programs: of windows, of chosen entries, of all entries.
SPLITS = [
    ("FoldkvWindowAttention", {"window": 200}), ("FoldkvSparseAttention", {"topk": 200, "capacity": 300}),
    ("FoldkvDenseAttention", {"capacity": 640}),
]  # fmt: skip


def steps_of(case: Case, **options: Any) -> Plan:
    return plan(
        case.operator,
        case.sizes,
        case.attributes,
        sm=80,
        dtype="bfloat16",
        row_format=case.row_format,
        rope_dim=ROTARY,
        **options,
    )


def images(steps: Plan, shared: int = 0) -> list[KernelImage]:
    kernels = {launch.kernel for launch in steps.launches}
    return [KernelImage(one.name, "entry", 32 * one.num_warps, shared, one.name.encode()) for one in kernels]


def driver_of(steps: Plan) -> FakeDriver:
    return FakeDriver({launch.kernel.name.encode(): launch.kernel for launch in steps.launches})


def launch(launcher: Launcher, driver: FakeDriver, case: Case, steps: Plan) -> Sequence[torch.Tensor]:
    inputs, outputs = case.outputs()
    workspace = torch.full((steps.workspace // 4 + 1,), torch.nan)
    addresses = [[driver.register(tensor) for tensor in tensors] for tensors in (inputs, outputs, [workspace])]
    launcher.launch(steps, addresses[0], addresses[1], workspace=addresses[2][0], stream=5)
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize("call", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize(("operator", "rows"), FORMS)
def test_every_operator_through_the_launcher(operator: str, rows: str, call: dict[str, Any]) -> None:
    case = make_case(operator, rows, **call)
    steps = steps_of(case)
    driver = driver_of(steps)
    launcher = Launcher(images(steps), driver=driver)
    case.check(launch(launcher, driver, case, steps))


@pytest.mark.parametrize("rows", [DENSE, FP8_DS_MLA])
@pytest.mark.parametrize(("operator", "sizes"), SPLITS)
def test_split_attention_through_the_launcher(operator: str, sizes: dict[str, int], rows: str) -> None:
    """Spans and their merge share the workspace; the merge's arguments are its own."""
    case = make_case(operator, rows, start=[5000, 700], real=[1, 1], chunk=1, **sizes)
    steps = steps_of(case)
    assert [one.kernel.function for one in steps.launches][1:] == ["attention.combine"] and steps.workspace > 0
    driver = driver_of(steps)
    launcher = Launcher(images(steps), driver=driver)
    case.check(launch(launcher, driver, case, steps))
    assert len(driver.launches) == 2 and driver.launches[0][0][1] > 1


def test_launching_enqueues_and_does_nothing_else() -> None:
    case = make_case("FoldkvDenseAttention", start=[5000, 700], real=[1, 1], chunk=1, capacity=640)
    steps = steps_of(case)
    driver = driver_of(steps)
    launcher = Launcher(images(steps), driver=driver)
    loaded = len(driver.calls)
    for _ in range(2):
        case.check(launch(launcher, driver, case, steps))
    assert driver.calls[loaded:] == ["cuLaunchKernel"] * 4
    launcher.close()
    assert driver.calls[loaded + 4 :] == ["cuLibraryUnload"] * 2
    with pytest.raises(FoldkvError, match="is not among those loaded"):
        launch(launcher, driver, case, steps)


def test_a_kernel_that_was_not_loaded_is_named() -> None:
    case = make_case("FoldkvIndexSelect", **DECODE)
    steps = steps_of(case)
    other = steps_of(make_case("FoldkvWindowUpdate", **DECODE))
    driver = driver_of(other)
    launcher = Launcher(images(other), driver=driver)
    name = steps.launches[0].kernel.name
    with pytest.raises(FoldkvError, match=rf"kernel {name} is not among those loaded \(1\).*build it again"):
        launch(launcher, driver, case, steps)
    assert "cuLaunchKernel" not in driver.calls


def test_a_grid_without_programs_is_not_launched() -> None:
    case = make_case("FoldkvIndexScores", **DECODE)
    [only] = steps_of(case).launches
    empty = Plan((dataclasses.replace(only, grid=(0, 1, 1)),))
    driver = driver_of(empty)
    launch(Launcher(images(empty), driver=driver), driver, case, empty)
    assert "cuLaunchKernel" not in driver.calls


def test_more_than_48_kib_of_shared_memory_is_asked_for() -> None:
    case = make_case("FoldkvIndexSelect", **DECODE)
    steps = steps_of(case)
    for shared, calls in ((48 << 10, 0), (100_000, 1)):
        driver = driver_of(steps)
        launcher = Launcher(images(steps, shared), driver=driver)
        case.check(launch(launcher, driver, case, steps))
        assert driver.calls.count("cuKernelSetAttribute") == calls
        assert driver.launches[0][2] == shared


@pytest.mark.parametrize(
    "call",
    ["cuCtxGetDevice", "cuLibraryLoadData", "cuLibraryGetKernel", "cuKernelSetAttribute", "cuLaunchKernel"],
)
def test_a_failure_of_the_driver_is_told_by_its_name(call: str) -> None:
    case = make_case("FoldkvIndexSelect", **DECODE)
    steps = steps_of(case)
    driver = driver_of(steps)
    driver.failures[call] = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(FoldkvError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        launcher = Launcher(images(steps, 100_000), driver=driver)
        launch(launcher, driver, case, steps)
    assert [name for name in driver.calls if name != "cuLibraryUnload"][-1] == call
    assert call == "cuLaunchKernel" or driver._libraries == {}, "what was loaded is unloaded"


def test_an_entry_point_that_is_not_in_the_cubin_is_told() -> None:
    steps = steps_of(make_case("FoldkvIndexSelect", **DECODE))
    with pytest.raises(FoldkvError, match="CUDA_ERROR_NOT_FOUND"):
        Launcher(images(steps), driver=FakeDriver({}))


# What the stand-in refuses, so that the tests above mean something.


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"threads": 64}, "block"),
        ({"shared": 0, "grid": (1, 70_000, 1)}, "grid"),
        ({"memory": False}, "no memory at"),
    ],
)
def test_the_stand_in_refuses_what_a_gpu_refuses(change: dict[str, Any], reason: str) -> None:
    case = make_case("FoldkvIndexSelect", **DECODE)
    steps = steps_of(case)
    if "grid" in change:
        steps = Plan((dataclasses.replace(steps.launches[0], grid=change["grid"]),))
    [image] = images(steps)
    driver = driver_of(steps)
    launcher = Launcher([dataclasses.replace(image, threads=change.get("threads", image.threads))], driver=driver)
    with pytest.raises(FoldkvError, match="CUDA_ERROR"):
        if change.get("memory", True):
            launch(launcher, driver, case, steps)
        else:
            launcher.launch(steps, [256, 512], [1024])
    assert reason in driver.reasons[0]


@pytest.mark.parametrize("kind", ["input", "int32"])
def test_arguments_in_another_order_are_found(kind: str) -> None:
    """Two values of one type exchanged; the sizes keep every address inside its tensor."""
    case = make_case("FoldkvSparseAttention", start=[67], real=[1], chunk=1, capacity=17)
    [only] = steps_of(case).launches
    arguments = list(only.arguments)
    places = [i for i, one in enumerate(arguments) if one.kind == kind]
    first, second = places[1:3] if kind == "input" else places
    arguments[first], arguments[second] = arguments[second], arguments[first]
    steps = Plan((dataclasses.replace(only, arguments=tuple(arguments)),))
    driver = driver_of(steps)
    found = launch(Launcher(images(steps), driver=driver), driver, case, steps)
    with pytest.raises(AssertionError):
        case.check(found)


def test_pointers_to_scratch_memory_are_null() -> None:
    """One argument too many shifts the hidden pointers, which the stand-in reads."""
    case = make_case("FoldkvIndexSelect", **DECODE)
    [only] = steps_of(case).launches
    steps = Plan((dataclasses.replace(only, arguments=(*only.arguments, Argument("int32", 7))),))
    driver = driver_of(steps)
    with pytest.raises(FoldkvError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        launch(Launcher(images(steps), driver=driver), driver, case, steps)
    assert "scratch memory" in driver.reasons[0]


@pytest.mark.skipif(device_capability() is not None, reason="there is a driver")
def test_without_a_driver_the_launcher_says_so() -> None:
    with pytest.raises(MissingDependencyError, match=r"no usable NVIDIA driver|cuda-bindings, which is not installed"):
        cuda_driver()
    with pytest.raises(MissingDependencyError):
        Launcher([])
