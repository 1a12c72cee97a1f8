"""What TensorRT's builder is told by the ahead-of-time plugins, asked as it asks, and run as it would run it.

The package ``tensorrt.plugin`` is the genuine one; see support/tensorrt_plugin.py for what stands in under it. Launches are
evaluated at real sizes, their arguments bound in TensorRT's order, and the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import FORMS, ROTARY, Case, make_case
from driver import FakeDriver
from tensorrt_plugin import Answers, Input, build, tensorrt_stand_in

from foldkv.errors import BuildError, MissingDependencyError
from foldkv.export.layouts import DENSE, FP8_DS_MLA, LAYOUTS
from foldkv.export.operators.registry import operators
from foldkv.export.spec import ModelSpec
from foldkv.plugins import aot
from foldkv.plugins.compile import compile_kernels, ptx_parameters
from foldkv.plugins.launch import DYNAMIC, Kernel, Plan, plan
from foldkv.plugins.model import operator_calls
from foldkv.plugins.spec import PLUGINS, STATE

SMS = (80, 90)
LEAST, BEST, MOST = {"B": 1, "S": 1, "E": 8}, {"B": 2, "S": 1, "E": 64}, {"B": 64, "S": 512, "E": 262_144}
SIZES = [
    dict(zip(DYNAMIC, sizes, strict=True)) for sizes in itertools.product((1, 3, 64), (1, 4, 512), (8, 4097, 262_144))
]
DECODE: dict[str, Any] = {"start": [43, 7], "real": [1, 1], "chunk": 1}
PREFILL: dict[str, Any] = {"start": [35, 6], "real": [11, 2], "chunk": 11}
TYPES = {"float32": "FLOAT", "bfloat16": "BF16", "int8": "INT8", "int32": "INT32", "int64": "INT64"}


def type_name(tensor: torch.Tensor) -> str:
    return TYPES[str(tensor.dtype).removeprefix("torch.")]


def node_inputs(case: Case) -> list[Input]:
    """The inputs with the axes that a profile moves by name and the others as numbers."""
    sizes = case.sizes

    def axis(dim: str | int) -> str | int:
        parts = [part.strip() for part in str(dim).split("+")]
        named = [part if part in DYNAMIC else str(sizes.get(part, part)) for part in parts]
        return "+".join(named) if len(named) > 1 or named[0] in DYNAMIC else int(named[0])

    spec = PLUGINS[case.operator]
    return [
        Input(type_name(value), tuple(axis(dim) for dim in tensor.stored_dims(case.rows)))
        for value, tensor in zip(case.inputs, spec.inputs, strict=True)
    ]


def node_attributes(case: Case) -> dict[str, Any]:
    return {**case.attributes, "rows": case.rows, "layout_version": 1, "rotary": ROTARY}


def numbers(case: Case, sizes: dict[str, int], sm: int) -> Plan:
    return plan(
        case.operator, case.sizes | sizes, case.attributes, sm=sm, dtype="bfloat16", rows=case.rows, rotary=ROTARY,
        single=True,
    )  # fmt: skip


def kernel_of(case: Case, sm: int) -> Kernel:
    return numbers(case, BEST, sm).launches[0].kernel


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kernel of these tests, compiled."""
    folder = tmp_path_factory.mktemp("kernels")
    cases = [make_case(operator, rows, **DECODE) for operator, rows in FORMS]
    # Operators share kernels.
    compile_kernels(list(dict.fromkeys((kernel_of(case, sm), sm) for case in cases for sm in SMS)), cache=folder)
    return folder


@pytest.fixture(scope="session")
def answers(cache: Path) -> dict[tuple[str, str, int], Answers]:
    """What every plugin tells the builder, by operator, row format and compute capability."""
    found = {}
    for sm in SMS:
        with tensorrt_stand_in() as trt:
            aot.register_plugins(trt, sm=sm, cache=cache)
            aot.register_plugins(trt, sm=sm, cache=cache)  # once more does nothing
            for operator, rows in FORMS:
                case = make_case(operator, rows, **DECODE)
                found[operator, rows, sm] = build(
                    trt, operator, node_attributes(case), node_inputs(case), [LEAST, BEST, MOST]
                )
    assert "tensorrt" not in sys.modules
    return found


