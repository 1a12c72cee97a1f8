"""How long do one CSA and one HCA layer of V4-Flash and V4-Pro take, at full width? ``python benchmarks/gpu/step_layers.py -o OUT/layers.json``

The runtime that services use decodes with a model that is cut to one layer of each kind of attention: a session over its
engines, layout fp8+fp4. Its weights are random, in the released formats, in files that are made here. Events between the calls of
a step give the time of every layer, in steps that are enqueued and in steps that are replayed from a CUDA graph. The bits of
both must be equal, and logits finite.

The state of a long context is synthetic: rows that a prefill of a few tokens wrote, repeated up to the context. All sequences of a
batch have the same rows and different tokens.

The floor of a layer is the bytes that a step must read, over the copy bandwidth of the same run. Several sequences read as many
experts as independent choices give on average. The time of a whole model is an EXTRAPOLATION: the time of each kind of
layer, times the number of its layers, plus embedding, head and the step's own segment. Nobody ran the whole model.

For each model four checks run, each in a child process: whether the engines load on this GPU, the weights, the layers, and the kernels of a
layer's plugins alone (``layer_kernels.py``). Where engines do not load, no weights are made, and the last check is what is left.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from checks import Check, Notes, child, run_check
from kit import ROOT, Recorder, no_gpu, parcel, recorded
from layer_times import Floors, LayerTimes, Sizes
from marks import Marks
from step_engine import check_sources, environment, open_library, root, runs_through, unpacked, use_library

from foldkv.errors import InputError
from foldkv.export.checkpoint.config_reader import spec_from_config
from foldkv.export.contract.engine_set import ENGINES, EngineTable
from foldkv.plugins.cuda import Device, device_capability
from foldkv.runtime import Model, Session
from foldkv.runtime.bundle import load_bundle
from foldkv.runtime.engine_part import EnginePart
from foldkv.runtime.plugin_check import bundle_kernels

Run = Callable[[str, float], tuple[dict[str, Any], str]]

EXTRAPOLATED = (
    "the time of each kind of layer times the number of its layers, plus embedding, head and the step's own segment; "
    "nobody ran the whole model"
)
WHAT = "one layer of each kind of V4-Flash and V4-Pro at full width, random weights, through the runtime of services"
CASE = "case.json"
_BANDWIDTH = "copy_gb_s"
#: Where weights are written, if FOLDKV_GPU_WEIGHTS names no other folder; they are deleted after each model.
WRITTEN = Path(tempfile.gettempdir()) / "foldkv-layer-weights"
#: Seconds that a check may take; the first use of an engine compiles kernels. The weights are 13 GB of V4-Flash and 31 GB of V4-Pro.
LIMITS = {"plans": 30, "weights": 70, "layers": 110, "kernels": 50}
#: Checks of a model in their order. Of a row of them the later ones need the earlier ones.
_ROWS = (("plans", "weights", "layers"), ("kernels",))


# --- where things are


def material(name: str) -> Path:
    """The folder of what was prepared for a model."""
    return root() / "layers" / name


def weights_folder(name: str) -> Path:
    """The folder of a model's random weights."""
    return Path(os.environ.get("FOLDKV_GPU_WEIGHTS", WRITTEN)) / name


def read_case(name: str) -> dict[str, Any]:
    """What was prepared for a model."""
    case: dict[str, Any] = json.loads((material(name) / CASE).read_text())
    return case


def unpack_models() -> list[str]:
    """Unpack every model of the parcel; returns their names.

    Raises:
        FileNotFoundError: there is none.
        RuntimeError: bundles were made with other kernels than are here.
    """
    files = sorted((parcel() / "layers").glob("*.tar.xz"))
    if not files:
        raise FileNotFoundError(f"{parcel() / 'layers'} has no engines of layers; the parcel is not complete")
    names = [file.name.removesuffix(".tar.xz") for file in files]
    for name, file in zip(names, files, strict=True):
        shutil.rmtree(material(name), ignore_errors=True)
        with tarfile.open(file, "r:xz") as packed:
            packed.extractall(material(name), filter="data")
        check_sources(material(name))
    return names


# --- what the children do


