"""Does TensorRT-RTX run our engines on this GPU? ``python benchmarks/gpu/step_engine.py -o OUT/engine.json``

One row per check: the library's import; a probe without plugins and one with two; bundles of the small model through
:class:`foldkv.runtime.session.Session`; and what the library says of plans for other GPUs and of a build on this one. Every
check is a child process with a time limit, so that a crash or a hang in native code ends that check alone. A row says where
the check stopped, why, and what the library logged.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from checks import Check, Notes, child, run_check
from kit import ROOT, no_gpu, parcel, recorded

from foldkv.plugins.cuda import check, cuda_driver, device_capability

Array = npt.NDArray[Any]

PACKED = "library.xz"
LIBRARY = "libtensorrt_rtx.so.1"
#: Where files are unpacked, if FOLDKV_GPU_RTX names no other folder; it is kept between calls.
UNPACKED = Path(tempfile.gettempdir()) / "foldkv-rtx"
#: Seconds that a check may take. A first run compiles kernels on the GPU.
LIMITS = {"import": 60, "probe": 90, "model": 150, "native": 90}


def root() -> Path:
    """The folder of unpacked files."""
    return Path(os.environ.get("FOLDKV_GPU_RTX", UNPACKED))


def sources() -> str:
    """A digest of the code that must be the same where bundles are made and where they run: plans of launches and kernels."""
    digest = hashlib.sha256()
    for folder in ("plugins", "plugins/kernels"):
        for file in sorted((ROOT / folder).glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


# --- unpacking


def unpack(source: Path, target: Path) -> dict[str, Any]:
    """Unpack what of the parcel is here and is not unpacked yet.

    Returns:
        Seconds by what was unpacked, and ``missing``: names of the files that have not come yet.
    """
    target.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {"missing": []}
    for name, folder in (("material.tar.xz", "material"), ("python.tar.xz", "site")):
        start = time.monotonic()
        stamp = target / f"{folder}.done"
        if not (source / name).exists():
            facts["missing"] += [] if stamp.exists() else [name]
        elif not stamp.exists() or stamp.read_text() != _digest(source / name):
            stamp.unlink(missing_ok=True)
            if folder != "site":  # the library is in that one
                shutil.rmtree(target / folder, ignore_errors=True)
            with tarfile.open(source / name, "r:xz") as archive:
                archive.extractall(target / folder, filter="data")
            stamp.write_text(_digest(source / name))
            facts[name] = round(time.monotonic() - start, 2)
    for name in (PACKED, "library.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
    facts["missing"] += [name for name in (PACKED, "library.json") if not (target / name).exists()]
    if not facts["missing"]:
        facts |= _unpack_library(target)
    return facts


def unpacked() -> dict[str, Any]:
    """Unpack all that the parcel has for engines, and check it; returns how long what took.

    Raises:
        FileNotFoundError: files have not come yet.
        RuntimeError: bundles were made with other kernels than are here.
    """
    facts = unpack(parcel() / "engine", root())
    if facts["missing"]:
        raise FileNotFoundError(f"not here yet: {', '.join(facts['missing'])}; the parcel is not complete")
    check_sources(root() / "material")
    return facts


def check_sources(material: Path) -> None:
    """Check that bundles were made with the kernels and plugins that are here.

    Raises:
        RuntimeError: with others.
    """
    made_of = material / "sources"
    if not made_of.exists() or made_of.read_text() != sources():
        raise RuntimeError("the bundles were made with other kernels than are here: run prepare.py again")


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _unpack_library(target: Path) -> dict[str, Any]:
    wanted = json.loads((target / "library.json").read_text())
    folder = target / "site" / "tensorrt_rtx_libs"
    file, link = folder / LIBRARY, folder / "libtensorrt_rtx.so"
    facts = {}
    if not file.exists() or file.stat().st_size != wanted["bytes"]:
        start = time.monotonic()
        content = lzma.decompress((target / PACKED).read_bytes())
        if hashlib.sha256(content).hexdigest() != wanted["sha256"]:
            raise RuntimeError(f"{LIBRARY} is not the one that was packed: run prepare.py again")
        scratch = folder / f"{LIBRARY}.part"
        scratch.write_bytes(content)
        scratch.replace(file)
        facts["library"] = round(time.monotonic() - start, 2)
    if not link.exists():  # the parser opens the library by this name
        link.symlink_to(LIBRARY)
    return facts


# --- comparison


def compare(
    found: Mapping[str, Array], expected: Mapping[str, Array], limits: Mapping[str, float]
) -> tuple[dict[str, Any], str]:
    """The largest error of every output over the largest value expected there, beside its limit; and what failed, or ""."""
    row: dict[str, Any] = {}
    failures = []
    for name, wanted in expected.items():
        given = found.get(name)
        if given is None or given.shape != wanted.shape:
            failures.append(f"{name} has shape {None if given is None else given.shape}; expected {wanted.shape}")
            continue
        error = float(np.abs(given.astype(np.float64) - wanted).max() / max(np.abs(wanted).max(), 1e-30))
        row[name] = {"error": error, "limit": limits[name]}
        if not error <= limits[name]:  # also not a number
            failures.append(f"{name} is off by {error:.3g} of its largest value; the limit is {limits[name]:.3g}")
    return row, "; ".join(failures)


def widened(bits: Array) -> Array:
    """float32 values of bfloat16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


