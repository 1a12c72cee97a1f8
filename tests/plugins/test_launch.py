"""What calls launch: scratch memory and grids, as arithmetic; the kernels themselves are run in test_kernels.py."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldkv.plugins.launch import kernels, largest_workspace, plan

STATIC = {"W": 128, "H": 64, "D": 512, "P": 32, "K": 512, "topk": 512}
CALLS = {
    "FoldkvIndexSelect": {"ratio": 4, "topk": 512},
    "FoldkvWindowAttention": {},
    "FoldkvSparseAttention": {},
    "FoldkvDenseAttention": {"ratio": 128},
}
OPTIONS = {"sm": 90, "dtype": "bfloat16"}
SIZES = st.fixed_dictionaries({"B": st.integers(1, 64), "S": st.integers(1, 300), "E": st.integers(1, 300_000)})


@pytest.mark.parametrize("operator", CALLS)
@given(largest=SIZES, share=st.tuples(*[st.floats(0, 1)] * 3))
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
