"""Make the GPU kit's parcel on a machine without a GPU: references, compiled kernels, engines.

``python benchmarks/gpu/prepare.py`` writes build/gpu-kit for an H100 or H200 (``--sm 90``); ``--parcels`` also packs it into
files of at most ``--mib`` for a machine that takes no larger ones. The part ``engine`` fetches TensorRT-RTX's bindings for the
GPU machine's Python from the package registry.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import click
import kit
import parcels
import prepare_engine
import prepare_kernels
import prepare_layers
import prepare_model

from foldkv.plugins.compile import compile_kernels, store_kernels
from foldkv.plugins.plans import Kernel

PARTS = ("kernels", "model", "engine", "layers")


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), default=kit.DEFAULT_PARCEL, show_default=True)
@click.option("--sm", default=90, show_default=True, help="Compute capability of the GPU.")
@click.option("--only", type=click.Choice(PARTS), multiple=True, help="Make only these parts; the default is all.")
@click.option("--parcels", "packed", type=click.Path(path_type=Path), help="Folder for the parcels.")
@click.option("--mib", default=56.0, show_default=True, help="Largest parcel.")
def main(output: Path, sm: int, only: tuple[str, ...], packed: Path | None, mib: float) -> None:
    """Make the parcel."""
    start = time.monotonic()

    def progress(line: str) -> None:
        click.echo(f"{time.monotonic() - start:6.1f} s  {line}")

    chosen = only or PARTS
    kernels: dict[Kernel, None] = {}
    if "kernels" in chosen:
        kernels |= dict.fromkeys(prepare_kernels.prepare(output, progress, sm=sm))
    if "model" in chosen:
        prepare_model.prepare(output, progress)
        kernels |= dict.fromkeys(prepare_model.kernels_needed(sm))
    if "layers" in chosen:
        kernels |= dict.fromkeys(prepare_layers.kernels_needed(sm))
    if not only:
        shutil.rmtree(output / "kernels", ignore_errors=True)  # of older sources
    store_kernels(compile_kernels([(kernel, sm) for kernel in kernels], progress=progress), output)
    if "engine" in chosen:
        prepare_engine.prepare(output, progress, sm=sm)
    if "layers" in chosen:
        prepare_layers.prepare(output, progress, sm=sm)
    if packed is not None:
        for line in parcels.pack(output, packed, mib):
            progress(line)


if __name__ == "__main__":
    main()
