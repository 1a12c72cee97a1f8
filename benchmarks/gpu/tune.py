"""Other tiles for the kernels that take the most time: which fit, and which are fastest on the GPU that is here.

``tune.py compile`` compiles every candidate into the parcel, without a GPU, and says what does not fit; ``tune.py measure -o
OUT/tune.json`` times them beside the tiles in use. What is chosen is written into plugins/launch.py by hand.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import click
import kit
import step_speed
import torch
from cases import models
from device import Device, gpu

from foldkv.errors import BuildError
from foldkv.export.contract.rows import DENSE, FP8_DS_MLA, INDEX_FP4, INDEX_FP8
from foldkv.plugins import launch
from foldkv.plugins.compile import CompiledKernel, compile_kernels, store_kernels
from foldkv.plugins.launch import _ScoreTile, _SelectTile, _Tile
from foldkv.plugins.plans import Kernel

#: Values of names in plugins/launch.py; a value of a function's name is what the function gives.
Candidate = dict[str, Any]


def candidates(operator: str, rows: str) -> Iterator[Candidate]:
    """Nothing first: the tiles in use."""
    yield {}
    packed = rows != DENSE
    if operator == "FoldkvIndexScores":
        for span, block, warps, stages in itertools.product((256, 512, 1024, 2048), (64, 128), (4, 8), (2, 3, 4)):
            if not (packed and stages > 2):
                yield {"_score_tile": _ScoreTile(block, warps, stages), "SCORE_SPANS": (span,)}
    elif operator == "FoldkvIndexSelect":
        for block, parts, warps in itertools.product((1024, 2048), (16, 64), (4, 8, 16)):
            for programs in (256, 512):
                yield {
                    "_select_tile": _SelectTile(block, parts, warps),
                    "SELECT_SPAN": 2048,
                    "SELECT_PROGRAMS": programs,
                }
    elif operator.endswith("Attention"):
        sparse = operator == "FoldkvSparseAttention"
        spans = (64, 128, 256, 640) if sparse else (128, 256, 512)
        for tile, span in itertools.product(PACKED_TILES if packed else DENSE_TILES, spans):
            yield {"_attention_tile": tile, "SPARSE_SPAN" if sparse else "DENSE_SPAN": span}


#: Heads, keys, warps, stages, whether the query is parked.
DENSE_TILES = (
    _Tile(64, 64, 8, 2, True), _Tile(64, 64, 8, 1, True), _Tile(32, 32, 4, 2), _Tile(16, 64, 4, 2), _Tile(32, 64, 8, 2),
)  # fmt: skip
PACKED_TILES = (_Tile(64, 32, 8, 1, True), _Tile(64, 16, 8, 1, True), _Tile(16, 64, 8, 1))


CASES = (
    ("FoldkvIndexSelect", DENSE), ("FoldkvIndexScores", DENSE), ("FoldkvSparseAttention", DENSE),
    ("FoldkvDenseAttention", DENSE), ("FoldkvIndexScores", INDEX_FP4), ("FoldkvIndexScores", INDEX_FP8),
    ("FoldkvSparseAttention", FP8_DS_MLA), ("FoldkvDenseAttention", FP8_DS_MLA),
)  # fmt: skip
#: Contexts, batches and chunks at which candidates are compared.
PLACES = ((1 << 16, 1, 1), (1 << 20, 1, 1), (1 << 16, 16, 1), (1 << 20, 16, 1), (1 << 18, 64, 1), (1 << 16, 1, 256))


@contextlib.contextmanager
def using(candidate: Candidate) -> Iterator[None]:
    """Plan with a candidate's tiles."""
    with contextlib.ExitStack() as stack:
        for name, value in candidate.items():
            new = (lambda call, value=value: value) if name.startswith("_") else value
            stack.enter_context(mock.patch.object(launch, name, new))
        yield


@click.group()
def main() -> None:
    """Compile or measure."""


@main.command("compile")
@click.option("--sm", default=90, show_default=True)
@click.option("--model", "name", default="v4-flash", show_default=True)
@click.option("--only", default="", help="Operators whose name ends so.")
def compile_(sm: int, name: str, only: str) -> None:
    """Compile every candidate into the parcel."""
    geometry = next(geometry for geometry, _ in models(kit.ROOT) if geometry.name == name)
    host = Device("cpu", sm, None)
    wanted: dict[Any, str] = {}
    for operator, rows in CASES:
        if not operator.endswith(only):
            continue
        calls = [
            step_speed.make(host, operator, rows, geometry, *place) for place in ((1 << 16, 1, 1), (1 << 12, 1, 256))
        ]
        for candidate in candidates(operator, rows):
            with using(candidate):
                for call in calls:
                    for one in step_speed.steps_of(call, sm).launches:
                        wanted.setdefault(one.kernel, f"{operator} {rows} {candidate}")
    start, kernels = time.monotonic(), list(wanted)
    for i in range(0, len(kernels), 8):
        some = kernels[i : i + 8]
        try:
            done = compile_kernels([(kernel, sm) for kernel in some])
        except BuildError:
            done = [one for kernel in some for one in _alone(kernel, sm, wanted[kernel])]
        store_kernels(done, kit.parcel())
        for one in done:
            if one.spills:
                click.echo(f"{wanted[one.kernel]}: {one.registers} registers, {one.spills} B spilled")
        click.echo(f"{i + len(some)} of {len(kernels)} in {time.monotonic() - start:.0f} s")


def _alone(kernel: Kernel, sm: int, candidate: str) -> list[CompiledKernel]:
    """The kernel, or a line that says why there is none."""
    try:
        return compile_kernels([(kernel, sm)])
    except BuildError as error:
        click.echo(f"{candidate}: {str(error)[:200]}")
        return []


@main.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--model", "name", default="v4-flash", show_default=True)
@click.option("--seconds", default=100.0, show_default=True)
def measure(output: Path, name: str, seconds: float) -> None:
    """Time every candidate that the parcel holds."""
    end = time.monotonic() + seconds
    with kit.recorded(output, "tune", "microseconds of candidates for tiles") as recorder:
        geometry = next(geometry for geometry, _ in models(kit.ROOT) if geometry.name == name)
        device = gpu()
        for operator, rows in CASES:
            if time.monotonic() > end:
                break
            calls = {place: step_speed.make(device, operator, rows, geometry, *place) for place in PLACES}
            for candidate in candidates(operator, rows):
                if time.monotonic() > end:
                    break
                row: dict[str, Any] = {"operator": operator, "rows": rows, "candidate": str(candidate)}
                with using(candidate):
                    try:
                        for place, call in calls.items():
                            run, steps = step_speed.ours(device, call)
                            row[f"{place[0] >> 10}k x {place[1]} x {place[2]}"] = step_speed.replay(device, [run]) * 1e6
                            row["launches"] = len(steps.launches)
                    except (BuildError, RuntimeError) as error:
                        row["refused"] = str(error)[:200]
                recorder.add(row)
            calls.clear()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
