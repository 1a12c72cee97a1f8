"""The engine's executor, whole, over stand-ins for the GPU and for TensorRT; and that the real libraries have what it uses."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from driver import CUresult
from engine import library
from gpus import HostDriver

from foldkv.artifact import write_manifest
from foldkv.errors import ArtifactError, FoldkvError, InputError, MissingDependencyError
from foldkv.export.contract.chain import Call
from foldkv.export.contract.engine_set import ENGINES, STORED, EngineTable, Taken
from foldkv.export.contract.lock import LOCK
from foldkv.export.contract.state import StateTensor
from foldkv.export.package import read_package
from foldkv.export.roles import DTYPE_NAMES, onnx_dtype
from foldkv.plugins import cuda as cuda_module
from foldkv.plugins.cuda import Device
from foldkv.runtime import bundle as bundle_module
from foldkv.runtime import engine_model as engine_module
from foldkv.runtime.buffers import StateBuffers, StateSpec
from foldkv.runtime.bundle import load_bundle
from foldkv.runtime.device_buffers import DeviceBuffers
from foldkv.runtime.session import Session

PROMPTS = [[84, 104, 101, *range(40, 90)], [65, 66, 67]]


def make_bundle(
    source: Path, folder: Path, *, plan: str | None = None, version: str = "1.0", in_place: Sequence[str] = ()
) -> Path:
    """A bundle that says it holds engines; each plan names the segment of the graph that computes it."""
    content = json.loads((source / "manifest.json").read_text())
    rest = {key: value for key, value in content.items() if key not in ("schema_version", "kind", "files")}
    package = read_package(source.parents[1] / "graph")
    names = list(package.manifest.segments)
    for name in names:
        path = (package.folder / package.manifest.segments[name].file).resolve()
        (folder / f"{name}.plan").write_text(plan or str(path))
    taken = {}
    for owner, name in package.calls():
        weights = package.lock.weights[owner]
        taken[name] = {
            role: Taken(STORED, DTYPE_NAMES[onnx_dtype(weight)], weight.shape) for role, weight in weights.items()
        }
    table = EngineTable({name: f"{name}.plan" for name in names}, tuple(Call(*call) for call in package.calls()), taken)
    table.write(folder / ENGINES)
    shutil.copyfile(package.folder / LOCK, folder / LOCK)
    rest |= {
        "backend": "tensorrt-rtx", "target": content["target"] | {"name": "a100", "sm": 80}, "tool_versions": {"tensorrt-rtx": version},
        "engine": {"file": ENGINES, "plugin_layers": 0}, "plugins": [], "in_place": list(in_place), "kernels": None,
        "shapes": {"batch": [1, 1, 4], "chunk": [1, 1, 16], "context": [64, 256, 1024]},
    }  # fmt: skip
    write_manifest(folder, kind="foldkv.bundle", content=rest)
    return folder


def assert_given_back(driver: HostDriver) -> None:
    """Every byte, the stream and the context."""
    assert driver.blocks == {} and set(driver.opened.values()) == {0}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> HostDriver:
    driver = HostDriver()
    monkeypatch.setattr(cuda_module, "cuda_driver", lambda: driver)
    monkeypatch.setattr(engine_module, "_library", lambda bundle: library(driver))
    monkeypatch.setattr(bundle_module, "device_capability", lambda: 80)
    return driver


def test_a_session_over_an_engine_decodes_as_one_over_a_graph(
    tiny_bundle: Path, tmp_path: Path, gpu: HostDriver
) -> None:
    folder = make_bundle(tiny_bundle, tmp_path)
    with Session(folder, context=256, batch=2) as ours, Session(tiny_bundle, context=256, batch=2, chunk=16) as theirs:
        assert ours.chunk == 16  # what the engine was built for
        assert ours.state_bytes == 2 * theirs.state_bytes, "what bodies write does not lie where they read"
        np.testing.assert_allclose(ours.prefill(PROMPTS), theirs.prefill(PROMPTS), atol=1e-4)
        snapshot = ours.snapshot()
        first = [ours.decode([65, 66]) for _ in range(5)]
        np.testing.assert_allclose(first[-1], [theirs.decode([65, 66]) for _ in range(5)][-1], atol=1e-4)
        ours.restore(snapshot)
        for one in first:
            np.testing.assert_array_equal(ours.decode([65, 66]), one)
        ours.reset([1])
        theirs.reset([1])
        np.testing.assert_allclose(ours.forward([[], [70, 71]])[1], theirs.forward([[], [70, 71]])[1], atol=1e-4)
        assert ours.generate(PROMPTS, max_new_tokens=8) == theirs.generate(PROMPTS, max_new_tokens=8)
    assert_given_back(gpu)


def test_state_that_the_manifest_says_is_updated_in_place_is_one_buffer(
    tiny_bundle: Path, tmp_path: Path, gpu: HostDriver
) -> None:
    tensors = load_bundle(tiny_bundle).state.tensors
    carries = [tensor.name for tensor in tensors if "carry" in tensor.group]
    folder = make_bundle(tiny_bundle, tmp_path, in_place=carries)
    assert load_bundle(folder).in_place == tuple(carries)
    with Session(folder, context=256) as session:
        once = sum(tensor.bytes(256) for tensor in tensors if tensor.name in carries)
        assert session.state_bytes == 2 * sum(tensor.bytes(256) for tensor in tensors) - once
    assert_given_back(gpu)


def test_buffers_that_are_not_updated_in_place_are_swapped(tiny_bundle: Path, gpu: HostDriver) -> None:
    state = load_bundle(tiny_bundle).state
    names = {tensor.name for tensor in state.tensors}
    buffers = DeviceBuffers(Device(gpu), state, 256, 1, in_place=["2.carry"])
    before, targets = dict(buffers.addresses), buffers.targets
    assert {name for name in names if before[name] == targets[name]} == {"2.carry"}
    buffers.written()
    assert buffers.addresses == targets and buffers.targets == before
    buffers.close()
    assert gpu.blocks == {}


def test_the_default_context_is_what_the_engine_was_built_for(
    tiny_bundle: Path, tmp_path: Path, gpu: HostDriver
) -> None:
    folder = make_bundle(tiny_bundle, tmp_path)
    with Session(folder) as session:
        assert session.context == 1024
    for sizes in ({"context": 2048}, {"context": 32}, {"context": 256, "batch": 5}):
        with pytest.raises(InputError, match="was built for"):
            Session(folder, **sizes)
    assert_given_back(gpu)


def test_state_that_the_gpu_cannot_hold_is_refused_and_given_back(
    tiny_bundle: Path, tmp_path: Path, gpu: HostDriver
) -> None:
    folder = make_bundle(tiny_bundle, tmp_path)
    table = EngineTable.read(folder / ENGINES)
    for room, what in ((100_000, "the weights of"), (table.weight_bytes + 50_000, "the state for context 1024")):
        gpu.limit = room
        with pytest.raises(InputError, match=rf"{what} .* \d+ bytes .* which (the GPU|it) cannot allocate"):
            Session(folder, context=1024)
        assert_given_back(gpu)


def test_an_engine_that_cannot_be_opened_is_an_error(tiny_bundle: Path, tmp_path: Path, gpu: HostDriver) -> None:
    with pytest.raises(ArtifactError, match="cannot be deserialised here: no plan of any version"):
        Session(make_bundle(tiny_bundle, tmp_path, plan="no engine"), context=256)
    assert_given_back(gpu)


def test_a_session_serves_threads_that_it_was_not_opened_on(tiny_bundle: Path, tmp_path: Path, gpu: HostDriver) -> None:
    """Every call that reaches the driver, each from a thread of its own; none of them keeps the context."""
    folder, left = make_bundle(tiny_bundle, tmp_path), []

    def elsewhere(call: Callable[[], Any]) -> Any:
        def run() -> Any:
            found = call()
            left.append(list(gpu.contexts))
            return found

        with ThreadPoolExecutor(1) as pool:
            return pool.submit(run).result()

    session = elsewhere(lambda: Session(folder, context=256, batch=2))
    new = elsewhere(lambda: session.generate(PROMPTS, max_new_tokens=4))
    snapshot = elsewhere(session.snapshot)
    after = elsewhere(lambda: session.decode([65, 66]))
    elsewhere(lambda: session.restore(snapshot))
    np.testing.assert_array_equal(elsewhere(lambda: session.decode([65, 66])), after)
    elsewhere(session.reset)
    assert elsewhere(lambda: session.generate(PROMPTS, max_new_tokens=4)) == new
    gpu.cuCtxPushCurrent(5)  # the caller's own context stays the caller's
    session.decode([65, 66])
    assert gpu.contexts == [5]
    gpu.cuCtxPopCurrent()
    elsewhere(session.close)
    assert left == [[]] * len(left)
    assert_given_back(gpu)


def test_a_reset_leaves_nothing_of_the_text_on_the_gpu(tiny_bundle: Path, tmp_path: Path, gpu: HostDriver) -> None:
    """Neither in the state, nor in the second buffers of what is not updated in place, nor in those of inputs and logits."""
    folder = make_bundle(tiny_bundle, tmp_path)
    with Session(folder, context=256, batch=2) as session:
        fresh = [block.clone() for block in gpu.blocks.values()]
        session.generate(PROMPTS, max_new_tokens=5)
        assert any(not torch.equal(new, old) for new, old in zip(gpu.blocks.values(), fresh, strict=False))
        session.reset()
        after = list(gpu.blocks.values())
        for new, old in zip(after, fresh, strict=False):
            assert torch.equal(new, old)
        assert len(after) > len(fresh) and not any(block.any() for block in after[len(fresh) :])


def test_another_gpu_or_another_version_is_told(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_bundle(tiny_bundle, tmp_path)
    monkeypatch.setattr(bundle_module, "device_capability", lambda: 90)
    with pytest.raises(MissingDependencyError, match=r"a GPU of compute capability 8\.0; the one here has 9\.0"):
        Session(folder, context=256)
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(bundle_module, "device_capability", lambda: 80)
    monkeypatch.setattr(cuda_module, "cuda_driver", HostDriver)
    with pytest.raises(MissingDependencyError, match=r"was built by tensorrt-rtx 1\.0; 1\.7.* is installed"):
        Session(folder, context=256)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_device_buffers_hold_what_host_buffers_hold(dtype: str) -> None:
    fill = 0 if dtype == "int8" else -1.5
    spec = StateSpec(
        (
            StateTensor("0.window", 0, "window", "past.0", "present.0", 8, None, 6, dtype, fill),
            StateTensor("0.entries", 0, "entries", "past.1", "present.1", None, 4, 6, dtype, fill),
        )
    )
    driver, names = HostDriver(), [tensor.name for tensor in spec.tensors]
    ours, theirs = DeviceBuffers(Device(driver), spec, 64, 3, in_place=names), StateBuffers(spec, 64, 3)
    assert ours.bytes == theirs.bytes == sum(block.numel() for block in driver.blocks.values())
    rng = np.random.default_rng(0)
    written = tuple(
        tuple(rng.integers(0, 100, copy.shape).astype(copy.dtype) for copy in slot)
        for slot in (theirs.copy_slot(0, 40), theirs.copy_slot(1, 11), theirs.copy_slot(2, 40))
    )
    for buffers in (ours, theirs):
        for slot, rows in enumerate(written):
            buffers.put_slot(slot, rows)
        buffers.clear(1, 9)
    for slot in range(3):
        for one, other in zip(ours.copy_slot(slot, 64), theirs.copy_slot(slot, 64), strict=True):
            np.testing.assert_array_equal(one, other)
    ours.close()
    assert driver.blocks == {}


@pytest.mark.parametrize("module", ["tensorrt_rtx", "tensorrt_lean_bindings"])
def test_the_libraries_have_what_the_executor_uses(module: str) -> None:
    trt: Any = pytest.importorskip(module)
    for name, members in {
        "Runtime": ["deserialize_cuda_engine"],
        "ICudaEngine": [
            "create_execution_context",
            "get_tensor_location",
            "num_io_tensors",
            "get_tensor_name",
            "get_tensor_mode",
            "get_tensor_shape",
        ],
        "IExecutionContext": [
            "set_input_shape",
            "set_tensor_address",
            "execute_async_v3",
            "set_optimization_profile_async",
            "update_device_memory_size_for_shapes",
            "set_device_memory",
        ],
        "ILogger": ["log"],
        "TensorLocation": ["HOST"],
        "TensorIOMode": ["INPUT"],
        "ExecutionContextAllocationStrategy": ["USER_MANAGED"],
    }.items():
        assert all(hasattr(getattr(trt, name), member) for member in members), name
    driver = importlib.import_module("cuda.bindings.driver")
    calls = [name for name in vars(HostDriver) if name.startswith("cu")]
    assert calls and all(hasattr(driver, name) for name in calls)


class Failing:
    """A driver of which one call fails: the ``number``th of those that can. Without a context nothing can be given back."""

    _NEVER = ("cuGetErrorName", "cuCtxPopCurrent", "cuCtxPushCurrent", "Free", "Destroy", "Release", "Unload")

    def __init__(self, driver: HostDriver, number: int) -> None:
        self.driver, self.number, self.names = driver, number, list[str]()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.driver, name)
        if not name.startswith("cu") or any(word in name for word in self._NEVER):
            return found

        def call(*arguments: Any) -> Any:
            self.names.append(name)
            if len(self.names) - 1 == self.number:
                return CUresult.CUDA_ERROR_INVALID_VALUE, 0
            return found(*arguments)

        return call


def test_whatever_fails_half_way_is_an_error_and_everything_is_given_back(
    tiny_bundle: Path, tmp_path: Path, gpu: HostDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening on two GPUs that do not reach each other, a chunk, a step, a snapshot."""
    folder = make_bundle(tiny_bundle, tmp_path)
    gpu.devices, gpu.peers = 2, False

    def use(number: int) -> Failing:
        failing = Failing(gpu, number)
        monkeypatch.setattr(cuda_module, "cuda_driver", lambda: failing)
        with Session(folder, context=64, devices=[0, 1]) as session:
            session.prefill([[65, 66, 67]])
            session.decode([68])
            session.snapshot()
        return failing

    names = use(-1).names
    assert_given_back(gpu)
    chosen = {names.index(name) for name in names} | set(range(0, len(names), max(1, len(names) // 8)))
    raised = 0
    for number in sorted(chosen):
        try:
            use(number)
        except FoldkvError:
            raised += 1
        assert_given_back(gpu)
    assert raised > len(chosen) * 3 / 4, "the rest are calls of the end, of which nobody needs the result"


def test_errors_are_told_to_the_thread_whose_call_failed() -> None:
    trt = library(HostDriver())
    logger = engine_module.library_logger(trt)
    severity = type("Severity", (), {"ERROR": "Severity.ERROR", "INFO": "Severity.INFO"})

    def asking() -> str:
        logger.forget()
        logger.log(severity.ERROR, "theirs\nin two lines")
        logger.log(severity.INFO, "no error")
        return str(logger.reasons())

    logger.forget()
    logger.log(severity.ERROR, "ours")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(asking).result() == "theirs in two lines"
        pool.submit(logger.log, severity.ERROR, "still theirs").result()
    assert logger.reasons() == "ours"
    assert logger.reasons() == "the library gave no reason", "another thread that asks for itself has the rest"
    with ThreadPoolExecutor(1) as pool:  # a thread of the library's own never asks
        pool.submit(logger.log, severity.ERROR, "from inside").result()
    assert logger.reasons() == "from inside"