FORM = pytest.mark.parametrize(("operator", "rows"), FORMS)
SM = pytest.mark.parametrize("sm", SMS)


def definition_outputs(case: Case, sizes: dict[str, int]) -> list[tuple[list[Any], str]]:
    """Shapes and types that the torch operator gives at these sizes, from shapes alone; a size of its own is None."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    operator, spec = operators()[case.operator], PLUGINS[case.operator]
    every = case.sizes | sizes
    with FakeTensorMode(shape_env=ShapeEnv()):
        inputs = []
        for tensor, real in zip(spec.inputs, case.inputs, strict=True):
            shape = [sum(every[part.strip()] if not part.isdigit() else int(part) for part in str(dim).split("+"))
                     for dim in tensor.dims]  # fmt: skip
            inputs.append(torch.empty(shape, dtype=torch.bfloat16 if tensor.dtype == STATE else real.dtype))
        made = operator.torch_op(*inputs, *case.attributes.values())
    outputs = made if isinstance(made, tuple | list) else [made]
    return [([axis if isinstance(axis, int) else None for axis in one.shape], type_name(one)) for one in outputs]


@FORM
@pytest.mark.parametrize("sizes", [BEST, {"B": 3, "S": 4, "E": 40}, MOST], ids=["decode", "chunk", "largest"])
def test_outputs_are_those_of_the_definition(
    answers: dict[Any, Answers], operator: str, rows: str, sizes: dict[str, int]
) -> None:
    case, said = make_case(operator, rows, **DECODE), answers[operator, rows, 80]
    declared, spec = operators()[operator], PLUGINS[operator]
    expected = definition_outputs(case, sizes)
    assert len(said.types) == len(said.shapes) == len(expected) == len(declared.outputs)
    for index, (shape, type_) in enumerate(expected):
        found = list(said.shape(index, sizes))
        if spec.outputs[index].dtype == STATE and rows != DENSE:  # the definition knows values, the plugin their bytes
            shape[-1], type_ = case.inputs[0].shape[-1], "INT8"
        if None in shape:  # the definition leaves the number of scored entries to the backend: all of them here
            assert operator == "FoldkvIndexScores"
            shape[shape.index(None)] = sizes["E"]
        assert found == shape
        assert said.types[index].name == type_
    in_place = {
        out: declared.inputs.index(name) for out, name in enumerate(declared.outputs) if name in declared.inputs
    }
    assert said.aliases == in_place


@FORM
def test_outputs_are_those_of_a_real_call(answers: dict[Any, Answers], operator: str, rows: str) -> None:
    case, said = make_case(operator, rows, **PREFILL), answers[operator, rows, 80]
    _, outputs = case.outputs()
    sizes = {name: case.sizes.get(name, 0) for name in DYNAMIC}
    assert [said.shape(index, sizes) for index in range(len(outputs))] == [tuple(one.shape) for one in outputs]
    assert [one.name for one in said.types] == [type_name(one) for one in outputs]


@FORM
def test_formats_are_linear_and_the_state_is_of_one_type(answers: dict[Any, Answers], operator: str, rows: str) -> None:
    spec, said = PLUGINS[operator], answers[operator, rows, 80]
    tensors = [*spec.inputs, *spec.outputs]
    states = {"BF16", "HALF"} if rows == DENSE else {"INT8"}
    stateful = any(tensor.dtype == STATE for tensor in tensors)
    assert len(said.combinations) == (len(states) if stateful else 1)
    seen = set()
    for combination in said.combinations:
        assert {format_.name for _, format_ in combination} == {"LINEAR"}
        names = [type_.name for type_, _ in combination]
        of_state = {name for name, tensor in zip(names, tensors, strict=True) if tensor.dtype == STATE}
        assert len(of_state) == int(stateful)
        seen |= of_state
        assert all(
            name == TYPES[tensor.dtype] for name, tensor in zip(names, tensors, strict=True) if tensor.dtype != STATE
        )
    assert seen == (states if stateful else set())


@SM
@FORM
def test_launches_at_every_size(answers: dict[Any, Answers], operator: str, rows: str, sm: int) -> None:
    """Within CUDA's limits, and the numbers that the plan gives: sizes of the profile are the only ones that move."""
    case, said = make_case(operator, rows, **DECODE), answers[operator, rows, sm]
    kernel = kernel_of(case, sm)
    names = [name for name, type_ in kernel.arguments if type_ == "i32"]
    assert len(said.extras) == len(names)
    for sizes in SIZES:
        grid, extras = said.launch(sizes)
        assert all(0 < size <= limit for size, limit in zip(grid, aot.GRID_LIMITS, strict=True))
        assert all(0 <= value < 2**31 for value in extras)
        assert extras == [{"chunk": sizes["S"], "capacity": sizes["E"], "span": 256}[name] for name in names]
        assert grid == numbers(case, sizes, sm).launches[0].grid
    assert {one.dtype.name for one in said.extras} <= {"INT32"}
    assert 1 <= said.block[0] <= 1024 and said.block[1:] == (1, 1)
    assert 0 <= said.shared <= aot.SHARED_WITHOUT_ASKING


