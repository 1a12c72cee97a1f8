"""A bundle for ONNX Runtime's CUDA provider, run as on a GPU, over a stand-in for it whose memory is the host's.

The provider needs a GPU, so the processor's computes the segments: what is checked is the graphs, and that everything is bound to
addresses, filled, copied and freed as a GPU needs it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from gpus import HostDriver

from foldkv.backends import ONNX_RUNTIME, ONNX_RUNTIME_CUDA
from foldkv.errors import EXIT_ENVIRONMENT, FoldkvError, InputError, MissingDependencyError
from foldkv.export.contract.chain import STEP
from foldkv.optimize.build import build_bundles
from foldkv.optimize.targets import resolve_targets
from foldkv.plugins.cuda import Device
from foldkv.runtime.bundle import load_bundle
from foldkv.runtime.chain import ChainModel
from foldkv.runtime.chain_executor import ChainExecutor
from foldkv.runtime.chain_memory import DeviceMemory
from foldkv.runtime.session import Session

CONTEXT, PROMPT = 128, [[84, 104, 101, *range(40, 73)], [65, 66, 67, *range(50, 83)]]


def build(graph: Path, folder: Path, **options: Any) -> tuple[Path, Path]:
    """The bundles of a graph for ONNX Runtime CUDA and for the cpu."""
    report = build_bundles(graph, folder, resolve_targets(["h100", "cpu"], ONNX_RUNTIME_CUDA.name), **options)
    assert report.exit_code == 0, report.results
    return report.results[0].folder, report.results[1].folder


@pytest.fixture(scope="module")
def cuda_bundle(tiny_graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tiny_graph, tmp_path_factory.mktemp("cuda"))[0]


@pytest.fixture
def driver() -> HostDriver:
    return HostDriver(host_addresses=True)


def opened(folder: Path, driver: HostDriver) -> ChainModel:
    """The bundle on the stand-in, computed by the processor's provider."""
    bundle = dataclasses.replace(load_bundle(folder), backend=ONNX_RUNTIME)
    return ChainModel(bundle, memory=DeviceMemory(onnxruntime, Device(driver), kind="cpu"))


def run(executor: ChainExecutor, tokens: list[list[int]], position: int, **more: Any) -> np.ndarray:
    """Feed a chunk to sequences at the same position; the logits [B, V] of its last token."""
    ids, size = np.array(tokens), len(tokens[0])
    positions, counts = np.full(len(tokens), position), np.full(len(tokens), size)
    last = np.full((len(tokens), 1), size - 1)
    return np.array(executor.run(ids, positions, counts, position + size, last, **more)[:, 0])


def test_a_bundle_for_a_gpu_computes_what_the_cpu_bundle_computes(
    cuda_bundle: Path, tiny_bundle: Path, driver: HostDriver
) -> None:
    model = opened(cuda_bundle, driver)
    weights = len(driver.blocks)
    assert weights == sum(map(len, model.weights.values()))
    executor = ChainExecutor(model, CONTEXT, 2)
    with Session(tiny_bundle, context=CONTEXT, batch=2, chunk=36) as session:
        ours, theirs = run(executor, PROMPT, 0), session.prefill(PROMPT)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
        for step, pair in enumerate([[7, 9], [11, 13]]):
            ours = run(executor, [[token] for token in pair], len(PROMPT[0]) + step, trim=step == 1)
            np.testing.assert_allclose(ours, session.decode(pair), rtol=0, atol=1e-4)
        kept = [executor.buffers.copy_slot(slot, 38) for slot in range(2)]
        executor.buffers.clear(0, 38)
        run(executor, [[3], [3]], 38)
        for slot, rows in enumerate(kept):
            executor.buffers.put_slot(slot, rows)
        np.testing.assert_allclose(run(executor, [[5], [6]], 38), session.decode([5, 6]), rtol=0, atol=1e-4)
    executor.forget()
    small = [tensor for lane in executor._lanes.values() for tensor in lane.tensors()]
    assert not any(tensor.host.any() for tensor in small)
    assert not any(driver.blocks[tensor._address].any() for tensor in small)  # type: ignore[attr-defined]
    executor.close()
    executor.close()
    assert len(driver.blocks) == weights
    model.close()
    model.close()
    assert not driver.blocks and driver.opened["context"] == 0


@pytest.mark.parametrize("stored", ["float32, packed rows", "e4m3 and e2m1", "e4m3 and e2m1, not placed"])
def test_packed_rows_and_weights_as_stored_give_what_they_give_on_the_cpu(
    stored: str, served_graph: Path, released_graph: Callable[[str], Path], tmp_path: Path, driver: HostDriver
) -> None:
    rows = "packed rows" in stored
    options = {"layout": "fp8+fp4"} if rows else {"place": "not placed" not in stored}
    ours, theirs = build(served_graph if rows else released_graph("instruct"), tmp_path, **options)
    types = {tensor.dtype for tensor in load_bundle(ours).state.tensors}
    assert ("int8" in types) == rows
    model = opened(ours, driver)
    executor = ChainExecutor(model, CONTEXT, 2)
    with Session(theirs, context=CONTEXT, batch=2, chunk=36) as session:
        np.testing.assert_allclose(run(executor, PROMPT, 0), session.prefill(PROMPT), rtol=0, atol=1e-4)
        step = run(executor, [[7], [9]], len(PROMPT[0]))
        np.testing.assert_allclose(step, session.decode([7, 9]), rtol=0, atol=1e-4)
    executor.close()
    model.close()


def test_what_a_segment_reads_on_the_host_is_copied_there_after_the_step(
    cuda_bundle: Path, tiny_bundle: Path, driver: HostDriver
) -> None:
    model = opened(cuda_bundle, driver)
    made = set(model.outputs[STEP])
    model.on_host = {name: frozenset(inputs) & (made | {"active_context"}) for name, inputs in model.inputs.items()}
    executor = ChainExecutor(model, CONTEXT, 2)
    with Session(tiny_bundle, context=CONTEXT, batch=2, chunk=36) as session:
        theirs = [session.prefill(PROMPT), session.decode([7, 9])]
    ours = [run(executor, PROMPT, 0), run(executor, [[7], [9]], len(PROMPT[0]))]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    # Without the copies the segments read what the arrays were made with: zeros.
    for lane in executor._lanes.values():
        lane._read = []
        for name in made:
            lane._made[name].host.fill(0)
    with pytest.raises(FoldkvError, match=r"ONNX Runtime failed in layers\.0"):
        run(executor, [[5], [6]], len(PROMPT[0]) + 1)
    executor.close()
    model.close()


def test_a_gpu_without_memory_is_said_and_frees_what_was_taken(cuda_bundle: Path) -> None:
    small = HostDriver(limit=1 << 20, host_addresses=True)
    with pytest.raises(InputError, match="the GPU has no memory for a tensor of"):
        opened(cuda_bundle, small)
    assert not small.blocks and small.opened["context"] == 0


def test_without_the_provider_the_bundle_is_refused_with_the_line_that_installs_it(cuda_bundle: Path) -> None:
    with pytest.raises(MissingDependencyError) as error:
        Session(cuda_bundle, context=64)
    text = str(error.value)
    assert error.value.exit_code == EXIT_ENVIRONMENT and "pip install 'foldkv[cuda]'" in text
    assert "an NVIDIA GPU with its driver" in text and "pip uninstall -y onnxruntime &&" in text
    with pytest.raises(
        MissingDependencyError, match="needs ONNX Runtime's CUDAExecutionProvider; this ONNX Runtime has"
    ):
        ChainModel(load_bundle(cuda_bundle))
