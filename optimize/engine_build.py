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
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..artifact import scratch_folder
from ..backends import BACKENDS, TENSORRT_RTX, Backend, backend_named
from ..errors import BuildError, MissingDependencyError, listing
from ..export.contract.state import StateTensor
from ..packages import pip_line, version_of
from ..plugins.cuda import device_capability
from ..progress import Say, silent
from .plan_file import check_plan
from .recipe import Shapes
from .targets import Target

#: Smallest, typical and largest shape, by input.
Ranges = dict[str, list[list[int]]]
#: What builds a plan: :func:`build_plan`, or something else that takes its arguments and returns what it does.
Builder = Callable[..., dict[str, Any]]
# A build takes one processor and a few hundred megabytes. All targets of a process share these.
_SLOTS = threading.BoundedSemaphore(len(os.sched_getaffinity(0)))
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
        name, engines = target.name, [b for b in BACKENDS.values() if b.engine and b.builds_without_gpu]
        none = [other.library for other in engines if not other.builds_for(sm)]
        title = f"{name} (sm{sm}) needs {backend.library} {backend.major}, which cannot be used here"
        if none:
            title += f" ({' and '.join(none)} has no engines for {name})"
        preferred = next(other for other in BACKENDS.values() if other.builds_for(sm))
        named = "" if preferred is backend else f" --backend {backend.name}"
        step = f"Run `foldkv build GRAPH --target {name}{named} -o OUT` on a machine that has these. You can copy the graph package there."
        if other := next((b.name for b in map(backend_named, target.backends[1:]) if b.builds_without_gpu), ""):
            step += f" Or build here with `--backend {other}`."
        package = [] if version else [backend.module]
        raise MissingDependencyError(
            listing(title, missing, step), packages=package, install=pip_line(package) if package else ""
        )
    return version


def profiles(model: ir.Model, state: Sequence[StateTensor], shapes: Shapes) -> list[Ranges]:
    """For every optimization profile: smallest, typical and largest shape of every input that has no fixed one.

    The first profile is for decode steps, one token of each sequence; the second for chunks of one sequence. One profile for
    both would plan memory for chunks of all sequences at once.

    Args:
        model: a lowered segment; sizes have the names that export/segments.py gives them.
        state: its state tensors.
        shapes: sizes that the engine is built for.
    """
    one = (1, 1, 1)
    steps = [{"batch": shapes.batch, "chunk": one, "kept": one}]
    if shapes.chunk[2] > 1:
        longest = (1, shapes.chunk[2], shapes.chunk[2])
        steps.append({"batch": one, "chunk": longest, "kept": (1, 1, shapes.chunk[2])})
    rows = {
        f"entries_{tensor.ratio}": tuple(tensor.capacity(context) for context in shapes.context)
        for tensor in state
        if tensor.ratio
    }
    found = []
    for sizes in steps:
        ranges: Ranges = {}
        for value in model.graph.inputs:
            assert value.shape is not None
            dims = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
            if any(isinstance(dim, str) for dim in dims):
                ranges[value.name or ""] = [
                    [dim if isinstance(dim, int) else (sizes | rows)[dim][i] for dim in dims] for i in range(3)
                ]
        found.append(ranges)
    return found


def build_plan(
    graph: Path,
    plan: Path,
    *,
    sm: int | None,
    ranges: Sequence[Ranges],
    context: Sequence[int] = (1, 1, 1),
    backend: Backend = TENSORRT_RTX,
    plugins: int = 0,
    capture: bool = False,
    memory_bytes: int | None = None,
    progress: Say = silent,
) -> dict[str, Any]:
    """Build one plan and write it to ``plan``.

    Args:
        graph: the lowered model.
        plan: the file to write.
        sm: compute capability of the plan. With None, TensorRT-RTX gets none and makes a forward-compatible plan. The nodes'
            own field chooses the plugins' kernels.
        ranges: shapes of every optimization profile, see :func:`profiles`.
        context: smallest, typical and largest ``active_context``, where shapes depend on it.
        backend: whose engine it is.
        plugins: nodes that were injected; the network must have as many plugin layers.
        capture: whether steps of the engine are to be captured in CUDA graphs.
        memory_bytes: limit of the child's address space.
        progress: called with one line per step.

    Returns:
        ``header`` and size of the plan, ``layers``, ``plugin_layers``, names of the ``kernels`` that the plugins can
        launch, ``peak_rss_bytes``, and the builder's ``warnings``.

    Raises:
        BuildError: the parser or the builder refused the graph, or the child process died; the message has the reason.
    """
    with scratch_folder("engine") as folder:
        request = folder / "request.json"
        request.write_text(
            json.dumps(
                {"graph": str(graph), "plan": str(plan), "sm": sm, "profiles": list(ranges),
                 "values": {"active_context": list(context)}, "memory_bytes": memory_bytes, "module": backend.module,
                 "plugins": plugins, "capture": capture}
            )
        )  # fmt: skip
        with _SLOTS:
            result = _run_child(request, _child_environment(folder), progress)
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
