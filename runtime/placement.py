"""Where ONNX Runtime put the nodes and the inputs of a graph that is for a GPU.

ONNX Runtime computes sizes of tensors on the processor, because that is where they are needed: arithmetic on a few integers that
follow from the shapes of tensors. `session.disable_cpu_ep_fallback` refuses these nodes too, so no graph with sizes in it could be
opened with it. This looks at what ONNX Runtime decided instead: only such arithmetic may be on the processor.
"""

from __future__ import annotations

from typing import Any

from ..backends import ONNX_RUNTIME

#: What ONNX Runtime may compute on the processor: arithmetic on sizes, and putting sizes together.
SIZES = frozenset({
    "Add", "Cast", "Concat", "Div", "Equal", "Expand", "Gather", "Greater", "Identity", "Less", "Max", "Min", "Mod", "Mul",
    "Range", "Reshape", "Shape", "Slice", "Split", "Squeeze", "Sub", "Unsqueeze", "Where",
})  # fmt: skip

# ONNX Runtime's names for the processor's memory.
_HOST = ("Cpu", "CudaPinned")


def on_processor(session: Any) -> list[str]:
    """The nodes of a session that run on the processor and are no arithmetic on sizes; it must have recorded where its nodes are."""
    found = [
        f"{node.domain or 'ai.onnx'}.{node.op_type} {node.name}"
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name == ONNX_RUNTIME.provider
        for node in part.get_nodes()
        if node.domain or node.op_type not in SIZES
    ]
    return sorted(found)


def wanted_on_host(session: Any) -> frozenset[str]:
    """The inputs that a session reads in the processor's memory."""
    pairs = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
    return frozenset(value.name for value, memory in pairs if memory.name in _HOST)
