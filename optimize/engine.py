"""From an inlined ONNX model to a TensorRT-RTX plan, in a child process, with no GPU needed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from foldkv.errors import BuildError, MissingDependencyError
from foldkv.export.state import StateTensor
from foldkv.optimize.plan import check_plan
from foldkv.optimize.spec import Shapes

_WHEEL = "tensorrt_rtx"


def rtx_version() -> str:
    """The installed TensorRT-RTX version.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return importlib.metadata.version(_WHEEL)
    except importlib.metadata.PackageNotFoundError:
        raise MissingDependencyError(
            "TensorRT-RTX is not installed; engines for GPUs need it. Run `pip install 'foldkv[rtx]'` (no GPU is needed to build)."
        ) from None


def profile_shapes(state: list[StateTensor], shapes: Shapes) -> dict[str, list[list[int]]]:
    """For every graph input: its smallest, typical and largest shape."""
    batch, chunk, context = shapes.batch, shapes.chunk, shapes.context
    table = {
        "input_ids": [[batch[i], chunk[i]] for i in range(3)],
        "positions": [[batch[i]] for i in range(3)],
        "num_tokens": [[batch[i]] for i in range(3)],
        "active_context": [[1]] * 3,
        "logit_indices": [[batch[i], chunk[i]] for i in range(3)],
    }
    for tensor in state:
        table[tensor.input] = [[batch[i], tensor.capacity(context[i]), tensor.width] for i in range(3)]
    return table


def build_plan(
    graph: Path,
    plan: Path,
    *,
    sm: int,
    state: list[StateTensor],
    shapes: Shapes,
    memory_bytes: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Build one plan and write it to ``plan``; returns its header, layer count and peak memory in bytes.

    Raises:
        BuildError: the parser or the builder refused the graph, or the child process died; with the reason.
        MissingDependencyError: TensorRT-RTX is not installed.
    """
    rtx_version()
    with tempfile.TemporaryDirectory(prefix="foldkv-engine-") as folder:
        request = Path(folder) / "request.json"
        values = {"active_context": [1, shapes.context[1], shapes.context[2]]}
        request.write_text(
            json.dumps(
                {"graph": str(graph), "plan": str(plan), "sm": sm, "shapes": profile_shapes(state, shapes),
                 "values": values, "memory_bytes": memory_bytes}
            )
        )  # fmt: skip
        result = _run_child(request, _child_environment(Path(folder)), progress)
    header = check_plan(plan.read_bytes(), sm=sm)
    return {"header": header, "layers": result["layers"], "peak_rss_bytes": result["peak_rss_bytes"]}


def _child_environment(folder: Path) -> dict[str, str]:
    """The environment of the child: the parser opens libtensorrt_rtx.so, the wheel ships only the .so.1."""
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    environment = dict(os.environ)
    if spec is not None and spec.submodule_search_locations:
        library = Path(next(iter(spec.submodule_search_locations))) / "libtensorrt_rtx.so.1"
        if library.exists():
            (folder / "libtensorrt_rtx.so").symlink_to(library)
            paths = [str(folder), environment.get("LD_LIBRARY_PATH", "")]
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(path for path in paths if path)
    return environment


def _run_child(request: Path, environment: Mapping[str, str], progress: Callable[[str], None]) -> dict[str, Any]:
    command = [sys.executable, "-m", "foldkv.optimize.engine_worker", str(request)]
    result: dict[str, Any] = {}
    with (
        tempfile.TemporaryFile("w+") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment) as child,
    ):
        assert child.stdout is not None
        for line in child.stdout:
            try:
                message = json.loads(line)
            except ValueError:
                continue  # native code writes to stdout too
            if "progress" in message:
                progress(message["progress"])
            else:
                result = message
        code = child.wait()
        stderr.seek(0)
        tail = stderr.read()[-400:].strip()
    if code < 0:
        raise BuildError(f"the build process was ended by {signal.Signals(-code).name}{f': {tail}' if tail else ''}")
    if not result.get("ok"):
        raise BuildError(
            result.get("error") or f"the build process ended with code {code}: {tail or 'no reason was printed'}"
        )
    return result