def plans_check(notes: Notes, name: str) -> str:
    """The engines load on this GPU, with their kernels."""
    notes.at("reading the bundle")
    bundle = load_bundle(material(name) / "bundle")
    table = EngineTable.read(bundle.folder / ENGINES)
    trt, _ = open_library(notes)
    from foldkv.runtime.engine_model import library_logger

    notes.at("opening the GPU")
    device = Device()
    try:
        notes.at("loading kernels and engines")
        start, kernels = time.monotonic(), bundle.manifest.kernels
        images = () if kernels is None else tuple(bundle_kernels(bundle.folder, kernels))
        part = EnginePart(bundle, table, trt, library_logger(trt), device, table.calls, images)
        notes.keep(load_s=time.monotonic() - start, engines=list(part.engines))
        part.close()
    finally:
        device.close()
    return ""


def too_large(notes: Notes, name: str) -> bool:
    """Whether this GPU cannot hold a model's weights, with a note."""
    notes.at("opening the GPU")
    device = Device()
    memory, need = device.memory_bytes(), EngineTable.read(material(name) / "bundle" / ENGINES).weight_bytes
    device.close()
    if need >= memory:
        notes.keep(not_measured=[{"model": name, "why": f"weights of {need} bytes; the GPU has {memory}"}])
    return need >= memory


