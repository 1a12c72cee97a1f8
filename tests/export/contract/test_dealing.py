"""Dealing segments out over GPUs: against every possible way."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldkv.errors import InputError
from foldkv.export.contract.dealing import deal


def fullest(costs: list[int], rooms: list[int], owners: tuple[int, ...]) -> float:
    return max(
        sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == number) / room
        for number, room in enumerate(rooms)
    )


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_the_fullest_gpu_is_as_empty_as_it_can_be(costs: list[int], rooms: list[int]) -> None:
    if len(rooms) > len(costs):
        with pytest.raises(InputError, match=f"{len(rooms)} GPUs for a model of {len(costs)} segments"):
            deal(costs, rooms)
        return
    owners = deal(costs, rooms)
    assert list(owners) == sorted(owners) and set(owners) == set(range(len(rooms))), "in a row, and none without work"
    ways = []
    for cuts in combinations(range(1, len(costs)), len(rooms) - 1):
        ends = [0, *cuts, len(costs)]
        ways.append(tuple(n for n, (low, high) in enumerate(pairwise(ends)) for _ in range(low, high)))
    assert fullest(costs, rooms, owners) == min(fullest(costs, rooms, way) for way in ways)