# --- what the children do


def open_library(notes: Notes) -> tuple[Any, Any]:
    """The module ``tensorrt_rtx`` and a runtime of it."""
    notes.at("importing tensorrt_rtx")
    import tensorrt_rtx as trt

    from foldkv.runtime.engine_model import library_logger

    notes.at("making a runtime")
    return trt, trt.Runtime(library_logger(trt))


def open_device(notes: Notes) -> Any:
    """The driver, with the first GPU's context current."""
    notes.at("opening the GPU")
    driver = cuda_driver()
    device = check(driver, driver.cuDeviceGet(0))
    check(driver, driver.cuCtxSetCurrent(check(driver, driver.cuDevicePrimaryCtxRetain(device))))
    return driver


def import_check(notes: Notes) -> str:
    """The library loads and makes a runtime."""
    start = time.monotonic()
    trt, runtime = open_library(notes)
    import importlib.metadata

    notes.keep(
        version=trt.__version__, distribution=importlib.metadata.version("tensorrt_rtx"), seconds=time.monotonic() - start,
        capabilities=list(trt.ComputeCapability.__members__), runtime=type(runtime).__name__,
    )  # fmt: skip
    open_device(notes)
    notes.keep(capability=device_capability())
    return ""


def probe_check(notes: Notes, name: str, plan_name: str) -> str:
    """A probe's plan, run once and compared: the forward-compatible one ("default"), or one that names another GPU."""
    folder = root() / "material" / "probes" / name
    notes.at("reading the probe")
    case = json.loads((folder / "case.json").read_text())
    plan = (folder / f"{plan_name}.plan").read_bytes()
    notes.keep(header=case["headers"][f"{plan_name}.plan"])
    trt, runtime = open_library(notes)
    register(trt, case)
    driver = open_device(notes)
    load_kernels(notes, driver, folder, case)
    return run_probe(notes, trt, runtime, driver, plan, folder, case)


def register(trt: Any, case: Mapping[str, Any]) -> None:
    """Register the plugins, if a probe has any."""
    if case["plugins"]:
        from foldkv.plugins.tensorrt import register_plugins

        register_plugins(trt)


def load_kernels(notes: Notes, driver: Any, folder: Path, case: Mapping[str, Any]) -> None:
    """Load the kernels of a probe's plugins, if it has any."""
    if case["plugins"]:
        from foldkv.manifests import Kernels
        from foldkv.plugins.tensorrt import provide_kernels
        from foldkv.records import from_json
        from foldkv.runtime.plugin_check import bundle_kernels

        notes.at("loading kernels")
        kernels = from_json(Kernels, case["kernels"], title=f"{folder} has no kernels", step="Prepare the kit again.")
        provide_kernels(kernels.library, bundle_kernels(folder, kernels), driver=driver)


