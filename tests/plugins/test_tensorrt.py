"""The ``IPluginV3`` class as a runtime calls it: fields in, shapes, launches out; kernels run in the interpreter.

What a builder asks of it is asked by the real builder in tests/optimize/test_build.py; shapes are asked here too, with
numbers for expressions.
"""

from __future__ import annotations

import gc
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cases import FORMS, ROTARY, Case, make_case
from driver import FakeDriver

from foldkv.export.contract.rows import DENSE
from foldkv.plugins import tensorrt
from foldkv.plugins.cuda import KernelImage
from foldkv.plugins.declarations import FIELDS, LAYOUT_VERSION, NAMESPACE, PLUGINS
from foldkv.plugins.launch import DYNAMIC, kernels
from foldkv.plugins.tensorrt import provide_kernels, read_fields, register_plugins, release_kernels

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
LIBRARY = "test"


def values_of(case: Case) -> dict[str, Any]:
    fields = {
        "sm": 80,
        "dtype": "bfloat16",
        "row_format": case.row_format,
        "layout_version": LAYOUT_VERSION,
        "rope_dim": ROTARY,
    }
    return {**case.attributes, **fields, "library": LIBRARY}


class Field(NamedTuple):
    """A field as the ONNX parser delivers it: int32 (one or several) or float32, a string as characters with a NUL."""

    name: str
    data: Any


def collection(values: dict[str, Any]) -> list[Field]:
    return [
        Field(name, np.frombuffer(f"{value}\0".encode(), np.int8) if isinstance(value, str) else np.atleast_1d(value))
        for name, value in values.items()
    ]


def plugin_of(case: Case, **changes: Any) -> Any:
    register_plugins(trt)
    spec = PLUGINS[case.operator]
    creator = trt.get_plugin_registry().get_creator(spec.operator, spec.version, NAMESPACE)
    return creator.create_plugin("node", collection(values_of(case) | changes), trt.TensorRTPhase.RUNTIME)


def descriptions(tensors: list[torch.Tensor]) -> list[Any]:
    found = []
    for tensor in tensors:
        description = trt.PluginTensorDesc()
        description.dims = tuple(tensor.shape)
        found.append(description)
    return found


@pytest.fixture
def loaded() -> Iterator[Any]:
    """Loads what a case can launch, into a driver that interprets it."""

    count = 0

    def load(case: Case) -> FakeDriver:
        nonlocal count
        count += 1
        sizes = {name: size for name, size in case.sizes.items() if name not in DYNAMIC}
        found = kernels(
            case.operator, sizes, case.attributes, sm=80, dtype="bfloat16", row_format=case.row_format, rope_dim=ROTARY
        )
        driver = FakeDriver({one.name.encode(): one for one in found})
        images = [KernelImage(one.name, "entry", 32 * one.num_warps, 0, one.name.encode()) for one in found]
        provide_kernels(LIBRARY, images, driver=driver)
        return driver

    yield load
    for _ in range(count):
        release_kernels(LIBRARY)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize(("operator", "rows"), FORMS)
