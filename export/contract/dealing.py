"""Which GPU has which segments of a model: segments in a row, so that no GPU is fuller than it must be. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import InputError


def deal(costs: Sequence[int], rooms: Sequence[int]) -> tuple[int, ...]:
    """The GPU of every segment, in order: of all ways to cut the chain, the one whose fullest GPU is the least full.

    Only the streams go from one GPU to the next, so the cuts are free to be anywhere. Every GPU gets at least one segment.

    Args:
        costs: bytes that each segment of the chain takes on its GPU.
        rooms: bytes that each GPU has.

    Raises:
        InputError: there are more GPUs than segments, or none.
    """
    if not 1 <= len(rooms) <= len(costs):
        raise InputError(
            f"{len(rooms)} GPUs for a model of {len(costs)} segments; expected 1 to {len(costs)}: each has one or more."
        )
    before = [0]
    for cost in costs:
        before.append(before[-1] + cost)
    # best[n]: how full the fullest is if the first GPUs have n segments, and where the last of them begins.
    best: list[tuple[float, int]] = [(0.0, 0)] + [(float("inf"), 0)] * len(costs)
    cuts: list[list[int]] = []
    for number, room in enumerate(rooms):
        after = len(rooms) - number - 1  # GPUs that need a segment too
        now = [(float("inf"), 0)] * (len(costs) + 1)
        for end in range(number + 1, len(costs) - after + 1):
            now[end] = min(
                (max(best[start][0], (before[end] - before[start]) / max(room, 1)), start)
                for start in range(number, end)
            )
        best = now
        cuts.append([start for _, start in now])
    ends, owners = len(costs), [0] * len(costs)
    for number in reversed(range(len(rooms))):
        start = cuts[number][ends]
        owners[start:ends] = [number] * (ends - start)
        ends = start
    return tuple(owners)
