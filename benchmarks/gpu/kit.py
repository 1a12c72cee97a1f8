"""What the steps of the GPU kit share: the parcel that they read, and a result file that is whole after every row.

A step is a script. It writes its result at once and again after every row, so that a step that is ended at its time limit
leaves what it had measured; one that fails says why in its file and does not touch the others'.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import subprocess
import tarfile
import time
import traceback
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

import foldkv
from foldkv.errors import MissingDependencyError
from foldkv.plugins.compile import CompiledKernel, compile_kernels
from foldkv.plugins.cuda import KernelImage, device_count
from foldkv.plugins.plans import Plan

ROOT = Path(__file__).parents[2]
#: Where ``prepare.py`` puts the parcel and steps look for it, if FOLDKV_GPU_KIT names no other folder.
DEFAULT_PARCEL = ROOT / "build" / "gpu-kit"
#: Statuses of a step: every check held; one did not; it broke off; there was no GPU; it never came to its end.
PASSED, FAILED, BROKEN, NO_GPU, RUNNING = "passed", "failed", "broken off", "no GPU", "not finished"
_PACKAGES = ("torch", "triton", "numpy", "onnxruntime", "cuda-bindings", "tensorrt_rtx")


def parcel() -> Path:
    """The folder of what was made ready on a machine without a GPU."""
    return Path(os.environ.get("FOLDKV_GPU_KIT", DEFAULT_PARCEL))


class Recorder:
    """The result file of one step."""

    def __init__(self, path: Path, step: str, what: str) -> None:
        """Write the file, with the status "not finished"."""
        self._path, self._start = path, time.monotonic()
        self.content: dict[str, Any] = {
            "step": step, "what": what, "status": RUNNING, "date": time.strftime("%Y-%m-%d"), "driver": driver_version(),
            "versions": versions(), "reasons": [], "rows": [],
        }  # fmt: skip
        self.write()

    def add(self, row: dict[str, Any], *, failure: str = "") -> None:
        """Keep a row, print it, and write the file; ``failure`` says which check did not hold."""
        if failure:
            self.content["reasons"].append(failure)
            row = row | {"failure": failure}
        self.content["rows"].append(row)
        click.echo(json.dumps(row)[:300])
        self.write()

    def fact(self, **facts: Any) -> None:
        """Set facts beside the rows."""
        self.content |= facts
        self.write()

    def write(self) -> None:
        """Write what there is; a reader never sees half a file."""
        self.content["seconds"] = round(time.monotonic() - self._start, 2)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self._path.with_suffix(".part")
        scratch.write_text(json.dumps(self.content, indent=1) + "\n")
        scratch.replace(self._path)


@contextlib.contextmanager
def recorded(path: Path, step: str, what: str) -> Iterator[Recorder]:
    """Run a step: its facts, its status and, whatever it raises, the reason are in ``path`` at the end.

    Exits with 0 if every check held, with 1 otherwise.
    """
    recorder = Recorder(path, step, what)
    status = PASSED
    try:
        yield recorder
    except MissingDependencyError as error:
        status = NO_GPU
        recorder.content["reasons"].append(str(error))
    except BaseException as error:  # noqa: BLE001 - also what native code and an interrupt raise
        status = BROKEN
        recorder.content["reasons"].append(f"{type(error).__name__}: {error}")
        recorder.content["traceback"] = traceback.format_exc()[-4000:]
        traceback.print_exc()
    else:
        if recorder.content["reasons"]:
            status = FAILED
        elif not recorder.content["rows"]:
            status = FAILED
            recorder.content["reasons"].append("nothing was measured")
    recorder.fact(status=status)
    click.echo(f"{step}: {status} in {recorder.content['seconds']} s" + "".join(
        f"\n  {reason}" for reason in recorder.content["reasons"][:5]
    ))  # fmt: skip
    raise SystemExit(status != PASSED)


def no_gpu(recorder: Recorder) -> None:
    """End a step whose checks went as far as they could without a GPU, if there is none.

    Raises:
        MissingDependencyError: there is none, and nothing else went wrong.
    """
    if not device_count() and not recorder.content["reasons"]:
        stopped = [row for row in recorder.content["rows"] if "no_gpu" in row]
        raise MissingDependencyError(
            f"{len(stopped)} checks went as far as the first CUDA call: {stopped[0]['no_gpu'] if stopped else '?'}"
        )


def archive(folder: Path, file: Path) -> None:
    """Pack a folder's content."""
    with tarfile.open(file, "w:xz", preset=9) as packed:
        packed.add(folder, arcname=".")


def driver_version() -> str:
    """The version of NVIDIA's driver, or "" without one."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
        except (OSError, subprocess.SubprocessError, IndexError):
            return ""
    found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else ""


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of what the steps use, as far as they are installed."""
    found = {"python": platform.python_version(), "foldkv": foldkv.__version__}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def images(plans: list[Plan], sm: int) -> list[KernelImage]:
    """The kernels of plans, from the parcel; what it lacks is compiled here.

    Raises:
        MissingDependencyError: Triton is not installed.
    """
    wanted = list(dict.fromkeys(one.kernel for steps in plans for one in steps.launches))
    return [image(kernel) for kernel in compile_kernels([(kernel, sm) for kernel in wanted], cache=parcel())]


def image(kernel: CompiledKernel) -> KernelImage:
    """A compiled kernel as a launcher loads it."""
    return KernelImage(kernel.kernel.name, kernel.entry, kernel.threads, kernel.shared, kernel.cubin)
