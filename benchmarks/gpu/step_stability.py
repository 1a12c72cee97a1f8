"""The same bits a hundred times, and whatever the neighbours in the batch.

``python benchmarks/gpu/step_stability.py -o OUT/stability.json``. Needs nothing of the parcel but its kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import kit
import torch
from cases import Case, Form, drawn, model_forms, models
from device import Device, Placed, gpu, run, same_bits

from foldkv.plugins.declarations import PLUGINS

WHAT = "outputs bit by bit: 100 runs of a call, and every sequence of a batch beside the same sequence alone"


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--runs", default=100, show_default=True)
def main(output: Path, runs: int) -> None:
    """Run the step."""
    with kit.recorded(output, "stability", WHAT) as recorder:
        measure(recorder, gpu, runs=runs)


def measure(
    recorder: kit.Recorder, open_device: Callable[[], Device], *, runs: int = 100,
    names: tuple[str, ...] = ("v4-flash", "v4-pro"), shapes: tuple[str, ...] = ("token", "chunk"),
) -> None:  # fmt: skip
    """One row per form of the models ``names``."""
    chosen = [(geometry, spec) for geometry, spec in models(kit.ROOT) if geometry.name in names]
    device = open_device()
    for geometry, spec in chosen:
        forms = [form for form in model_forms(spec, geometry) if form.shape in shapes]
        for form, case in drawn(forms, geometry):
            row, failure = _one(device, form, case, runs)
            recorder.add(row, failure=failure)


def _one(device: Device, form: Form, case: Case, runs: int) -> tuple[dict[str, object], str]:
    steps = case.plan(sm=device.sm)
    alone = [case.alone(b) for b in range(len(form.start))]
    launcher = device.load([steps, *(one.plan(sm=device.sm) for one in alone)])
    first = run(device, launcher, case, steps)
    different = 0
    placed = Placed(device, case, steps)
    fresh = [tensor.clone() for tensor in (*placed.inputs, *placed.outputs)]
    reference = [value.to(device.torch_device) for value in first]
    for _ in range(runs - 1):
        # What is in place has changed: every run starts from the same bits.
        for tensor, value in zip((*placed.inputs, *placed.outputs), fresh, strict=True):
            tensor.copy_(value)
        placed.workspace.fill_(torch.nan)
        placed.launch(launcher)
        different += not same_bits(placed.outputs, reference)
    apart = [
        b for b, one in enumerate(alone)
        if not same_bits(
            _of_batch(case, run(device, launcher, one, one.plan(sm=device.sm))), _of_batch(case, first, b)
        )
    ]  # fmt: skip
    row = {"model": case.geometry.name, "operator": form.operator, "group": form.group, "rows": form.row_format, "shape": form.shape,
           "runs": runs, "different": different, "sequences_that_depend_on_neighbours": apart}  # fmt: skip
    wrong = [f"{different} of {runs} runs gave other bits"] * bool(different)
    wrong += [f"sequences {apart} depend on their neighbours"] * bool(apart)
    return row, f"{case.geometry.name} {form.name}: {'; '.join(wrong)}" if wrong else ""


def _of_batch(case: Case, outputs: list[torch.Tensor], sequence: int | None = None) -> list[torch.Tensor]:
    """The outputs, or one sequence's part of them."""
    if sequence is None:
        return outputs
    declared = PLUGINS[case.operator].outputs
    assert all(tensor.dims[0] in ("B", "M") for tensor in declared)
    return [case.part(tensor, value, sequence) for tensor, value in zip(declared, outputs, strict=True)]


if __name__ == "__main__":
    main()