@SM
@FORM
def test_the_entry_point_takes_what_tensorrt_passes(
    answers: dict[Any, Answers], operator: str, rows: str, sm: int, tmp_path: Path
) -> None:
    spec, said = PLUGINS[operator], answers[operator, rows, sm]
    ptx = said.code.decode()
    assert re.findall(r"\.entry\s+(\w+)", ptx) == [said.entry]
    assert ptx_parameters(ptx) == ["u64"] * len(spec.inputs) + ["u32"] * len(said.extras) + ["u64"] * len(spec.outputs)
    assert re.findall(r"\.reqntid (\d+)", ptx) == [str(said.block[0])]
    [target] = re.findall(r"\.target (\w+)", ptx)
    assert target in (f"sm_{sm}", f"sm_{sm}a")
    triton = importlib.util.find_spec("triton")
    assert triton is not None and triton.origin is not None
    (tmp_path / "kernel.ptx").write_text(ptx)
    done = subprocess.run(
        [Path(triton.origin).parent / "backends/nvidia/bin/ptxas", f"--gpu-name={target}", "-O0", "kernel.ptx", "-o", "out"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def execute(said: Answers, case: Case, kernel: Kernel, *, order: Sequence[int] | None = None) -> Sequence[torch.Tensor]:
    """Launch as TensorRT does: addresses of the inputs, extra arguments, addresses of the outputs, by position."""
    import ctypes

    driver = FakeDriver({said.code: kernel})
    function = driver.cuLibraryGetKernel(driver.cuLibraryLoadData(said.code)[1], said.entry.encode())[1]
    inputs, outputs = case.outputs()
    grid, extras = said.launch({name: case.sizes.get(name, 0) for name in DYNAMIC})
    addresses = [driver.register(tensor) for tensor in inputs]
    addresses = [addresses[index] for index in order or range(len(addresses))]
    values: list[Any] = [ctypes.c_uint64(address) for address in addresses]
    values += [ctypes.c_int32(value) for value in extras]
    values += [ctypes.c_uint64(driver.register(tensor)) for tensor in outputs]
    values += [ctypes.c_uint64(0)] * 2  # this driver's kernels have Triton's pointers to scratch memory
    packed = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    status = driver.cuLaunchKernel(function, *grid, *said.block, said.shared, 0, ctypes.addressof(packed), 0)
    assert status == (0,), driver.reasons
    return outputs


def compiled_kernel(said: Answers, case: Case, sm: int, cache: Path) -> Kernel:
    """The kernel whose code the plugin returned."""
    kernel = kernel_of(case, sm)
    [compiled] = compile_kernels([(kernel, sm)], cache=cache)
    assert aot.drop_hidden_parameters(compiled.ptx, len(compiled_types(kernel))).encode() == said.code
    assert (said.entry, said.block[0], said.shared) == (compiled.entry, compiled.threads, compiled.shared)
    return kernel


def compiled_types(kernel: Kernel) -> list[str]:
    return [type_ for _, type_ in kernel.arguments if type_ is not None]


@pytest.mark.parametrize("call", [DECODE, PREFILL], ids=["decode", "prefill"])
@SM
@FORM
def test_the_launch_computes_the_operator(
    answers: dict[Any, Answers], cache: Path, operator: str, rows: str, sm: int, call: dict[str, Any]
) -> None:
    case, said = make_case(operator, rows, **call), answers[operator, rows, sm]
    case.check(execute(said, case, compiled_kernel(said, case, sm, cache)))


# One query and sizes that keep every address inside its tensor, whatever is exchanged.
ALONE: dict[str, Any] = {"start": [67], "real": [1], "chunk": 1, "capacity": 17}


def test_exchanged_extra_arguments_are_found(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way with the chunk where the capacity belongs: the kernel computes something else."""
    exact = aot.plan

    def exchanged(*args: Any, **kwargs: Any) -> Plan:
        [launch] = exact(*args, **kwargs).launches
        arguments = list(launch.arguments)
        first, second = (i for i, one in enumerate(arguments) if one.kind == "int32")
        arguments[first], arguments[second] = arguments[second], arguments[first]
        return Plan((dataclasses.replace(launch, arguments=tuple(arguments)),))

    monkeypatch.setattr(aot, "plan", exchanged)
    case = make_case("FoldkvSparseAttention", **ALONE)
    with tensorrt_stand_in() as trt:
        aot.register_plugins(trt, sm=80, cache=cache)
        said = build(trt, case.operator, node_attributes(case), node_inputs(case), [LEAST, BEST, MOST])
    assert said.launch(MOST)[1] == [MOST["E"], MOST["S"]]
    found = execute(said, case, compiled_kernel(said, case, 80, cache))
    with pytest.raises(AssertionError):
        case.check(found)


def test_exchanged_inputs_of_one_type_are_found(answers: dict[Any, Answers], cache: Path) -> None:
    case, said = make_case("FoldkvSparseAttention", **ALONE), answers["FoldkvSparseAttention", DENSE, 80]
    kernel = compiled_kernel(said, case, 80, cache)
    case.check(execute(said, case, kernel))
    found = execute(said, case, kernel, order=[0, 2, 1, *range(3, len(case.inputs))])
    with pytest.raises(AssertionError):
        case.check(found)


def refused(
    cache: Path, operator: str = "FoldkvIndexSelect", rows: str = DENSE, *, attributes: dict[str, Any] | None = None,
    inputs: dict[int, Input] | None = None, most: dict[str, int] = MOST, **options: Any,
) -> str:  # fmt: skip
    """Why a node is refused."""
    case = make_case(operator, rows, **DECODE)
    given = node_inputs(case)
    for index, one in (inputs or {}).items():
        given[index] = one
    with tensorrt_stand_in() as trt:
        aot.register_plugins(trt, sm=80, cache=cache, **options)
        with pytest.raises(BuildError) as error:
            build(
                trt, operator, node_attributes(case) if attributes is None else attributes, given, [LEAST, BEST, most]
            )
    return str(error.value)


def test_nodes_that_no_kernel_takes_are_refused(cache: Path) -> None:
    fields = {"ratio": 4, "topk": 8, "rows": DENSE, "layout_version": 1, "rotary": ROTARY}
    assert "gets 1024: whether TensorRT asks for more is unknown" in refused(cache, shared_limit=1024)
    assert "layout version 2" in refused(cache, attributes=fields | {"layout_version": 2})
    assert "missing a required argument: 'rows'" in refused(
        cache, attributes={name: value for name, value in fields.items() if name != "rows"}
    )
    assert "another order" in refused(cache, attributes=dict(reversed(fields.items())))
    assert "grid of (512, 70000, 1) programs" in refused(cache, most=MOST | {"B": 70_000})
    assert "would pass [2147483648] to a kernel" in refused(cache, most=MOST | {"E": 2**31})
    assert "scores is DataType.HALF" in refused(cache, inputs={0: Input("HALF", ("B", "S", "E"))})
    assert "positions has 2 axes" in refused(cache, inputs={1: Input("INT32", ("B", 1))})


def test_state_that_no_kernel_reads_is_refused(cache: Path) -> None:
    window = node_inputs(make_case("FoldkvWindowUpdate", **DECODE))[0]
    fields = {"rows": DENSE, "layout_version": 1, "rotary": ROTARY}
    assert "state of type" in refused(
        cache, "FoldkvWindowUpdate", inputs={0: dataclasses.replace(window, dtype="FLOAT")}
    )
    assert "does not read rows in nvfp4" in refused(
        cache, "FoldkvWindowUpdate", FP8_DS_MLA, attributes=fields | {"rows": "nvfp4"}
    )
    assert "W of a profile go from [1] to [64]" in refused(
        cache, "FoldkvWindowUpdate", inputs={0: Input("BF16", ("B", "B", 64))}
    )
    assert "rows of 72 bytes" in refused(
        cache, "FoldkvWindowUpdate", FP8_DS_MLA, inputs={0: Input("INT8", ("B", 16, 72))}
    )


def test_plans_that_tensorrt_cannot_launch_are_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = aot.plan
    monkeypatch.setattr(aot, "plan", lambda *args, **kwargs: Plan(exact(*args, **kwargs).launches * 2, 64))
    assert "2 launches and 64 B of workspace" in refused(cache)

    def turned(*args: Any, **kwargs: Any) -> Plan:
        [launch] = exact(*args, **kwargs).launches
        return Plan((dataclasses.replace(launch, arguments=launch.arguments[::-1]),))

    monkeypatch.setattr(aot, "plan", turned)
    assert "TensorRT's order" in refused(cache)


def test_only_one_target_and_one_form_per_process() -> None:
    with tensorrt_stand_in() as trt:
        with pytest.raises(BuildError, match="no kernel for sm75"):
            aot.register_plugins(trt, sm=75)
        aot.register_plugins(trt, sm=80)
        with pytest.raises(BuildError, match="plugins for sm80 are registered"):
            aot.register_plugins(trt, sm=90)
    with tensorrt_stand_in() as trt:
        from foldkv.plugins import tensorrt as classes

        classes.register_plugins(trt)
        with pytest.raises(BuildError, match="use one form of them per process"):
            aot.register_plugins(trt, sm=80)


def test_a_library_without_such_plugins_is_refused() -> None:
    import tensorrt_rtx

    with pytest.raises(MissingDependencyError, match="tensorrt_rtx has no ahead-of-time plugins"):
        aot.register_plugins(tensorrt_rtx, sm=80)


PTX = """.visible .entry add(
	.param .u64 add_param_0,
	.param .u32 add_param_1,
	.param .u64 .ptr .global .align 1 add_param_2,
	.param .u64 .ptr .global .align 1 add_param_3
)
.reqntid 128
{
	ld.param.b64 %rd1, [add_param_0];
	ret;
}
"""


def test_hidden_parameters_are_dropped_only_if_unused() -> None:
    dropped = aot.drop_hidden_parameters(PTX, 2)
    assert ptx_parameters(dropped) == ["u64", "u32"]
    assert dropped.replace(" ", "").splitlines()[-6:] == PTX.replace(" ", "").splitlines()[-6:]
    with pytest.raises(BuildError, match="has 4 parameters; expected 3"):
        aot.drop_hidden_parameters(PTX, 3)
    with pytest.raises(BuildError, match="add uses add_param_3"):
        aot.drop_hidden_parameters(PTX.replace("[add_param_0]", "[add_param_3+4]"), 2)
    with pytest.raises(BuildError, match="2 entry points"):
        aot.drop_hidden_parameters(PTX + PTX, 2)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dense", "fp8+fp4"])
def test_every_operator_of_the_released_models_has_a_kernel_that_needs_no_asking(cache: Path, layout: str) -> None:
    """At their sizes, on the targets that only TensorRT 11 builds for."""
    spec = ModelSpec.from_file(Path(__file__).parents[1] / "data" / "deepseek-v4-pro.json")
    wanted: dict[tuple[Kernel, int], None] = {}
    for call in operator_calls(spec):
        rows = LAYOUTS[layout].format_of(call.group) or DENSE
        sizes = {**call.sizes, "B": 1, "S": 1, "E": 262_144}
        options: dict[str, Any] = {"dtype": "bfloat16", "rows": rows, "rotary": spec.rope_dim, "single": True}
        for sm in (90, 100):
            [launch] = plan(call.operator, sizes, call.attributes, sm=sm, **options).launches
            wanted[launch.kernel, sm] = None
    for compiled in compile_kernels(list(wanted), cache=cache):
        assert compiled.shared <= aot.SHARED_WITHOUT_ASKING, compiled.kernel.function
        assert compiled.spills <= 8
