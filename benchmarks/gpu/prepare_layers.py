"""What ``step_layers.py`` needs, made on a machine without a GPU: engines for one layer of every kind of V4-Flash and V4-Pro.

The engines are those of a model that is cut to one layer of each kind of attention, at full width. They hold no weights. Beside
them are the headers of the weight files, from which the GPU's machine makes files with random weights. All of it is in
``PARCEL/layers/MODEL.tar.xz``.

The first layers of these models route by a table instead of a product with the gate. They are cut to layers with a gate.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from kit import DEFAULT_PARCEL, ROOT, archive
from layer_times import Sizes
from prepare_engine import engine_target
from random_weights import header_of
from step_engine import sources
from step_layers import CASE

from foldkv.export.checkpoint.config_reader import spec_from_config
from foldkv.export.contract.engine_set import ENGINES, EngineTable
from foldkv.export.contract.lock import LOCK, WeightsLock
from foldkv.export.package import export_checkpoint
from foldkv.optimize.build import build_bundles
from foldkv.plugins.model import model_kernels
from foldkv.plugins.plans import Kernel

Progress = Callable[[str], None]

MODELS = ("v4-flash", "v4-pro")
LAYOUT = "fp8+fp4"


def released_config(name: str) -> dict[str, Any]:
    """The config.json of a released model."""
    content: dict[str, Any] = json.loads((ROOT / "export" / "configs" / f"deepseek-{name}.json").read_text())
    return content


def cut(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a model with one layer of each kind of attention, all with a gate, and nothing else changed.

    Args:
        config: of a released model.
    """
    kinds = sorted(set(config["compress_ratios"][: config["num_hidden_layers"]]))
    return config | {
        "num_hidden_layers": len(kinds), "compress_ratios": kinds, "num_hash_layers": 0, "num_nextn_predict_layers": 0,
    }  # fmt: skip


def prepare(folder: Path, progress: Progress = lambda _: None, *, sm: int = 90) -> None:
    """Write ``folder/layers``."""
    out = Path(folder) / "layers"
    out.mkdir(parents=True, exist_ok=True)
    made_of = sources()
    target = dataclasses.replace(engine_target(sm), backends=("tensorrt-rtx",))
    for name in MODELS:
        with tempfile.TemporaryDirectory(prefix="foldkv-kit-") as scratch:
            work = Path(scratch)
            config = released_config(name)
            package = export_without_weights(cut(config), work)
            progress(f"{name}: building engines for a layer of each kind")
            [built] = build_bundles(
                package, work / "built", [target], plugins=True, layout=LAYOUT, jobs=1, progress=progress
            ).results
            if built.reason:
                raise RuntimeError(built.reason)
            where = work / "material"
            write_case(where, name, config, cut(config), work / "checkpoint", built.folder, Sizes())
            if sources() != made_of:
                raise RuntimeError("kernels or plugins were changed while bundles were made of them; run it again")
            archive(where, out / f"{name}.tar.xz")
        progress(f"{name}.tar.xz: {(out / f'{name}.tar.xz').stat().st_size / 2**20:.1f} MiB")


def kernels_needed(sm: int) -> list[Kernel]:
    """The kernels that the plugins of these models launch, for a compute capability; engines bring their own."""
    specs = [spec_from_config(released_config(name)) for name in MODELS]
    found = [kernel for spec in specs for kernel in model_kernels(spec, sm=sm, layout=LAYOUT)]
    return list(dict.fromkeys(found))


def export_without_weights(config: dict[str, Any], work: Path) -> Path:
    """Export a model in the released format, whose weight files are holes in ``work/checkpoint``; returns the package.

    Args:
        config: of the model.
        work: an empty folder.
    """
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from checkpoints import sparse_checkpoint

    (work / "config.json").write_text(json.dumps(config))
    return export_checkpoint(sparse_checkpoint(work / "config.json", work / "checkpoint"), work / "graph")


def write_case(
    where: Path, name: str, config: dict[str, Any], short: dict[str, Any], checkpoint: Path, bundle: Path, sizes: Sizes
) -> None:
    """Write what the step reads of a model: a bundle, the headers of its weight files, and ``case.json``.

    Args:
        where: folder to write.
        name: of the model.
        config: of the whole model.
        short: of the model that has one layer of each kind.
        checkpoint: of the short model, with the files' headers.
        bundle: of the short model.
        sizes: what is measured.
    """
    shutil.copytree(bundle, where / "bundle")
    (where / "headers").mkdir()
    for file in WeightsLock.read(bundle / LOCK).files:
        (where / "headers" / file).write_bytes(header_of(checkpoint / file))
    whole, one_of_each = spec_from_config(config), spec_from_config(short)
    layers = Counter(whole.layer_types)
    kinds = {
        call.segment: one_of_each.layer_types[call.layer]
        for call in EngineTable.read(bundle / ENGINES).calls
        if call.layer is not None
    }
    case = {
        "model": name, "config": short, "layers": whole.num_layers, "kinds": kinds,
        "counts": {segment: layers[kind] for segment, kind in kinds.items()}, "sizes": dataclasses.asdict(sizes),
    }  # fmt: skip
    (where / CASE).write_text(json.dumps(case))
    (where / "sources").write_text(sources())


@click.command(help=__doc__)
@click.option("-o", "--out", type=click.Path(path_type=Path), default=DEFAULT_PARCEL, help="The parcel's folder.")
@click.option("--sm", default=90, show_default=True, help="Compute capability of the GPU.")
def main(out: Path, sm: int) -> None:
    """Write what the step needs."""
    prepare(out, click.echo, sm=sm)


if __name__ == "__main__":
    main()
