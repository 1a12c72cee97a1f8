"""What ONNX Runtime may compute on the processor where a GPU computes the rest."""

from __future__ import annotations

from dataclasses import dataclass

from foldkv.runtime.placement import on_processor, wanted_on_host


@dataclass
class Named:
    """A node, an input, or a place in memory, with the fields that ONNX Runtime's have."""

    name: str
    op_type: str = ""
    domain: str = ""


@dataclass
class Part:
    """Nodes on one provider."""

    ep_name: str
    nodes: list[Named]

    def get_nodes(self) -> list[Named]:
        return self.nodes


class Opened:
    """What a session of ONNX Runtime says of its graph."""

    def get_provider_graph_assignment_info(self) -> list[Part]:
        sizes = [Named("n1", "Concat"), Named("n2", "Squeeze")]
        here = [*sizes, Named("n3", "GatherND"), Named("n4", "Add", "com.microsoft"), Named("n0", "MatMul")]
        return [Part("CUDAExecutionProvider", [Named("n5", "TopK")]), Part("CPUExecutionProvider", here)]

    def get_inputs(self) -> list[Named]:
        return [Named("streams"), Named("active_context"), Named("tokens")]

    def get_input_memory_infos(self) -> list[Named]:
        return [Named("Cuda"), Named("Cpu"), Named("Cuda")]


def test_only_arithmetic_on_sizes_may_be_on_the_processor() -> None:
    assert on_processor(Opened()) == ["ai.onnx.GatherND n3", "ai.onnx.MatMul n0", "com.microsoft.Add n4"]


def test_inputs_that_are_read_on_the_host() -> None:
    assert wanted_on_host(Opened()) == {"active_context"}
