"""The child process of an engine build: ``python -m foldkv.optimize.engine_worker REQUEST.json``.

A native crash or a memory limit ends this process and not the pipeline. It prints one JSON object per
line: {"progress": ...}, then {"ok": true} or {"error": ...}. It writes the plan to the path in the request.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

_REASONS = 5  # different ones of a refused graph
_WARNINGS = 20  # different ones; no build has given that many yet


def say(**message: Any) -> None:
    """One line to the parent."""
    print(json.dumps(message), flush=True)


def build(request: dict[str, Any]) -> None:
    """Parse the graph, check it, build the plan; raises RuntimeError with the library's own reasons."""
    trt = importlib.import_module(request["module"])
    messages: list[tuple[str, str]] = []

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            messages.append((str(severity).rsplit(".", 1)[-1], text))

    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    launched: set[str] = set()
    if request["plugins"]:
        from ..plugins.tensorrt import register_plugins

        register_plugins(trt, observe=lambda _, steps: launched.update(one.kernel.name for one in steps.launches))
    parser = trt.OnnxParser(network, logger)
    say(progress="parsing the graph")
    if not parser.parse_from_file(request["graph"]):
        raise RuntimeError(_refused([parser.get_error(i) for i in range(parser.num_errors)], messages))
    unused = [text for _, text in messages if "Unused Input" in text]
    if unused:  # the parser then computes something different from the graph
        raise RuntimeError(f"the parser ignores an input: {unused[0]}")
    # Where the parser finds no creator, it takes a function body, or a builtin of the same name.
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    found = sum(layer.type == trt.LayerType.PLUGIN_V3 for layer in layers)
    if found != request["plugins"]:
        raise RuntimeError(f"the network has {found} plugin layers; {request['plugins']} nodes were injected")
    config = builder.create_builder_config()
    # TF32 is on by default: it would round to 10 bits the operands of products that the lowered graph keeps in float32.
    config.clear_flag(trt.BuilderFlag.TF32)
    if found:  # state is updated in place
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    # A step can be captured only if the library allocates nothing in it; loops run on the device, and no capture takes them.
    if request["capture"] and hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    # TensorRT builds for the device that it finds. TensorRT-RTX builds for the named one, or else for sm80 and later.
    if hasattr(trt, "ComputeCapability") and request["sm"] is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{request['sm']}"), 0)
    for shapes in request["profiles"]:
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            if tensor.is_shape_tensor:
                profile.set_shape_input(tensor.name, *([value] for value in request["values"][tensor.name]))
            elif -1 in tuple(tensor.shape):
                profile.set_shape(tensor.name, *shapes[tensor.name])
        if config.add_optimization_profile(profile) < 0:
            raise RuntimeError(f"the shapes were refused: {_reasons(messages)}")
    device = "any GPU from sm80 on" if request["sm"] is None else f"sm{request['sm']}"
    say(progress=f"building {network.num_layers} layers for {device}")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError(_reasons(messages))
    Path(request["plan"]).write_bytes(memoryview(plan))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    warnings = dict.fromkeys(_first_line(text) for severity, text in messages if severity == "WARNING")
    say(
        ok=True, peak_rss_bytes=peak, layers=network.num_layers, plugin_layers=found, kernels=sorted(launched),
        warnings=list(warnings)[:_WARNINGS],
    )  # fmt: skip


def _first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip()), text)[:400]


def _refused(errors: list[Any], messages: list[tuple[str, str]]) -> str:
    """What the parser refused, each reason once, and what else was logged.

    Once one node is refused, the parser also names what it would have read in another way, such as every text attribute in a
    function body. These are left out where there is another reason.
    """
    nodes: dict[str, list[str]] = {}
    for error in errors:
        nodes.setdefault(_first_line(error.desc()), []).append(f"{error.node_name() or '?'} ({error.node_operator()})")
    reasons = {text: named for text, named in nodes.items() if "value_strings" not in text} or nodes
    lines = [
        f"node {named[0]}{f' and {len(named) - 1} more' * (len(named) > 1)}: {text}" for text, named in reasons.items()
    ]
    logged = _reasons(messages)
    return "; ".join([*lines[:_REASONS], *([logged] if logged not in reasons else [])])


def _reasons(messages: list[tuple[str, str]]) -> str:
    """The logged errors, without the note about the missing driver that follows each of them here."""
    errors = [
        text for severity, text in messages if severity in ("ERROR", "INTERNAL_ERROR") and "cudaError" not in text
    ]
    return "; ".join(_first_line(text) for text in errors[-3:]) or "no reason was logged"


def _end_with_parent() -> None:
    """End with the parent: without it nobody takes the plan, and a build can keep gigabytes for minutes."""
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() == 1:  # the parent ended before the call
        sys.exit(1)


def main() -> None:
    """Read the request and build."""
    _end_with_parent()
    request = json.loads(Path(sys.argv[1]).read_text())
    if request.get("memory_bytes"):
        resource.setrlimit(resource.RLIMIT_AS, (request["memory_bytes"], request["memory_bytes"]))
    try:
        build(request)
    except (RuntimeError, MemoryError, ImportError) as error:
        say(error=str(error) or type(error).__name__)
        sys.exit(1)


if __name__ == "__main__":
    main()