def run_probe(
    notes: Notes, trt: Any, runtime: Any, driver: Any, plan: bytes, folder: Path, case: Mapping[str, Any]
) -> str:
    """Deserialise a plan, run it on the probe's inputs, compare its outputs; what failed, or ""."""
    from foldkv.runtime.engine_model import library_logger

    logger = library_logger(trt)
    logger.reasons()
    notes.at("deserialising the plan")
    start = time.monotonic()
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise RuntimeError(f"the plan was refused: {logger.reasons()}")
    notes.keep(deserialised_s=time.monotonic() - start, tensors=_tensors(engine))
    notes.at("making an execution context")
    start = time.monotonic()
    context = engine.create_execution_context()
    if context is None:
        raise RuntimeError(f"no execution context: {logger.reasons()}")
    notes.keep(context_s=time.monotonic() - start)
    data = np.load(folder / "data.npz")
    inputs = {name[3:]: np.ascontiguousarray(data[name]) for name in data.files if name.startswith("in:")}
    expected = {name[4:]: data[name] for name in data.files if name.startswith("out:")}
    notes.at("binding inputs and outputs")
    stream = int(check(driver, driver.cuStreamCreate(0)))
    addresses: dict[str, int] = {}
    for name, array in inputs.items():
        if not context.set_input_shape(name, tuple(array.shape)):
            raise RuntimeError(f"shape {array.shape} of {name} was refused: {logger.reasons()}")
        if engine.get_tensor_location(name) == trt.TensorLocation.HOST:
            addresses[name] = array.ctypes.data
        else:
            addresses[name] = int(check(driver, driver.cuMemAlloc(array.nbytes)))
            check(driver, driver.cuMemcpyHtoD(addresses[name], array.ctypes.data, array.nbytes))
    outputs: dict[str, Array] = {}
    for name, array in expected.items():
        outputs[name] = np.zeros(array.shape, np.uint16 if name in case["low"] else array.dtype)
        alias = case["aliases"].get(name)
        addresses[name] = addresses[alias] if alias else int(check(driver, driver.cuMemAlloc(outputs[name].nbytes)))
    for name, address in addresses.items():
        if not context.set_tensor_address(name, address):
            raise RuntimeError(f"the address of {name} was refused: {logger.reasons()}")
    notes.at("running")
    start = time.monotonic()
    if not context.execute_async_v3(stream):
        raise RuntimeError(f"the run was refused: {logger.reasons()}")
    check(driver, driver.cuStreamSynchronize(stream))
    notes.keep(run_s=time.monotonic() - start)
    notes.at("comparing")
    for name, array in outputs.items():
        check(driver, driver.cuMemcpyDtoH(array.ctypes.data, addresses[name], array.nbytes))
    row, failure = compare(
        {name: widened(array) if name in case["low"] else array for name, array in outputs.items()},
        expected,
        case["limits"],
    )
    notes.keep(outputs=row)
    return failure


def _tensors(engine: Any) -> list[list[str]]:
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    return [
        [name, *(str(value).rsplit(".", 1)[-1] for value in (
            engine.get_tensor_dtype(name), tuple(engine.get_tensor_shape(name)), engine.get_tensor_location(name),
        ))]
        for name in names
    ]  # fmt: skip


def model_check(notes: Notes, name: str) -> str:
    """A bundle of the small model, through a session, beside what the cpu bundle of its graph computed."""
    from foldkv.runtime.session import Session

    folder = root() / "material" / "models" / name
    notes.at("reading the bundle")
    case = json.loads((folder / "case.json").read_text())
    expected = np.load(folder / "expected.npz")
    notes.keep(**{key: case[key] for key in ("layout", "profile", "plugins", "yardstick")})
    open_library(notes)
    open_device(notes)
    notes.at("opening a session")
    start = time.monotonic()
    with Session(folder / "bundle", context=case["context"], batch=len(case["prompts"])) as session:
        notes.keep(load_s=time.monotonic() - start, state_bytes=session.state_bytes, **runs_through(session))
        return follow(notes, session, case, expected["logits"], expected["tokens"])


