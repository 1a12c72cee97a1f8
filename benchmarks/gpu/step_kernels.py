"""Every kernel of every operator on the GPU against its definition in float64, at the shapes of three models.

``python benchmarks/gpu/step_kernels.py -o OUT/kernels.json``. The expected values are in the parcel (``prepare.py``); inputs are
drawn again and compared by digest. With ``--no-check`` the kernels run once each and nothing is compared: for compute-sanitizer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import kit
from cases import Case, Expectation, drawn, load_expectations, model_forms, models
from device import Device, gpu, run

from foldkv.errors import FoldkvError

WHAT = "every operator's kernels in every row format, against definitions in float64; unread rows hold NaN"


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--model", "names", multiple=True, help="Only this model; the default is all.")
@click.option("--check/--no-check", default=True, show_default=True)
def main(output: Path, names: tuple[str, ...], check: bool) -> None:
    """Run the step."""
    with kit.recorded(output, "kernels", WHAT) as recorder:
        measure(recorder, gpu, names=names, check=check)


def measure(
    recorder: kit.Recorder,
    open_device: Callable[[], Device],
    *,
    names: tuple[str, ...] = (),
    check: bool = True,
    only: str = "",
) -> None:
    """One row per form of every model.

    Args:
        recorder: of the step.
        open_device: called once everything that needs no GPU was read.
        names: of the models; empty for all.
        check: compare the outputs.
        only: shapes to run ("token", ...); empty for all.

    Raises:
        RuntimeError: the parcel is of an older version and lacks what is expected of a form.
    """
    todo = []
    for geometry, spec in models(kit.ROOT):
        if names and geometry.name not in names:
            continue
        forms = model_forms(spec, geometry, million=geometry.name == "v4-flash")
        forms = [form for form in forms if not only or form.shape == only]
        expected = load_expectations(expectation_file(geometry.name)) if check else {}
        missing = [form.name for form in forms if check and form.name not in expected]
        if missing:
            raise RuntimeError(f"the parcel lacks {geometry.name} {', '.join(missing)}: run prepare.py again")
        todo.append((geometry, forms, expected))
    device = open_device()
    for geometry, forms, expected in todo:
        for form, case in drawn(forms, geometry):
            row = {"model": geometry.name, "operator": form.operator, "group": form.group, "rows": form.row_format,
                   "shape": form.shape}  # fmt: skip
            try:
                row |= _one(device, case, expected.get(form.name))
                recorder.add(row)
            except (AssertionError, FoldkvError, RuntimeError) as error:
                recorder.add(row, failure=f"{geometry.name} {form.name}: {str(error)[:400]}")
                if "illegal" in str(error).lower() or "misaligned" in str(error).lower():
                    raise  # the context is lost: everything after it would fail too


def _one(device: Device, case: Case, expected: tuple[str, list[Expectation]] | None) -> dict[str, object]:
    if expected is not None and expected[0] != case.digest():
        raise AssertionError("the inputs drawn here are not those of the parcel")
    steps = case.plan(sm=device.sm)
    outputs = run(device, device.load([steps]), case, steps)
    report = case.check(outputs, expected[1]) if expected is not None else {}
    return {"launches": len(steps.launches), **report}


def expectation_file(model: str) -> Path:
    """Where the parcel keeps what is expected of a model's forms."""
    return kit.parcel() / "expected" / f"{model}.safetensors"


if __name__ == "__main__":
    main()
