"""Every kernel on the GPU that is here, against the operator's definition. benchmarks/gpu has more, at real shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import FORMS, make_case
from device import Device, gpu, run, same_bits

from foldkv.plugins.cuda import device_capability

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        device_capability() is None or not torch.cuda.is_available(), reason="needs an NVIDIA GPU and torch with CUDA"
    ),
]
SPLITS: list[tuple[str, dict[str, int]]] = [
    ("FoldkvWindowAttention", {"window": 200}),
    ("FoldkvSparseAttention", {"topk": 200, "capacity": 300}),
    ("FoldkvDenseAttention", {"capacity": 640}),
    ("FoldkvIndexSelect", {"capacity": 5000}),
]


@pytest.fixture(scope="module")
def device() -> Device:
    return gpu()


@pytest.mark.parametrize("chunk", [1, 11])
@pytest.mark.parametrize(("operator", "rows"), FORMS)
def test_every_operator(device: Device, operator: str, rows: str, chunk: int) -> None:
    case = make_case(operator, rows, start=[43, 7], real=[chunk, 1], chunk=chunk)
    steps = case.plan(sm=device.sm)
    case.check(run(device, device.load([steps]), case, steps))


@pytest.mark.parametrize(("operator", "sizes"), SPLITS)
def test_what_is_split_over_programs(device: Device, operator: str, sizes: dict[str, Any]) -> None:
    case = make_case(operator, start=[5000, 700], real=[1, 1], chunk=1, **sizes)
    steps = case.plan(sm=device.sm)
    assert len(steps.launches) > 1
    case.check(run(device, device.load([steps]), case, steps))


@pytest.mark.parametrize(("operator", "rows"), FORMS)
def test_a_hundred_runs_give_the_same_bits(device: Device, operator: str, rows: str) -> None:
    case = make_case(operator, rows, start=[43, 7, 90], real=[1, 1, 1], chunk=1)
    steps = case.plan(sm=device.sm)
    launcher = device.load([steps])
    first = run(device, launcher, case, steps)
    assert all(same_bits(run(device, launcher, case, steps), first) for _ in range(99))
