"""Weights in released formats with random values, from the header of a safetensors file: every value is finite, sums stay small.

Codes of e4m3 and e2m1 are drawn from all that are finite. Their e8m0 scales are one of three neighbouring powers of two, so
that a product of a normalised input has a spread of about one.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
import zlib
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foldkv.errors import InputError

#: Root mean squares of all finite codes of e4m3, and of e2m1.
_E4M3_SPREAD = float(
    torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(0).square().mean().sqrt()
)
_E2M1_SPREAD = (sum(value**2 for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6)) / 8) ** 0.5
_EXPONENT_BIAS = 127


def write_weights(path: Path, header: bytes, *, device: str, seed: int = 0) -> int:
    """Write a whole file with this header; returns its bytes.

    Args:
        path: of the file. Its name is a part of the seed.
        header: the first bytes of a safetensors file: the length, the JSON.
        device: where values are drawn: "cuda", or "cpu". They differ between the two.
        seed: of the values.

    Raises:
        InputError: the disk lacks room for it, or a tensor has a type that released checkpoints have no weights of.
    """
    table = {name: row for name, row in json.loads(header[8:]).items() if name != "__metadata__"}
    size = len(header) + max(row["data_offsets"][1] for row in table.values())
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise InputError(
            f"{path} takes {size} bytes ({size / 2**30:.1f} GiB), and {free / 2**30:.1f} GiB are free there. "
            "Free some, or set FOLDKV_GPU_WEIGHTS to a folder on another disk."
        )
    generator = torch.Generator(device).manual_seed(seed + zlib.crc32(path.name.encode()))
    with path.open("wb") as file:
        file.write(header)
        for name, row in sorted(table.items(), key=lambda item: item[1]["data_offsets"]):
            if file.tell() != len(header) + row["data_offsets"][0]:
                raise InputError(f"{path}: {name} does not begin where the tensor before it ends.")
            _drawn(name, table, generator).cpu().view(torch.uint8).numpy().tofile(file)
    return size


def header_of(path: Path) -> bytes:
    """The header of a safetensors file, its length included."""
    with path.open("rb") as file:
        length = file.read(8)
        return length + file.read(struct.unpack("<Q", length)[0])


def _drawn(name: str, table: Mapping[str, Any], generator: torch.Generator) -> Tensor:
    """The values of a tensor, one-dimensional."""
    dtype, shape = table[name]["dtype"], table[name]["shape"]
    count, where = prod(shape), {"device": generator.device, "generator": generator}
    if dtype in ("F8_E4M3", "I8"):
        codes = torch.randint(0, 256, (count,), dtype=torch.uint8, **where)
        # All ones but the sign is not a number: 448, the largest, takes its place.
        return codes - ((codes & 0x7F) == 0x7F).to(torch.uint8) if dtype == "F8_E4M3" else codes
    if dtype == "F8_E8M0":
        weight = table[f"{name.removesuffix('.scale')}.weight"]
        packed = weight["dtype"] == "I8"
        spread = _E2M1_SPREAD if packed else _E4M3_SPREAD
        inputs = weight["shape"][-1] * (2 if packed else 1)
        power = _EXPONENT_BIAS - round(math.log2(spread * inputs**0.5))
        return torch.randint(power - 1, power + 2, (count,), dtype=torch.uint8, **where)
    if dtype in ("BF16", "F32"):
        value = torch.randn(count, **where)
        value = 1 + 0.1 * value if "norm" in name else value * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)
        return value if dtype == "F32" else value.bfloat16()
    raise InputError(f"{name} is {dtype}; random weights can be made in F8_E4M3, F8_E8M0, I8, BF16 and F32.")
