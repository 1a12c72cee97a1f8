"""A folder in parcels of limited size, for machines that files reach in several calls, and back.

``python benchmarks/gpu/parcels.py pack FOLDER PARCELS --mib 56`` writes PARCELS/1.tar and so on, the folder's files in the
order of their names, large ones in pieces; ``unpack PARCELS FOLDER`` adds what the parcels there hold. Pieces are joined when
the last one has come.
"""

from __future__ import annotations

import io
import lzma
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import click

PIECE = 4 << 20
_PART = ".part"
_HEADER, _END = 1536, 10_240  # bytes of a tar around a file, at most, and behind the last one
#: Folders that come first: what most steps need.
_FIRST = ("expected", "kernels", "model")


@click.group()
def main() -> None:
    """Pack or unpack."""


@main.command("pack")
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.argument("parcels", type=click.Path(path_type=Path))
@click.option("--mib", default=56.0, show_default=True, help="Largest parcel.")
def _pack(folder: Path, parcels: Path, mib: float) -> None:
    """Write the parcels again."""
    for line in pack(folder, parcels, mib):
        click.echo(line)


def pack(folder: Path, parcels: Path, mib: float) -> list[str]:
    """Write all parcels of a folder, each of at most ``mib``; returns a line for each."""
    shutil.rmtree(parcels, ignore_errors=True)
    parcels.mkdir(parents=True)
    groups: list[list[tuple[str, bytes]]] = [[]]
    size = 0
    for name, content in _pieces(folder):
        packed = lzma.compress(content, preset=6)
        if size + len(packed) + _HEADER > mib * 2**20 - _END and groups[-1]:
            groups.append([])
            size = 0
        groups[-1].append((f"{name}.xz", packed))
        size += len(packed) + _HEADER
    lines = []
    for i, group in enumerate(groups, 1):
        path = parcels / f"{i}.tar"
        with tarfile.open(path, "w") as tar:
            for name, packed in group:
                info = tarfile.TarInfo(name)
                info.size = len(packed)
                tar.addfile(info, io.BytesIO(packed))
        lines.append(f"{path}: {len(group)} pieces, {path.stat().st_size / 2**20:.1f} MiB")
    return lines


def _pieces(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents: NAME.partNNN-of-MMM."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())

    def rank(path: Path) -> int:
        top = path.relative_to(folder).parts[0]
        return _FIRST.index(top) if top in _FIRST else len(_FIRST)

    for path in sorted(files, key=rank):
        content = path.read_bytes()
        count = max(1, -(-len(content) // PIECE))
        for i in range(count):
            name = f"{path.relative_to(folder)}{_PART}{i:03d}-of-{count:03d}"
            yield name, content[i * PIECE : (i + 1) * PIECE]


@main.command("unpack")
@click.argument("parcels", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
def _unpack(parcels: Path, folder: Path) -> None:
    """Add what the parcels hold."""
    for line in unpack(parcels, folder):
        click.echo(line)


def unpack(parcels: Path, folder: Path) -> list[str]:
    """Add to a folder what the parcels hold, and delete them; a line for every file of which pieces are missing."""
    scratch = folder.with_name(f"{folder.name}.pieces")
    for parcel in sorted(parcels.glob("*.tar")):
        with tarfile.open(parcel) as tar:
            tar.extractall(scratch, filter="data")
        parcel.unlink()  # its pieces are kept until they are joined
    lines = []
    for first in sorted(scratch.rglob(f"*{_PART}000-of-*.xz")):
        stem, _, counted = first.name.rpartition(_PART)
        count = int(counted.removesuffix(".xz").split("-of-")[1])
        parts = [first.with_name(f"{stem}{_PART}{i:03d}-of-{count:03d}.xz") for i in range(count)]
        if not all(part.exists() for part in parts):
            lines.append(f"{stem}: {sum(part.exists() for part in parts)} of {count} pieces")
            continue
        target = folder / first.relative_to(scratch).with_name(stem)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            for part in parts:
                file.write(lzma.decompress(part.read_bytes()))
        for part in parts:
            part.unlink()
    if not lines:
        shutil.rmtree(scratch, ignore_errors=True)
    return lines


if __name__ == "__main__":
    main()