def runs_through(session: Any) -> dict[str, Any]:
    """What a session runs through: the runtime's classes, and the segments of the chain in their order."""
    model = session.model._loaded  # the engines, which no service needs to see
    return {
        "runs_through": [type(one).__name__ for one in (session, model, model.parts[0])],
        "chain": [call.owner for part in model.parts for call in part.calls],
    }


def follow(notes: Notes, session: Any, case: Mapping[str, Any], logits: Array, tokens: Array) -> str:
    """Compare a session with what is expected of a model's case; what failed, or "".

    Args:
        notes: keep the figures.
        session: empty.
        case: prompts, the text that follows them, and the yardstick of its logits.
        logits: [steps, batch, V] along that text.
        tokens: [steps, batch] that greedy decoding gives after the prompts.
    """
    from foldkv.validation.metrics import compare_logits, summary

    failures = []
    prompts, yardstick = case["prompts"], case["yardstick"]
    text = [list(step) for step in zip(*case["following"], strict=True)]
    notes.at("prefill")
    start = time.monotonic()
    found = [session.prefill(prompts)]
    notes.keep(prefill_s=time.monotonic() - start)
    notes.at("decoding the text that follows")
    found += [session.decode(step) for step in text[:-1]]
    given = np.stack(found)
    vocabulary = logits.shape[-1]
    figures = summary(compare_logits(
        logits.reshape(-1, vocabulary), given.reshape(-1, vocabulary), np.array(text, np.int64).reshape(-1)
    ))  # fmt: skip
    figures["logit_rms"] = float(np.sqrt(np.mean(np.square(given.astype(np.float64) - logits))))
    by_step = np.abs(given.astype(np.float64) - logits).max(axis=(1, 2))
    notes.keep(figures=figures, logit_error_by_step=[round(float(error), 4) for error in by_step])
    for name in ("kl_mean", "logit_rms"):
        if not figures[name] <= yardstick[name]:
            failures.append(f"{name} is {figures[name]:.3g}; {yardstick['of']} has {yardstick[name]:.3g}")

    notes.at("going back to a snapshot")
    snapshot = session.snapshot()
    ahead = [session.decode(step) for step in text[:3]]
    session.restore(snapshot)
    again = [session.decode(step) for step in text[:3]]
    same = all(np.array_equal(one, other) for one, other in zip(ahead, again, strict=True))
    notes.keep(restored_same_bits=same, snapshot_bytes=snapshot.bytes)
    if not same:
        failures.append("after a snapshot was restored the same steps gave other bits")

    notes.at("decoding its own tokens")
    session.reset()
    own, seconds = [session.prefill(prompts).argmax(-1)], []
    for _ in range(len(tokens) - 1):
        start = time.perf_counter()
        after = session.decode(own[-1].tolist())  # the logits come back to the host, so it has waited for them
        seconds.append(time.perf_counter() - start)
        own.append(after.argmax(-1))
    agree = np.stack(own) == tokens
    prefix = [int(np.argmin(column)) if not column.all() else len(column) for column in agree.T]
    notes.keep(
        step_ms=1e3 * float(np.median(seconds)), first_step_ms=1e3 * seconds[0], tokens=int(tokens.size),
        tokens_alike=int(agree.sum()), alike_until=prefix,
    )  # fmt: skip
    return "; ".join(failures)


def native_check(notes: Notes, name: str, capability: str) -> str:
    """A probe whose plan is built on this machine, for the ``CURRENT`` device or with no capability named ("default")."""
    from foldkv.optimize.plan_file import read_plan_header

    folder = root() / "material" / "probes" / name
    case = json.loads((folder / "case.json").read_text())
    trt, runtime = open_library(notes)
    register(trt, case)
    notes.at("building a plan")
    start = time.monotonic()
    plan = build_here(trt, folder / "model.onnx", case, capability)
    notes.keep(built_s=time.monotonic() - start, header=read_plan_header(plan))
    driver = open_device(notes)
    load_kernels(notes, driver, folder, case)
    return run_probe(notes, trt, runtime, driver, plan, folder, case)


