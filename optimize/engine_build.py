"""From a lowered ONNX model to a TensorRT or TensorRT-RTX plan, in a child process. TensorRT-RTX needs no GPU for this."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..backends import BACKENDS, TENSORRT_RTX, Backend
from ..errors import BuildError, MissingDependencyError, listing
from ..export.contract.state import StateTensor
from ..packages import pip_line, version_of
from ..plugins.cuda import device_capability
from ..progress import Say, silent
from .plan_file import check_plan
from .recipe import Shapes
from .targets import Target

_children: set[subprocess.Popen[str]] = set()


def version_beside_gpu(target: Target) -> str:
    """The installed version of a backend that builds for the GPU that it finds, if that is the target's.

    Raises:
        MissingDependencyError: it cannot be used here; the message says what is missing and what to run where.
    """
    backend, sm = target.backend, target.sm
    assert sm is not None
    version = version_of(backend.module) or ""
    missing = []
    if not version:
        missing.append(f"the package {backend.module}, version {backend.major}: {pip_line([backend.module])}")
    elif int(version.split(".")[0]) < backend.major:
        missing.append(f"{backend.library} {backend.major}; {version} is installed: {pip_line([backend.module])}")
    capability = device_capability()
    if capability != sm:
        found = f"the one here has {capability / 10:.1f}" if capability else "there is none here"
        missing.append(
            f"a GPU of compute capability {sm / 10:.1f}, because {backend.library} times kernels on it; {found}"
        )
    if missing:
        name, without = target.name, [b for b in BACKENDS.values() if b.engine and b.builds_without_gpu]
        title = (
            f"{name} (sm{sm}) needs {backend.library} {backend.major}, which cannot be used here "
            f"({' and '.join(other.library for other in without)} has no engines for {name})"
        )
        step = f"Run `foldkv build GRAPH --target {name} -o OUT` on a machine that has these. You can copy the graph package there."
        package = [] if version else [backend.module]
        raise MissingDependencyError(
            listing(title, missing, step), packages=package, install=pip_line(package) if package else ""
        )
    return version


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
    sm: int | None,
    state: list[StateTensor],
    shapes: Shapes,
    inputs: Mapping[str, list[list[int]]] | None = None,
    backend: Backend = TENSORRT_RTX,
    plugins: int = 0,
    memory_bytes: int | None = None,
    progress: Say = silent,
) -> dict[str, Any]:
    """Build one plan and write it to ``plan``.

    Args:
        graph: the lowered model.
        plan: the file to write.
        sm: compute capability of the plan. With None, TensorRT-RTX gets none and makes a forward-compatible plan. The nodes'
            own field chooses the plugins' kernels.
        state: the state tensors as the model has them.
        shapes: sizes that the engine is built for.
        inputs: smallest, typical and largest shape of inputs that no graph package has.
        backend: whose engine it is.
        plugins: nodes that were injected; the network must have as many plugin layers.
        memory_bytes: limit of the child's address space.
        progress: called with one line per step.

    Returns:
        ``header`` and size of the plan, ``layers``, ``plugin_layers``, names of the ``kernels`` that the plugins can
        launch, ``peak_rss_bytes``, and the builder's ``warnings``.

    Raises:
        BuildError: the parser or the builder refused the graph, or the child process died; the message has the reason.
    """
    with tempfile.TemporaryDirectory(prefix="foldkv-engine-") as folder:
        request = Path(folder) / "request.json"
        values = {"active_context": [1, shapes.context[1], shapes.context[2]]}
        request.write_text(
            json.dumps(
                {"graph": str(graph), "plan": str(plan), "sm": sm,
                 "shapes": profile_shapes(state, shapes) | dict(inputs or {}),
                 "values": values, "memory_bytes": memory_bytes, "module": backend.module, "plugins": plugins}
            )
        )  # fmt: skip
        result = _run_child(request, _child_environment(Path(folder)), progress)
    content = plan.read_bytes()
    # Only the header of TensorRT-RTX is known.
    header = check_plan(content, sm=sm) if backend is TENSORRT_RTX else {"bytes": len(content), "sm": [sm]}
    keys = ("layers", "plugin_layers", "kernels", "peak_rss_bytes", "warnings")
    return {key: result[key] for key in keys} | {"header": header}


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


@contextlib.contextmanager
def _registered(child: subprocess.Popen[str]) -> Iterator[None]:
    _children.add(child)
    try:
        yield
    except BaseException:
        child.kill()  # leaving a Popen waits for it
        raise
    finally:
        _children.discard(child)


def end_children() -> None:
    """End every engine build of this process; callers that wait for one get a BuildError."""
    for child in list(_children):
        child.kill()


def _run_child(request: Path, environment: Mapping[str, str], progress: Say) -> dict[str, Any]:
    command = [sys.executable, "-m", "foldkv.optimize.engine_worker", str(request)]
    result: dict[str, Any] = {}
    with (
        tempfile.TemporaryFile("w+") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment) as child,
        _registered(child),
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
