"""What calls launch: scratch memory and grids, as arithmetic; the kernels themselves are run in test_kernels.py."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldkv.plugins.launch import kernels, largest_workspace, plan

STATIC = {"W": 128, "H": 64, "D": 512, "P": 32, "K": 512, "topk": 512} | {
    "N": 4,
    "C": 4096,
    "J": 24,
    "NC": 16384,
    "X": 256,
}
CALLS = {
    "FoldkvIndexSelect": {"ratio": 4, "topk": 512},
    "FoldkvWindowAttention": {},
    "FoldkvSparseAttention": {},
    "FoldkvDenseAttention": {"ratio": 128},
    "FoldkvHcPre": {"norm_eps": 1e-6, "iterations": 20, "eps": 1e-6},
    "FoldkvRoute": {"topk": 6, "scaling": 1.5, "weight_format": "bfloat16"},
}
OPTIONS = {"sm": 90, "dtype": "bfloat16"}
LARGEST = {"B": 64, "S": 300, "E": 300_000, "M": 64 * 300}
SIZES = st.fixed_dictionaries({name: st.integers(1, largest) for name, largest in LARGEST.items()})


@pytest.mark.parametrize("operator", CALLS)
@given(largest=SIZES, share=st.tuples(*[st.floats(0, 1)] * 4))
def test_no_call_takes_more_scratch_memory_than_the_largest_sizes_say(
    operator: str, largest: dict[str, int], share: tuple[float, ...]
) -> None:
    """An engine is told once, for its largest sizes; a chunk of one token needs it, the largest chunk may not."""
    attributes = CALLS[operator]
    told = largest_workspace(operator, STATIC | largest, attributes, **OPTIONS)
    for chunk in (1, 8, 9):
        sizes = {name: max(1, round(part * size)) for part, (name, size) in zip(share, largest.items(), strict=True)}
        for smaller in (sizes, sizes | {"S": min(chunk, largest["S"])}):
            assert plan(operator, STATIC | smaller, attributes, **OPTIONS).workspace <= told


def test_an_engine_for_long_chunks_has_scratch_memory_for_short_ones() -> None:
    sizes = STATIC | {"B": 1, "S": 256, "E": 8192}
    assert plan("FoldkvDenseAttention", sizes, {"ratio": 128}, **OPTIONS).workspace == 0
    assert largest_workspace("FoldkvDenseAttention", sizes, {"ratio": 128}, **OPTIONS) > 0


@pytest.mark.parametrize("operator", [*CALLS, "FoldkvIndexScores"])
@given(sizes=SIZES)
def test_every_kernel_that_a_call_can_launch_is_foretold(operator: str, sizes: dict[str, int]) -> None:
    attributes = CALLS.get(operator, {"ratio": 4})
    foretold = set(kernels(operator, STATIC, attributes, **OPTIONS))
    assert {one.kernel for one in plan(operator, STATIC | sizes, attributes, **OPTIONS).launches} <= foretold