def build_here(trt: Any, model: Path, case: Mapping[str, Any], capability: str) -> bytes:
    """A plan of a probe, built in this process."""
    from foldkv.runtime.engine_model import library_logger

    logger = library_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(model)):
        raise RuntimeError("; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    if capability != "default":
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        name = network.get_input(index).name
        profile.set_shape(name, *case["shapes"][name])
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError(f"the build failed: {logger.reasons()}")
    return bytes(memoryview(plan))


CHECKS: dict[str, Check] = {
    "import": import_check, "probe": probe_check, "model": model_check, "native": native_check
}  # fmt: skip


# --- the parent


def use_library() -> None:
    """Let this process import the library's Python packages from where they were unpacked."""
    sys.path.insert(0, str(root() / "site"))


def environment() -> dict[str, str]:
    """The environment of a child: the parser opens the library by a name that the loader must find."""
    found = dict(os.environ)
    paths = [str(root() / "site" / "tensorrt_rtx_libs"), found.get("LD_LIBRARY_PATH", "")]
    found["LD_LIBRARY_PATH"] = os.pathsep.join(path for path in paths if path)
    return found


def engine_check(name: str, limit: float) -> tuple[dict[str, Any], str]:
    """Run a check in a child process: its row, and why it failed, or ""."""
    row, failure = run_check(Path(__file__), name, limit, environment())
    if informative(name):
        said = failure.removeprefix(f"{name}: ") or ("" if "no_gpu" in row else "runs, and computes what is expected")
        return row | {"said": said}, ""
    return row, failure


def checks() -> list[tuple[str, float]]:
    """The checks in their order, with their time limits."""
    material = root() / "material"
    names = ["import", "probe:product:default", "probe:plugin:default"]
    names += [f"model:{name}" for name in ("plugins", "bodies", "packed") if (material / "models" / name).exists()]
    for probe in ("product", "plugin"):
        names += [f"native:{probe}:{capability}" for capability in ("default", "CURRENT")]
        others = sorted((material / "probes" / probe).glob("sm*.plan"))
        names += [f"probe:{probe}:{plan.stem}" for plan in others]
    return [(name, LIMITS[name.split(":")[0]]) for name in names]


def informative(name: str) -> bool:
    """Whether a check only records what the library says: plans for other GPUs, and plans that are built here."""
    return name.startswith("native:") or (name.startswith("probe:") and not name.endswith(":default"))


@click.command(help=__doc__)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The result file.")
@click.option(
    "--budget", type=float, default=140, show_default=True, help="Seconds for all checks; later ones are left out."
)
@click.option("--only", multiple=True, help="Run this check alone; may be given again.")
@click.option("--child", "one", hidden=True)
@click.option("--folder", type=click.Path(path_type=Path), hidden=True)
def main(out: Path | None, budget: float, only: tuple[str, ...], one: str | None, folder: Path | None) -> None:
    """Run the step, or one check of it."""
    if one is not None:
        assert folder is not None
        use_library()
        child(one, folder, CHECKS)
    if out is None:
        raise click.UsageError("give the result file: -o FILE")
    start = time.monotonic()
    with recorded(out, "engine", "TensorRT-RTX engines that name no compute capability, run on this GPU") as recorder:
        recorder.fact(capability=device_capability())
        recorder.fact(unpacking=unpacked())
        for name, limit in checks():
            left = budget - (time.monotonic() - start)
            if only and name not in only:
                continue
            if left < 10:
                recorder.add({"check": name, "left_out": "no time was left"})
                continue
            row, failure = engine_check(name, min(limit, left))
            recorder.add(row, failure=failure)
        no_gpu(recorder)


if __name__ == "__main__":
    main()
