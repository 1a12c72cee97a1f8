"""What the objects of backends say agrees with each other, and with what asks them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from foldkv import packages
from foldkv.backends import (
    BACKENDS,
    ONNX_RUNTIME,
    ONNX_RUNTIME_CUDA,
    PACKED,
    TENSORRT,
    TENSORRT_RTX,
    Backend,
    backend_named,
)
from foldkv.errors import InputError
from foldkv.export.contract.layouts import BUILT, DENSE
from foldkv.export.contract.profiles import HF, SERVED
from foldkv.optimize.kept_weights import FORMATS
from foldkv.optimize.plan_file import named_capability
from foldkv.optimize.targets import Target, load_targets, resolve_targets

ROOT = Path(__file__).parents[1]
EACH = pytest.mark.parametrize("backend", BACKENDS.values(), ids=list(BACKENDS))


@EACH
def test_the_table_of_packages_says_what_a_backend_needs(backend: Backend) -> None:
    build, run = packages.FEATURES[backend.build_feature()], packages.FEATURES[backend.run_feature]
    assert backend.module in build.modules and backend.module in run.modules
    assert build.gpu != backend.builds_without_gpu and run.gpu == backend.gpu == ("cuda.bindings" in run.modules)
    assert run.package == backend.package and not build.package
    if backend.takes_plugins:
        assert set(packages.FEATURES[backend.build_feature(True)].modules) - set(build.modules) == {"triton"}


@EACH
def test_every_backend_builds_for_some_target_and_keeps_known_formats(backend: Backend) -> None:
    assert any(backend.name in target.backends for target in load_targets().values())
    assert list(backend.weights) == [name for name in FORMATS if name in backend.weights]


def test_a_target_is_built_by_the_first_backend_that_takes_its_gpu() -> None:
    targets = load_targets()
    assert targets["cpu"].backend is ONNX_RUNTIME and targets["cpu"].backends == ("onnxruntime",)
    assert targets["a100"].backend is TENSORRT_RTX
    assert targets["a100"].backends == ("tensorrt-rtx", "tensorrt", "onnxruntime-cuda")
    assert targets["h100"].backend is TENSORRT and targets["h100"].backends == ("tensorrt", "onnxruntime-cuda")
    assert all(named_capability(sm) == sm for sm in TENSORRT_RTX.capabilities or ())


def test_a_backend_can_be_chosen_for_the_gpus_of_a_build() -> None:
    gpus = [name for name, target in load_targets().items() if target.sm]
    chosen = resolve_targets(["cpu", *gpus], ONNX_RUNTIME_CUDA.name)
    assert [target.name for target in chosen] == ["cpu", *gpus] and chosen[0] is load_targets()["cpu"]
    assert all(target.backend is ONNX_RUNTIME_CUDA and target.precision == "float32" for target in chosen[1:])
    [h100] = resolve_targets(["h100"], ONNX_RUNTIME_CUDA.name)
    assert h100.backends == ("onnxruntime-cuda", "tensorrt") and h100.memory_gib == 80
    [a100] = resolve_targets(["a100"], TENSORRT.name)
    assert a100.backend is TENSORRT and a100.precision == "bfloat16"
    assert resolve_targets(["h100"])[0] is load_targets()["h100"]


@pytest.mark.parametrize(
    ("names", "backend", "found"),
    [
        (["cpu"], "onnxruntime-cuda", ["cpu is built by onnxruntime"]),
        (["cpu", "h100", "b200"], "tensorrt-rtx", ["h100 is built by", "b200 is built by"]),
        (["h100"], "onnxruntime", ["h100 is built by tensorrt, onnxruntime-cuda"]),
        (["h100"], "onnxruntime-cudda", ["did you mean 'onnxruntime-cuda'?"]),
    ],
)
def test_a_backend_that_does_not_build_for_a_target_is_refused(
    names: list[str], backend: str, found: list[str]
) -> None:
    with pytest.raises(InputError) as error:
        resolve_targets(names, backend)
    assert all(text in str(error.value) for text in found)


def test_bundles_of_graphs_run_on_any_gpu_and_engines_on_theirs() -> None:
    assert [backend.name for backend in BACKENDS.values() if backend.one_gpu] == ["tensorrt-rtx", "tensorrt"]
    assert ONNX_RUNTIME_CUDA.builds_for(999) and not ONNX_RUNTIME_CUDA.builds_for(None)
    assert ONNX_RUNTIME.builds_for(None) and not ONNX_RUNTIME.builds_for(90)


def refusals(backend: Backend, layout: str, profile: str = HF, plugins: bool = False) -> list[str]:
    return backend.refusals(layout, profile=profile, plugins=plugins, plugin_gaps=lambda: ["the plugins' own reason"])


@EACH
@pytest.mark.parametrize("profile", [HF, SERVED])
def test_function_bodies_read_dense_rows_and_what_their_profile_packs(backend: Backend, profile: str) -> None:
    kept = [layout for layout in BUILT if not refusals(backend, layout, profile)]
    assert kept == [DENSE, *(PACKED if not backend.engine and profile == SERVED else ())]


def test_plugins_are_asked_only_where_there_are_some() -> None:
    assert refusals(TENSORRT_RTX, DENSE, plugins=True) == ["layout dense is not supported: the plugins' own reason"]
    assert refusals(ONNX_RUNTIME, DENSE, plugins=True) == []
    assert "needs plugins" in refusals(TENSORRT, "fp8")[0] and "--profile served" in refusals(ONNX_RUNTIME, "fp8")[0]


def test_a_target_of_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"'tensorrt-rt' is not known \(did you mean 'tensorrt-rtx'\?\); expected one"):
        _ = Target("mine", ("tensorrt-rt",), "bfloat16", sm=80).backend
    assert backend_named("tensorrt") is TENSORRT


def test_nobody_else_tells_backends_apart_by_name_or_by_a_missing_gpu() -> None:
    """Who needs to know a fact about backends asks for that fact."""
    pattern = r'== "cpu"|backend == |sm is (not )?None|ONNXRUNTIME|"tensorrt([-_]rtx)?"|"onnxruntime(-cuda)?"'
    found = subprocess.run(
        ["grep", "-rnE", "--include=*.py", pattern, *(folder for folder in FOLDERS), *map(str, ROOT.glob("*.py"))],
        cwd=ROOT, capture_output=True, text=True, check=False,
    ).stdout.splitlines()  # fmt: skip
    elsewhere = [line for line in found if "backends.py:" not in line and not any(why in line for why in JUSTIFIED)]
    assert elsewhere == []


FOLDERS = ("export", "optimize", "plugins", "runtime", "validation")
#: Lines that mean something else than "there is no GPU" or "which backend is this".
JUSTIFIED = (
    "if sm is None and not header",  # a plan for which the build named no compute capability
    "if sm is not None and (header",
    'request["sm"] is None', 'request["sm"] is not None',
    "assert sm is not None", "assert target.sm is not None",  # for the type checker, beside a backend's own fact
    "if chosen.sm is None or not chosen.backend.takes_plugins",
    'for name in ("transformers", "torch", "onnxruntime")',  # versions that a report's figures depend on
)  # fmt: skip
