"""The table of the CUDA provider's kernels, and what it says of nodes."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from foldkv.errors import BuildError
from foldkv.export.operators.registry import ONNX_OPSET
from foldkv.optimize.cuda_kernels import check_kernels, kernel_gaps, kernel_table


def model(text: str, opset: int = ONNX_OPSET) -> ir.Model:
    head = f'<ir_version: 10, opset_import: ["": {opset}, "com.microsoft": 1]> g '
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(head + text)))


def test_the_table_is_for_the_opset_of_graphs_and_says_what_it_was_read_from() -> None:
    table = kernel_table()
    assert table["opset"] == ONNX_OPSET and table["package"] == "onnxruntime-gpu"
    assert tuple(map(int, table["version"].split("."))) >= (1, 31)
    # Facts that the rewrites of segments follow from.
    assert "Unique" not in table["operators"] and "CastLike" not in table["operators"]
    assert all("int8" not in kernel["T"] for kernel in table["operators"]["GatherND"]["kernels"])
    assert any("int8" in kernel["T"] for kernel in table["operators"]["Gather"]["kernels"])
    assert any("float8e4m3fn" in kernel["T1"] for kernel in table["operators"]["Cast"]["kernels"])


@pytest.mark.parametrize(
    ("graph", "gap"),
    [
        ("(int64[N] x) => (int64[M] y) { y = Unique <sorted = 1> (x) }", "Unique, for any type"),
        ("(int8[2, N] x, int64[2, K] i) => (int8[2] y) { y = GatherND (x, i) }", "GatherND of T = int8"),
        ("(float[2, N] x, int64[2, K] i) => (float[2] y) { y = GatherND (x, i) }", ""),
        ("(bool b, int8[N] x) => (int8[N] y) { y = Where (b, x, x) }", "Where of B = bool, T = int8"),
        ("(float8e4m3fn[N] x) => (float[N] y) { y = Cast <to = 1> (x) }", ""),
        ("(int64[2] x) => (int64[1] y) { y = ReduceProd (x) }", "ReduceProd of T = int64"),
        ("(float[N] x, float[N] z) => (float[M] y) { y = Concat <axis = 0> (x, z, x) }", ""),
        ("(float[N] x) => (float[N] y) { y = com.microsoft.FastGelu (x) }", ""),
        ("(float[N] x) => (float[N] y) { y = com.microsoft.Invented (x) }", "com.microsoft.Invented, for any type"),
    ],
)
def test_a_node_without_a_kernel_is_found(graph: str, gap: str) -> None:
    assert dict(kernel_gaps(model(graph))) == ({gap: 1} if gap else {})


def test_nodes_of_loops_are_looked_at_too() -> None:
    inner = "(int64 i, bool c) => (bool d, int64[M] y) { d = Identity (c) y = Unique <sorted = 1> (x) }"
    graph = model(f"(int64[N] x, int64 n, bool go) => (int64[L, M] z) {{ z = Loop (n, go) <body = one {inner}> }}")
    assert dict(kernel_gaps(graph)) == {"Unique, for any type": 1}


def test_all_gaps_of_all_segments_are_in_one_error() -> None:
    bad = model("(int64[N] x) => (int64[M] y) { y = Unique <sorted = 1> (x) }")
    other = model("(float[N] x) => (float[N] y) { y = Relu (x) }", opset=19)
    with pytest.raises(BuildError, match=r"1\.31.*\(2 found\)") as error:
        check_kernels({"csa-moe": bad, "head": other})
    assert "csa-moe: 1 x Unique" in str(
        error.value
    ) and f"head has opset 19; the table of kernels is for {ONNX_OPSET}" in str(error.value)
    check_kernels({"head": model("(float[N] x) => (float[N] y) { y = Relu (x) }")})