def weights_check(notes: Notes, name: str) -> str:
    """Make the files with random weights, and measure how fast this GPU copies."""
    notes.at("importing torch")
    from device import gpu
    from random_weights import write_weights
    from step_speed import copy_bandwidth

    if too_large(notes, name):
        return ""
    device = gpu()
    notes.at("measuring copies")
    bandwidth = copy_bandwidth(device)
    folder = weights_folder(name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start, size = time.monotonic(), 0
    for header in sorted((material(name) / "headers").iterdir()):
        notes.at(f"writing {header.name}")
        size += write_weights(folder / header.name, header.read_bytes(), device=device.torch_device)
    (folder / _BANDWIDTH).write_text(str(bandwidth / 1e9))
    notes.keep(copy_gb_s=bandwidth / 1e9, bytes=size, write_s=time.monotonic() - start)
    return ""


def layers_check(notes: Notes, name: str) -> str:
    """Decode with the cut model: a row for every context and batch, and for the chunks of one sequence."""
    notes.at("reading the bundle")
    case, folder = read_case(name), material(name)
    sizes, spec = Sizes(**case["sizes"]), spec_from_config(case["config"])
    floors = Floors(folder / "bundle", spec)
    open_library(notes)
    if too_large(notes, name):
        return ""
    notes.at("reading the copy bandwidth")
    bandwidth = 1e9 * float((weights_folder(name) / _BANDWIDTH).read_text())
    notes.at("copying weights to the GPU")
    start, rows, lacking, failures = time.monotonic(), list[Any](), list[Any](), list[str]()
    with Model(
        folder / "bundle", weights_from=weights_folder(name), context=max(sizes.contexts), batch=max(sizes.batches)
    ) as model:
        [part] = model._loaded.parts  # of no concern to services: the engines, to mark when their calls end
        notes.keep(load_s=time.monotonic() - start, weight_bytes=part.weight_bytes, copy_gb_s=bandwidth / 1e9)
        with Marks(part) as marks:
            for context, batch in itertools.product(sizes.contexts, sizes.batches):
                place = {"model": name, "context": context, "batch": batch}
                notes.at(f"opening a session of context {context}, batch {batch}")
                with contextlib.ExitStack() as opened:
                    try:
                        session = opened.enter_context(Session(model, context=context, batch=batch, chunk=sizes.chunk))
                    except InputError as error:  # it does not fit in this GPU's memory
                        lacking.append(place | {"why": str(error)})
                        notes.keep(not_measured=lacking)
                        continue
                    notes.keep(**runs_through(session))
                    times = LayerTimes(notes, session, marks, case, sizes)
                    begin = times.begin(spec)
                    row, found = times.decode(begin, floors, bandwidth)
                    failures += [f"context {context}, batch {batch}: {one}" for one in found]
                    rows.append(place | row)
                    notes.keep(rows=rows)
                    if batch == min(sizes.batches):
                        rows.append(place | times.chunk(begin))
                        notes.keep(rows=rows)
    return "; ".join(failures)


def kernels_check(notes: Notes, name: str) -> str:
    """Launch the kernels of a layer's plugins: a row for every context and batch."""
    notes.at("importing torch")
    import torch
    from device import gpu
    from layer_kernels import layer_calls, layer_row
    from step_speed import copy_bandwidth, models

    notes.at("reading the bundle")
    case, folder = read_case(name), material(name)
    sizes, short = Sizes(**case["sizes"]), spec_from_config(case["config"])
    floors = Floors(folder / "bundle", short)
    geometry, spec = next(pair for pair in models(ROOT) if pair[0].name == name)
    notes.at("opening the GPU")
    device = gpu()
    notes.at("measuring copies")
    bandwidth, rows, lacking = copy_bandwidth(device), list[Any](), list[Any]()
    for context, batch in itertools.product(sizes.contexts, sizes.batches):
        segments = {}
        place = {"model": name, "context": context, "batch": batch, "step": "kernels"}
        for segment, kind in case["kinds"].items():
            notes.at(f"context {context}, batch {batch}: launching the kernels of {segment}")
            try:  # no call outlives this: the next layer's weights need the room
                row = layer_row(device, layer_calls(device, geometry, spec, kind, floors.layout, context, batch))
            except torch.OutOfMemoryError as error:
                lacking.append(place | {"segment": segment, "why": str(error).splitlines()[0]})
                notes.keep(not_measured=lacking)
                torch.cuda.empty_cache()
                continue
            floor = floors.of_segment(segment, context, batch)
            floor_ms = 1e3 * sum(floor.values()) / bandwidth
            segments[segment] = {"kind": kind, **row, "floor_bytes": floor, "floor_ms": floor_ms,
                                 "share_of_floor": floor_ms / row["ms"], "in_model": case["counts"][segment]}  # fmt: skip
        if len(segments) < len(case["kinds"]):
            continue
        whole = {key: sum(one["in_model"] * one[key] for one in segments.values()) for key in ("ms", "floor_ms")}
        rows.append(place | {"segments": segments, "extrapolated": {"layers": case["layers"], **whole}})
        notes.keep(rows=rows, copy_gb_s=bandwidth / 1e9)
    return ""


CHECKS: dict[str, Check] = {
    "plans": plans_check, "weights": weights_check, "layers": layers_check, "kernels": kernels_check
}  # fmt: skip


# --- the parent


def layers_run(name: str, limit: float) -> tuple[dict[str, Any], str]:
    """Run a check in a child process: its row, and why it failed, or ""."""
    return run_check(Path(__file__), name, limit, environment())


def measure(recorder: Recorder, names: Sequence[str], run: Run, *, budget: float) -> None:
    """The checks of every model, a row for each and one for everything that was measured.

    Checks that need one that failed are left out, and all that are left when there is no time.

    Args:
        recorder: of the step.
        names: of the models.
        run: a check with its limit in seconds.
        budget: seconds for all of it.
    """
    end = time.monotonic() + budget
    for name in names:
        for kinds in _ROWS:
            for kind in kinds:
                check, left = f"{kind}:{name}", end - time.monotonic()
                if left < 10:
                    recorder.add({"check": check, "left_out": "no time was left"})
                    continue
                row, failure = run(check, min(LIMITS[kind], left))
                for measured in row.pop("rows", []):
                    recorder.add(measured)
                recorder.add(row, failure=failure)
                if failure:
                    break
            shutil.rmtree(weights_folder(name), ignore_errors=True)


@click.command(help=__doc__)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The result file.")
@click.option("--budget", type=float, default=200, show_default=True, help="Seconds for all checks.")
@click.option("--child", "one", hidden=True)
@click.option("--folder", type=click.Path(path_type=Path), hidden=True)
def main(out: Path | None, budget: float, one: str | None, folder: Path | None) -> None:
    """Run the step, or one check of it."""
    if one is not None:
        assert folder is not None
        use_library()
        child(one, folder, CHECKS)
    if out is None:
        raise click.UsageError("give the result file: -o FILE")
    with recorded(out, "layers", WHAT) as recorder:
        recorder.fact(capability=device_capability(), extrapolated=EXTRAPOLATED)
        recorder.fact(unpacking=unpacked())
        measure(recorder, unpack_models(), layers_run, budget=budget)
        no_gpu(recorder)


if __name__ == "__main__":
    main()
