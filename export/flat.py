"""The whole model as one ONNX file, with its weights beside it: a view for Netron, other tools and plain ONNX Runtime.

It is stitched from the segments (export/stitch.py), with one function per kind of layer. Weights that the graph takes as
they lie are read from the checkpoint's files, which are linked into the folder; ONNX Runtime accepts no location outside
of it. Where no link is possible they are copied. Weights that no file has in one piece are joined into a file of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from .. import __version__
from ..artifact import scratch_folder, staged
from ..manifests import FlatManifest, write
from ..progress import BYTES, Progress, Say, silent
from .contract.lock import Weight, WeightsLock
from .contract.profiles import HF
from .contract.weights import EXPERTS
from .files import place_file
from .in_place import Rows, in_place_rows, row_weight, take_rows
from .package import CONFIG, Package, export_checkpoint, read_package
from .roles import onnx_dtype
from .segments import STEP
from .stitch import flat_name, read_parts, stitched

MODEL, FOLDER, JOINED = "model.onnx", "weights", "weights/joined.bin"
_ALIGNMENT = 64


def export_flat(
    checkpoint: Path,
    out: Path,
    *,
    profile: str = HF,
    allow_unknown_keys: Sequence[str] = (),
    progress: Say = silent,
) -> Path:
    """Write ``out/model.onnx`` and its weights; returns the path of the model.

    Arguments and errors are those of :func:`foldkv.export.package.export_checkpoint`.
    """
    report = Progress.of(progress)
    with scratch_folder("flat") as scratch:
        graph = export_checkpoint(
            checkpoint,
            scratch / "graph",
            profile=profile,
            allow_unknown_keys=allow_unknown_keys,
            progress=progress,
        )
        package = read_package(graph)
        files = package.lock.find([Path(checkpoint)])
        with staged(Path(out), kind=FlatManifest.KIND) as folder:
            report("stitching the segments")
            heads = _write(package, files, folder, report)
            (folder / CONFIG).write_bytes((graph / CONFIG).read_bytes())
            of = package.manifest
            write(folder, FlatManifest(
                foldkv_version=__version__, tool_versions=of.tool_versions, profile=of.profile, inputs=of.inputs, spec=of.spec,
                model=of.model, io=of.io, state=of.state, operators=of.operators,
            ), heads=heads)  # fmt: skip
    return Path(out) / MODEL


def _write(package: Package, files: Mapping[str, Path], folder: Path, report: Progress) -> dict[str, int]:
    """Write the graph and put its weights beside it; returns the size of the header of every file that was linked."""
    segments = {name: package.segment(name) for name in package.manifest.segments}
    weights = {owner: dict(roles) for owner, roles in package.lock.weights.items()}
    slots: dict[str, tuple[int, ...]] = {}
    for name, segment in segments.items():
        owners = [owner for owner, kind in package.calls() if kind == name]
        rows = in_place_rows(package.lock, owners, EXPERTS) if name != STEP else {}
        if rows:
            take_rows(segment.model, EXPERTS, *next(iter(rows.values())))
            segments[name] = replace(segment, weights=(*segment.weights, f"{EXPERTS}.slots"))
        for owner, pair in rows.items():
            slots |= _use_rows(weights[owner], owner, pair)
    model = stitched(package, segments, replace(package.lock, weights=weights))
    named = {flat_name(owner, role): weight for owner, roles in weights.items() for role, weight in roles.items()}
    _bind(model, named, slots, files, folder)
    ir.save(model, folder / MODEL)
    return _link(package.lock, files, named, folder, report)


def _use_rows(roles: dict[str, Weight], owner: str, pair: tuple[Rows, Rows]) -> dict[str, tuple[int, ...]]:
    for part, rows in zip(("codes", "scales"), pair, strict=True):
        role = f"{EXPERTS}.{part}"
        roles[role] = row_weight(roles[role], rows)
    table = f"{EXPERTS}.slots"
    roles[table] = Weight("I64", (len(pair[0].slots),), ())
    return {flat_name(owner, table): pair[0].slots}


def _bind(
    model: ir.Model, named: Mapping[str, Weight], slots: Mapping[str, tuple[int, ...]], files: Mapping[str, Path], folder: Path
) -> None:  # fmt: skip
    """Turn weights into initializers; what no file has in one piece is written to a file of the folder."""
    (folder / FOLDER).mkdir()
    at = 0
    with (folder / JOINED).open("wb") as out:
        for value in [value for value in model.graph.inputs if value.name in named]:
            name = value.name or ""
            weight, dtype = named[name], onnx_dtype(named[name])
            model.graph.inputs.remove(value)
            if name in slots:
                value.const_value = ir.tensor(list(slots[name]), dtype=ir.DataType.INT64, name=name)
            elif len(weight.parts) == 1:
                [part] = weight.parts
                value.const_value = _external(f"{FOLDER}/{part.file}", part.offset, weight, dtype, name)
            else:
                out.write(bytes(-at % _ALIGNMENT))
                at += -at % _ALIGNMENT
                value.const_value = _external(JOINED, at, weight, dtype, name)
                out.write(read_parts(weight, files))
                at += weight.bytes
            model.graph.register_initializer(value)
    if not at:
        (folder / JOINED).unlink()


def _external(location: str, offset: int, weight: Weight, dtype: ir.DataType, name: str) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        location, offset, weight.bytes, dtype, shape=ir.Shape(weight.shape), name=name, base_dir=""
    )


def _link(
    lock: WeightsLock, files: Mapping[str, Path], named: Mapping[str, Weight], folder: Path, report: Progress
) -> dict[str, int]:
    """Put the checkpoint's files that the graph reads into the folder; returns the size of each header."""
    used = sorted({weight.parts[0].file for weight in named.values() if len(weight.parts) == 1})
    total, done = sum(lock.files[name].bytes for name in used), 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        report.steps(done, total, BYTES)

    ways = {place_file(files[name], folder / FOLDER / name, advance=advance) for name in used}
    if ways:
        report(f"weights: {len(used)} files ({', '.join(sorted(ways))})")
    return {f"{FOLDER}/{name}": lock.files[name].header_bytes for name in used}