def test_enqueue_computes_the_operator(operator: str, rows: str, chunk: int, loaded: Any) -> None:
    case = make_case(operator, rows, start=[43, 7], real=[chunk, 1], chunk=chunk)
    driver = loaded(case)
    plugin = plugin_of(case).attach_to_context(None)
    inputs, outputs = case.outputs()
    plugin.on_shape_change(descriptions(inputs), descriptions(outputs))
    workspace = torch.full((1 + plugin.steps.workspace // 4,), torch.nan)
    addresses = [[driver.register(tensor) for tensor in tensors] for tensors in (inputs, outputs, [workspace])]
    before = len(driver.calls)
    plugin.enqueue(descriptions(inputs), descriptions(outputs), addresses[0], addresses[1], addresses[2][0], 7)
    case.check(outputs)
    # Nothing but launches: what a CUDA graph can capture.
    assert set(driver.calls[before:]) == {"cuLaunchKernel"}


class Builder:
    """Numbers for expressions."""

    def constant(self, value: int) -> int:
        return value

    def operation(self, kind: Any, one: int, other: int) -> int:
        assert kind == trt.DimensionOperation.SUM
        return one + other


@pytest.mark.parametrize(("operator", "rows"), FORMS)
def test_types_shapes_and_aliases_are_those_of_the_definition(
    operator: str, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(operator, rows, start=[43, 7], real=[3, 1], chunk=3)
    inputs, outputs = case.outputs()
    plugin = plugin_of(case)
    # The library's own class holds symbols only; a list takes numbers too.
    monkeypatch.setattr(trt, "DimsExprs", lambda rank: [0] * rank)
    shapes = plugin.get_output_shapes([tuple(tensor.shape) for tensor in inputs], [], Builder())
    assert [tuple(shape) for shape in shapes] == [tuple(tensor.shape) for tensor in outputs]
    names = {
        torch.float32: "FLOAT", torch.bfloat16: "BF16", torch.int8: "INT8", torch.int32: "INT32", torch.int64: "INT64"
    }  # fmt: skip
    assert [str(kind) for kind in plugin.get_output_data_types([])] == [
        f"DataType.{names[tensor.dtype]}" for tensor in outputs
    ]
    for index, output in enumerate(outputs):
        aliased = plugin.get_aliased_input(index)
        assert (aliased >= 0) == (index in PLUGINS[operator].aliases)
        assert aliased < 0 or inputs[aliased].data_ptr() == output.data_ptr()


@pytest.mark.parametrize(("operator", "rows"), FORMS)
def test_only_linear_tensors_of_the_declared_types_are_taken(operator: str, rows: str) -> None:
    case = make_case(operator, rows, start=[43], real=[1], chunk=1)
    plugin, spec = plugin_of(case), PLUGINS[operator]
    kinds = {"float32": "FLOAT", "bfloat16": "BF16", "int8": "INT8", "int32": "INT32", "int64": "INT64"}
    tensors = (*spec.inputs, *spec.outputs)
    for position, tensor in enumerate(tensors):
        stored = kinds[tensor.stored_type(case.attributes, rows="bfloat16" if rows == DENSE else "int8")]
        for kind in ("FLOAT", "HALF", "BF16", "INT8", "INT32", "INT64"):
            for layout in ("LINEAR", "CHW4"):
                desc = types.SimpleNamespace(type=getattr(trt.DataType, kind), format=getattr(trt.TensorFormat, layout))
                taken = plugin.supports_format_combination(
                    position, [types.SimpleNamespace(desc=desc)] * len(tensors), len(spec.inputs)
                )
                assert taken == (kind == stored and layout == "LINEAR")


@pytest.mark.parametrize(("operator", "rows"), FORMS)
def test_fields_survive_being_serialized(operator: str, rows: str) -> None:
    case = make_case(operator, rows, start=[43], real=[1], chunk=1)
    spec, plugin = PLUGINS[operator], plugin_of(case)
    fields = plugin.get_fields_to_serialize()
    gc.collect()
    scribble = [bytes(range(256)) * 4 for _ in range(1000)]  # over what a field that owns nothing would point at
    again = read_fields(spec, fields)
    assert len(scribble) == 1000
    expected = read_fields(spec, collection(values_of(case)))
    near = {name: pytest.approx(value) if isinstance(value, float) else value for name, value in expected.items()}
    assert again == near == plugin.clone().values
    assert set(again) == set(spec.attributes) | set(FIELDS)


def test_the_workspace_holds_every_split_at_the_largest_sizes() -> None:
    case = make_case("FoldkvDenseAttention", start=[5000], real=[1], chunk=1, capacity=640)
    inputs, _ = case.outputs()
    shapes = [types.SimpleNamespace(max=tuple(t.shape), min=(1, *t.shape[1:])) for t in inputs]
    plugin = plugin_of(case)
    plugin.on_shape_change(descriptions(inputs), [])
    assert plugin.get_workspace_size(shapes, []) == plugin.steps.workspace > 0


def test_missing_fields_other_versions_and_kernels_that_are_not_loaded_are_told() -> None:
    case = make_case("FoldkvSparseAttention", start=[43], real=[1], chunk=1)
    spec, values = PLUGINS[case.operator], values_of(case)
    with pytest.raises(ValueError, match="FoldkvSparseAttention lacks row_format, library"):
        read_fields(spec, collection({k: v for k, v in values.items() if k not in ("row_format", "library")}))
    with pytest.raises(ValueError, match="layout version 2; its kernels read 1"):
        plugin_of(case, layout_version=2)
    plugin = plugin_of(case, library="elsewhere")
    inputs, outputs = case.outputs()
    plugin.on_shape_change(descriptions(inputs), descriptions(outputs))
    with pytest.raises(RuntimeError, match="'elsewhere' are not loaded"):
        plugin.enqueue([], [], [0] * 8, [0], 0, 0)


def test_a_library_is_loaded_once_and_can_be_released(loaded: Any) -> None:
    case = make_case("FoldkvIndexSelect", start=[43], real=[1], chunk=1)
    driver = loaded(case)
    loaded(case)
    assert driver.calls.count("cuLibraryLoadData") == len(driver.kernels)
    release_kernels(LIBRARY)
    assert LIBRARY in tensorrt._LIBRARIES, "the other user still has it"
    release_kernels(LIBRARY)
    assert driver.calls[-1] == "cuLibraryUnload" and LIBRARY not in tensorrt._LIBRARIES
