"""Every kernel once under compute-sanitizer: memcheck for accesses outside of tensors, racecheck for shared memory.

``python benchmarks/gpu/step_sanitizer.py -o OUT/sanitizer.json``. torch's allocator is switched off, so each tensor is a
separate allocation, and the memory behind it belongs to none.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click
import kit

from foldkv.errors import MissingDependencyError
from foldkv.plugins.cuda import cuda_driver

WHAT = "compute-sanitizer's memcheck and racecheck over every kernel of the step kernels, nothing compared"
TOOLS = ("memcheck", "racecheck")


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--tool", "tools", type=click.Choice(TOOLS), multiple=True, default=TOOLS, show_default=True)
@click.option("--limit", default=105.0, show_default=True, help="Seconds for all models and tools.")
def main(output: Path, tools: tuple[str, ...], limit: float) -> None:
    """Run the step."""
    with kit.recorded(output, "sanitizer", WHAT) as recorder:
        cuda_driver()
        end = time.monotonic() + limit
        program = shutil.which("compute-sanitizer") or _beside_nvcc()
        for tool in tools:
            for model in ("tiny-v4", "v4-flash", "v4-pro"):
                row, failure = check(
                    program, tool, model, output.with_name(f"{tool}-{model}.json"), max(1, end - time.monotonic())
                )
                recorder.add(row, failure=failure)


def _beside_nvcc() -> str:
    for folder in ("/usr/local/cuda/bin", "/opt/cuda/bin"):
        if Path(folder, "compute-sanitizer").exists():
            return f"{folder}/compute-sanitizer"
    raise MissingDependencyError("compute-sanitizer is not installed; it comes with the CUDA toolkit.")


def check(program: str, tool: str, model: str, result: Path, limit: float) -> tuple[dict[str, object], str]:
    """Run the forms of a model under the tool; a row, and what failed."""
    command = [
        program, "--tool", tool, "--error-exitcode", "77", sys.executable, str(Path(__file__).with_name("step_kernels.py")),
        "-o", str(result), "--model", model, "--no-check",
    ]  # fmt: skip
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=limit, env=environment)
        text, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        parts = (error.stdout or b"", error.stderr or b"")
        text, code = "".join(part if isinstance(part, str) else part.decode(errors="replace") for part in parts), -1
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", text)
    ran = len(re.findall(r'^\{"model"', text, re.MULTILINE))
    row: dict[str, object] = {
        "model": model,
        "tool": tool,
        "forms": ran,
        "errors": int(summary[-1]) if summary else None,
    }
    if code == 0 and summary and not int(summary[-1]) and ran:
        return row, ""
    first = re.findall(r"=+ (?:Invalid|Misaligned|Program hit|Potential|Uninit).*(?:\n=+ .*){0,6}", text)
    why = "out of time" if code == -1 else f"exit code {code}"
    return row | {"output": text[-1500:]}, f"{tool} {model}: {why}; {first[0] if first else text[-200:]}"


if __name__ == "__main__":
    main()
