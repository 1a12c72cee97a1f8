"""What ``step_engine.py`` needs, made on a machine without a GPU: plans, what they must compute, and the library for them.

All of it is in ``PARCEL/engine``:

- ``material.tar.xz``: probes and bundles, each with inputs and with what ONNX Runtime computes from them on the CPU;
- ``python.tar.xz``: the Python packages of TensorRT-RTX for the GPU machine's Python;
- ``library.xz``: ``libtensorrt_rtx.so.1``.

Plans name no compute capability, so they can be tried on any GPU. Kernels of plugins are compiled for the requested one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import lzma
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from kit import DEFAULT_PARCEL, ROOT, archive
from onnx import TensorProto, helper
from step_engine import PACKED, sources

from foldkv.export.operators.registry import DOMAIN, ONNX_OPSET, operators
from foldkv.export.pack import pack
from foldkv.export.package import export_checkpoint
from foldkv.optimize.build import build_bundles
from foldkv.optimize.bundled_kernels import bundle_kernels
from foldkv.optimize.engine_build import build_plan
from foldkv.optimize.recipe import Shapes
from foldkv.optimize.targets import Target, load_targets
from foldkv.plugins.inject import inject_nodes, set_library
from foldkv.records import to_json
from foldkv.runtime.session import Session
from foldkv.validation.cases import load_text
from foldkv.validation.metrics import compare_logits, summary

Array = npt.NDArray[Any]
Progress = Callable[[str], None]

MODEL = ROOT / "examples" / "tiny-v4"
#: Python of the GPU machine, for which the library's bindings are fetched.
PYTHON, PLATFORM = "3.12", "manylinux_2_28_x86_64"
#: Plans for these are tried too, if the forward-compatible one is refused: what the library says is worth a row.
OTHERS = (80, 89, 120)
SHAPES = Shapes(batch=(1, 2, 2), chunk=(1, 1, 64), context=(64, 1024, 2048))
CONTEXT, STEPS = 1024, 60
# One prompt fills windows and both kinds of compressed entries, one is short.
PROMPTS = (300, 9)
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class Probe:
    """A small graph, in bfloat16 for the engine and in float32 for ONNX Runtime, and its inputs.

    Attributes:
        name: its folder.
        build: the graph with low precision in a type of ``TensorProto``.
        inputs: values; those in ``low`` are rounded to bfloat16.
        low: names of inputs and outputs that the engine has in bfloat16.
        limits: of the largest error of an output, over the largest value that is expected there.
        sizes: smallest and largest shape of inputs whose shape is not fixed.
        aliases: outputs that are in the buffer of an input.
    """

    name: str
    build: Callable[[int], onnx.ModelProto]
    inputs: dict[str, Array]
    low: tuple[str, ...]
    limits: dict[str, float]
    sizes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = dataclasses.field(default_factory=dict)
    aliases: dict[str, str] = dataclasses.field(default_factory=dict)


def _model(nodes: list[Any], inputs: list[Any], outputs: list[Any], inner: Sequence[Any] = ()) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "probe", inputs, outputs, value_info=list(inner))
    opsets = [helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def product_probe() -> Probe:
    """Products whose weights are inputs, one in bfloat16 and one in float32, and what is done to every element."""
    rng = np.random.default_rng(1)

    def build(low: int) -> onnx.ModelProto:
        float32, value = TensorProto.FLOAT, helper.make_tensor_value_info
        nodes = [
            helper.make_node("Cast", ["x"], ["x_low"], to=low),
            helper.make_node("MatMul", ["x_low", "weight"], ["product_low"]),
            helper.make_node("Cast", ["product_low"], ["product"], to=float32),
            helper.make_node("Sigmoid", ["product"], ["gate"]),
            helper.make_node("Mul", ["product", "gate"], ["silu"]),
            helper.make_node("Add", ["silu", "bias"], ["gated"]),
            helper.make_node("MatMul", ["x", "wide_weight"], ["wide"]),
        ]
        inputs = [
            value("x", float32, ["rows", 256]), value("weight", low, [256, 128]), value("bias", float32, [128]),
            value("wide_weight", float32, [256, 64]),
        ]  # fmt: skip
        return _model(nodes, inputs, [value("gated", float32, ["rows", 128]), value("wide", float32, ["rows", 64])])

    inputs = {
        "x": rng.standard_normal((5, 256)), "weight": rng.standard_normal((256, 128)) / 16,
        "bias": rng.standard_normal(128), "wide_weight": rng.standard_normal((256, 64)) / 16,
    }  # fmt: skip
    # A product in TF32 errs by about 3e-4 of its largest value: the limit of "wide" tells it from float32.
    return Probe(
        "product", build, inputs, low=("weight",), limits={"gated": 0.02, "wide": 2e-5},
        sizes={"x": ((1, 256), (16, 256))},
    )  # fmt: skip


def plugin_probe() -> Probe:
    """The window's update, which writes its state in place, and attention over it: both are plugins, after products."""
    rng, window, heads, width, rope_dim, chunk = np.random.default_rng(2), 32, 4, 64, 16, 3

    def build(low: int) -> onnx.ModelProto:
        float32, value = TensorProto.FLOAT, helper.make_tensor_value_info
        where = ["positions", "num_tokens"]
        nodes = [
            helper.make_node("Cast", ["x"], ["x_low"], to=low),
            helper.make_node("MatMul", ["x_low", "query_weight"], ["query_low"]),
            helper.make_node("Cast", ["query_low"], ["query_flat"], to=float32),
            helper.make_node("Reshape", ["query_flat", "query_shape"], ["query"]),
            helper.make_node("MatMul", ["x_low", "kv_weight"], ["kv_low"]),
            helper.make_node("Cast", ["kv_low"], ["kv"], to=float32),
            helper.make_node(
                "FoldkvWindowUpdate", ["past.window", "kv", *where], ["rows", "present.window"], domain=DOMAIN,
                name="update",
            ),
            helper.make_node(
                "FoldkvWindowAttention", ["query", "rows", "sinks", "inv_freq", *where], ["out"], domain=DOMAIN,
                name="attention",
            ),
        ]  # fmt: skip
        inputs = [
            value("x", float32, [1, "chunk", 128]), value("query_weight", low, [128, heads * width]),
            value("kv_weight", low, [128, width]), value("past.window", low, [1, window, width]),
            value("sinks", float32, [heads]), value("inv_freq", float32, [rope_dim // 2]),
            value("positions", TensorProto.INT32, [1]), value("num_tokens", TensorProto.INT32, [1]),
        ]  # fmt: skip
        outputs = [
            value("out", float32, [1, "chunk", heads, width]), value("present.window", low, [1, window, width]),
        ]  # fmt: skip
        inner = [
            value("query", float32, [1, "chunk", heads, width]), value("kv", float32, [1, "chunk", width]),
            value("rows", low, [1, f"chunk + {window}", width]),
        ]  # fmt: skip
        model = _model(nodes, inputs, outputs, inner)
        shape = np.array([0, 0, heads, width], np.int64)
        model.graph.initializer.append(onnx.numpy_helper.from_array(shape, "query_shape"))
        return model

    inputs = {
        "x": rng.standard_normal((1, chunk, 128)), "query_weight": rng.standard_normal((128, heads * width)) / 11,
        "kv_weight": rng.standard_normal((128, width)) / 11, "past.window": rng.standard_normal((1, window, width)),
        "sinks": rng.standard_normal(heads), "inv_freq": 10000.0 ** -np.arange(0, 1, 2 / rope_dim),
        "positions": np.array([45], np.int32), "num_tokens": np.array([chunk], np.int32),
    }  # fmt: skip
    return Probe(
        "plugin", build, inputs, low=("query_weight", "kv_weight", "past.window", "present.window"),
        limits={"out": 0.02, "present.window": 0.01}, sizes={"x": ((1, 1, 128), (1, 16, 128))},
        aliases={"present.window": "past.window"},
    )  # fmt: skip


PROBES = (product_probe, plugin_probe)


def prepare(folder: Path, progress: Progress = lambda _: None, *, sm: int = 90) -> None:
    """Write ``folder/engine``. What is slow and does not change, the compressed library, is made once."""
    out = Path(folder) / "engine"
    out.mkdir(parents=True, exist_ok=True)
    made_of = sources()
    with tempfile.TemporaryDirectory(prefix="foldkv-kit-") as scratch:
        material = Path(scratch) / "material"
        for make in PROBES:
            write_probe(make(), material / "probes", sm=sm, progress=progress)
        write_models(material / "models", Path(scratch), sm=sm, progress=progress)
        (material / "sources").write_text(made_of)
        if sources() != made_of:
            raise RuntimeError("kernels or plugins were changed while bundles were made of them; run it again")
        progress("compressing probes and bundles")
        archive(material, out / "material.tar.xz")
    write_packages(out, progress=progress)
    write_library(out, progress=progress)
    for file in sorted(out.iterdir()):
        progress(f"{file.name}: {file.stat().st_size / 2**20:.1f} MiB")


# --- probes


def write_probe(
    probe: Probe, folder: Path, *, sm: int = 90, others: Sequence[int] = OTHERS, progress: Progress = lambda _: None
) -> Path:
    """The plans of a probe, its inputs, and its outputs as ONNX Runtime computes them; returns its folder.

    ``sm`` is what the plugins' kernels are for; ``others`` are capabilities that further plans name.
    """
    where = folder / probe.name
    where.mkdir(parents=True)
    inputs = {name: _given(probe, name, array) for name, array in probe.inputs.items()}
    wide = probe.build(TensorProto.FLOAT)
    _add_bodies(wide)
    session = onnxruntime.InferenceSession(wide.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    expected = dict(zip(names, session.run(names, inputs), strict=True))

    model = probe.build(TensorProto.BFLOAT16)
    plugins, kernels = 0, None
    if any(node.domain == DOMAIN for node in model.graph.node):
        state = [{"input": "past.window", "group": "window"}]
        injection = inject_nodes(
            model, state, rope_dim=2 * len(inputs["inv_freq"]), target=engine_target(sm).name, sm=sm, dtype="bfloat16"
        )
        bundled = bundle_kernels(injection, where, progress=progress)
        assert bundled.kernels is not None
        plugins, kernels = bundled.nodes, bundled.kernels
        set_library(model, kernels.library)
    onnx.save(model, where / "model.onnx")
    shapes = {}
    for name, array in inputs.items():
        low, high = probe.sizes.get(name, (array.shape, array.shape))
        shapes[name] = [list(low), list(array.shape), list(high)]
    headers = {}
    for named in (None, *others):
        plan = where / f"{'default' if named is None else f'sm{named}'}.plan"
        progress(f"probe {probe.name}: {plan.name}")
        headers[plan.name] = build_plan(where / "model.onnx", plan, sm=named, ranges=[shapes], plugins=plugins)[
            "header"
        ]
    arrays = {f"in:{name}": _stored(probe, name, array) for name, array in inputs.items()}
    np.savez(where / "data.npz", **arrays, **{f"out:{name}": array for name, array in expected.items()})
    case = {
        "shapes": shapes, "low": list(probe.low), "limits": probe.limits, "aliases": probe.aliases, "plugins": plugins,
        "kernels": to_json(kernels), "headers": headers,
    }  # fmt: skip
    (where / "case.json").write_text(json.dumps(case, indent=1))
    return where


def _given(probe: Probe, name: str, array: Array) -> Array:
    """An input as both graphs get it: float32 values, exact in bfloat16 where the engine has it in that."""
    if array.dtype.kind == "i":
        return array
    wide = array.astype(np.float32)
    return wide.astype(_BFLOAT16).astype(np.float32) if name in probe.low or name == "x" else wide


def _stored(probe: Probe, name: str, array: Array) -> Array:
    """An input as it goes to the GPU; bfloat16 as the bits of unsigned integers, which every numpy reads."""
    return array.astype(_BFLOAT16).view(np.uint16) if name in probe.low else array


def _add_bodies(model: onnx.ModelProto) -> None:
    """The function bodies of foldkv's nodes, and of what those call."""
    known = operators()
    waiting = [known[node.op_type].function for node in model.graph.node if node.domain == DOMAIN]
    added = set()
    while waiting:
        function = waiting.pop()
        if function.name not in added:
            added.add(function.name)
            model.functions.append(function.to_function_proto())
            waiting += function.function_ir.get_called_functions().values()  # type: ignore[attr-defined]


# --- models


def engine_target(sm: int) -> Target:
    """A GPU of that compute capability."""
    found = [target for target in load_targets().values() if target.sm == sm]
    if not found:
        raise click.UsageError(f"no target has compute capability {sm / 10:.1f}; see `foldkv targets`")
    return found[0]


def write_models(folder: Path, scratch: Path, *, sm: int, progress: Progress = lambda _: None) -> None:
    """Bundles of the small model as engines, each with what the cpu bundle of the same graph computes."""
    target = dataclasses.replace(engine_target(sm), backends=("tensorrt-rtx",))
    text = load_text(None).words.encode()
    pieces = [text[1000 * i : 1000 * i + length - 1 + STEPS] for i, length in enumerate(PROMPTS)]
    prompts = [[256, *piece[:-STEPS]] for piece in pieces]
    following = [list(piece[-STEPS:]) for piece in pieces]
    limits = yardstick(prompts, following)
    for name, profile, layout, plugins in (
        ("plugins", "hf", "dense", True), ("bodies", "hf", "dense", False), ("packed", "served", "fp8+fp4", True),
    ):  # fmt: skip
        graph = scratch / f"graph-{profile}"
        if not graph.exists():
            progress(f"exporting {profile}")
            export_checkpoint(MODEL, graph, profile=profile)
        built = scratch / f"built-{name}"
        report = build_bundles(
            graph, built, ["cpu", target], plugins=plugins, layout=layout, shapes=SHAPES, jobs=1, progress=progress
        )
        failed = [result.reason for result in report.results if result.status == "failed"]
        if failed:
            raise RuntimeError("; ".join(failed))
        where = folder / name
        where.mkdir(parents=True)
        pack(built / target.name, where / "bundle")  # with its weights: the GPU's machine has no checkpoint
        progress(f"{name}: what the cpu bundle computes")
        logits, tokens = decoded(built / "cpu", prompts, following)
        np.savez(where / "expected.npz", logits=logits, tokens=tokens)
        case = {
            "prompts": prompts, "following": following, "context": CONTEXT, "layout": layout, "profile": profile,
            "plugins": plugins, "yardstick": limits,
        }  # fmt: skip
        (where / "case.json").write_text(json.dumps(case))


def decoded(bundle: Path, prompts: list[list[int]], following: list[list[int]]) -> tuple[Array, Array]:
    """Logits [steps, batch, V] after the prompts and the tokens that follow, but for the last; and greedy tokens [steps, batch]."""
    with Session(bundle, context=CONTEXT, batch=len(prompts), chunk=SHAPES.chunk[2]) as session:
        logits = [session.prefill(prompts)]
        logits += [session.decode(list(step)) for step in zip(*(row[:-1] for row in following), strict=True)]
        session.reset()
        tokens = [session.prefill(prompts).argmax(-1)]
        for _ in range(STEPS - 1):
            tokens.append(session.decode(tokens[-1].tolist()).argmax(-1))
    return np.stack(logits), np.stack(tokens)


def yardstick(prompts: list[list[int]], following: list[list[int]]) -> dict[str, Any]:
    """What transformers' logits for the tokens that follow differ by when it loads the model in bfloat16 instead of float32."""
    from foldkv.validation.runners import TransformersRunner

    reference = _following_logits(TransformersRunner(MODEL), prompts, following)
    # As anyone would load it: norms, sinks and what else transformers keeps in float32 stay so.
    subject = _following_logits(TransformersRunner(MODEL, precision="bfloat16"), prompts, following)
    figures = summary(compare_logits(reference, subject, np.concatenate(following).astype(np.int64)))
    figures["logit_rms"] = float(np.sqrt(np.mean(np.square(reference.astype(np.float64) - subject))))
    return {"of": "transformers in bfloat16, against float32, profile hf", **figures}


def _following_logits(runner: Any, prompts: list[list[int]], following: list[list[int]]) -> Array:
    rows = [runner.logits([*p, *f[:-1]])[len(p) - 1 :] for p, f in zip(prompts, following, strict=True)]
    return np.concatenate(rows)


# --- the library


def write_packages(out: Path, *, progress: Progress = lambda _: None) -> None:
    """TensorRT-RTX's Python packages for the GPU machine, without the large library."""
    version = importlib.metadata.version("tensorrt_rtx")
    stamp, packed = out / "python.json", out / "python.tar.xz"
    facts = {"tensorrt_rtx": version, "python": PYTHON, "platform": PLATFORM}
    if packed.exists() and _read(stamp) == facts:
        return
    progress(f"fetching the bindings of tensorrt_rtx {version} for Python {PYTHON}")
    with tempfile.TemporaryDirectory(prefix="foldkv-rtx-") as scratch:
        site = Path(scratch) / "site"
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version", PYTHON,
             "--implementation", "cp", "--platform", PLATFORM, "--dest", scratch, f"tensorrt_rtx_cu13_bindings=={version}"],
            check=True,
        )  # fmt: skip
        [wheel] = Path(scratch).glob("*.whl")
        zipfile.ZipFile(wheel).extractall(site)
        libraries = _package("tensorrt_rtx_libs")
        ignored = shutil.ignore_patterns("__pycache__")
        installed = libraries.parent
        for name in ("tensorrt_rtx", f"tensorrt_rtx-{version}.dist-info"):
            shutil.copytree(installed / name, site / name, ignore=ignored)
        # The bindings are linked to the parser too.
        shutil.copytree(
            libraries, site / libraries.name, ignore=shutil.ignore_patterns("__pycache__", "libtensorrt_rtx.so*")
        )
        archive(site, packed)
    stamp.write_text(json.dumps(facts))


def write_library(out: Path, *, progress: Progress = lambda _: None) -> None:
    """``libtensorrt_rtx.so.1``, compressed."""
    source = _package("tensorrt_rtx_libs") / "libtensorrt_rtx.so.1"
    content = source.read_bytes()
    facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    if (out / PACKED).exists() and facts.items() <= (_read(out / "library.json") or {}).items():
        return
    progress(f"compressing {source.name}, which takes minutes")
    filters = [
        {"id": lzma.FILTER_X86},
        {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 256 << 20, "nice_len": 273},
    ]
    packed = lzma.compress(content, lzma.FORMAT_XZ, filters=filters)
    (out / PACKED).write_bytes(packed)
    (out / "library.json").write_text(json.dumps(facts | {"packed": len(packed)}))


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.submodule_search_locations, f"{name} is not installed"
    return Path(next(iter(spec.submodule_search_locations)))


def _read(path: Path) -> Any:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return None


@click.command(help=__doc__)
@click.option("-o", "--out", type=click.Path(path_type=Path), default=DEFAULT_PARCEL, help="The parcel's folder.")
@click.option("--sm", default=90, show_default=True, help="Compute capability of the GPU.")
def main(out: Path, sm: int) -> None:
    """Write what the step needs."""
    prepare(out, click.echo, sm=sm)


if __name__ == "__main__":
    main()
