"""Every kernel on the GPU that is here, against the operator's definition: correct, deterministic, batch invariant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import FORMS, ROTARY, Case, make_case

from foldkv.plugins.compile import compile_kernels
from foldkv.plugins.cuda import KernelImage, Launcher, device_capability
from foldkv.plugins.launch import plan

SM = device_capability()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(SM is None or not torch.cuda.is_available(), reason="needs an NVIDIA GPU and torch with CUDA"),
]
SPLITS: list[tuple[str, dict[str, int]]] = [
    ("FoldkvWindowAttention", {"window": 200}),
    ("FoldkvSparseAttention", {"topk": 200, "capacity": 300}),
    ("FoldkvDenseAttention", {"capacity": 640}),
]


def run(case: Case, repeats: int = 1) -> list[Sequence[torch.Tensor]]:
    """The outputs of every repeat, each on fresh inputs, on the host."""
    assert SM is not None
    torch.cuda.init()
    torch.zeros(1, device="cuda")  # makes the context that the launcher loads into
    steps = plan(case.operator, case.sizes, case.attributes, sm=SM, dtype="bfloat16", rows=case.rows, rotary=ROTARY)
    compiled = compile_kernels([(one.kernel, SM) for one in steps.launches])
    launcher = Launcher(KernelImage(c.kernel.name, c.entry, c.threads, c.shared, c.cubin) for c in compiled)
    results = []
    for _ in range(repeats):
        inputs, outputs = case.outputs()
        placed = {tensor.data_ptr(): tensor.cuda() for tensor in (*inputs, *outputs)}  # what is in place stays so
        on = [[placed[tensor.data_ptr()] for tensor in tensors] for tensors in (inputs, outputs)]
        workspace = torch.full((1 + steps.workspace // 4,), torch.nan, device="cuda")
        launcher.launch(
            steps, [t.data_ptr() for t in on[0]], [t.data_ptr() for t in on[1]], workspace=workspace.data_ptr(),
            stream=torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
        torch.cuda.synchronize()
        results.append([tensor.cpu() for tensor in on[1]])
    launcher.close()
    return results


@pytest.mark.parametrize("chunk", [1, 11])
@pytest.mark.parametrize(("operator", "rows"), FORMS)
def test_every_operator(operator: str, rows: str, chunk: int) -> None:
    case = make_case(operator, rows, start=[43, 7], real=[chunk, 1], chunk=chunk)
    case.check(run(case)[0])


@pytest.mark.parametrize(("operator", "sizes"), SPLITS)
def test_split_attention(operator: str, sizes: dict[str, Any]) -> None:
    case = make_case(operator, start=[5000, 700], real=[1, 1], chunk=1, **sizes)
    case.check(run(case)[0])


@pytest.mark.parametrize(("operator", "rows"), FORMS)
def test_a_hundred_runs_give_the_same_bits(operator: str, rows: str) -> None:
    case = make_case(operator, rows, start=[43, 7, 90], real=[1, 1, 1], chunk=1)
    first, *others = run(case, repeats=100)
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert torch.equal(one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8))
