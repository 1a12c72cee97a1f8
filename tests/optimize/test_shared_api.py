"""TensorRT 11 has every name that builds, plugins and executors use: read off its own Python bindings, which cannot be
imported without its libraries."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Variables that hold the module or one of its objects.
HOLDERS = {
    "trt",
    "builder",
    "network",
    "parser",
    "config",
    "profile",
    "registry",
    "layer",
    "tensor",
    "runtime",
    "context",
    "engine",
}
#: TensorRT-RTX alone can be told a GPU that is not there, that it is to allocate nothing, and when to compile kernels; used only
#: where the module has it.
RTX_ONLY = {
    "ComputeCapability", "num_compute_capabilities", "set_compute_capability", "REQUIRE_USER_ALLOCATION",
    "dynamic_shapes_kernel_specialization_strategy",
}  # fmt: skip
#: What foldkv's own tensors and registries answer to under the same variable names.
OURS = {
    "sized",
    "stored_dims",
    "stored_type",
    "used_rows",
    "dtype",
    "dims",
    "input",
    "output",
    "name",
    "capacity",
    "width",
    "bytes",
    "group",
    "max",
    "min",
}


def used(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            base = node.value
            while isinstance(base, ast.Attribute):
                base = base.value
            if isinstance(base, ast.Name) and base.id in HOLDERS:
                names.add(node.attr)
    return names - OURS - RTX_ONLY


@pytest.mark.parametrize(
    "source", ["optimize/engine_worker.py", "plugins/tensorrt.py", "runtime/engine_part.py", "runtime/engine_stage.py"]
)
def test_tensorrt_11_has_the_names_that_are_used(source: str) -> None:
    found = importlib.util.find_spec("tensorrt_bindings")
    if found is None or found.origin is None:
        pytest.skip("the bindings of TensorRT 11 are not installed")
    binary = (Path(found.origin).parent / "tensorrt.so").read_bytes()
    names = used(ROOT / source)
    assert len(names) >= 5
    missing = sorted(name for name in names if name.encode() + b"\0" not in binary)
    assert missing == []


def test_a_name_that_it_lacks_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(
        "builder.build_engine_of_last_year(network)\nbuilder.build_serialized_network\n"
    )
    assert used(tmp_path / "planted.py") == {"build_engine_of_last_year", "build_serialized_network"}
