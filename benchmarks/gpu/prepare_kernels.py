"""What is expected of every kernel, computed without a GPU in float64, and the kernels compiled for one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cases import model_forms, models, save_expectations

from foldkv.plugins.plans import Kernel

ROOT = Path(__file__).parents[2]


def prepare(folder: Path, progress: Callable[[str], None], *, sm: int) -> list[Kernel]:
    """Write ``expected/MODEL.safetensors`` and return the kernels that the cases launch on compute capability ``sm``."""
    (folder / "expected").mkdir(parents=True, exist_ok=True)
    kernels: dict[Kernel, None] = {}
    for geometry, spec in models(ROOT):
        expected, digests = {}, {}
        for form in model_forms(spec, geometry, million=geometry.name == "v4-flash"):
            case = form.case(geometry)
            expected[form.name], digests[form.name] = case.expect(), case.digest()
            kernels |= dict.fromkeys(one.kernel for one in case.plan(sm=sm).launches)
            progress(f"{geometry.name} {form.name}")
        save_expectations(folder / "expected" / f"{geometry.name}.safetensors", expected, digests)
    return list(kernels)
