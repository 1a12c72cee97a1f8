"""Which formats of weights a GPU's engines keep, and what a model weighs in them. Standard library only.

The one table that says it, with where it is known from. Cache rows are another matter: plugins read packed rows as bytes
on every GPU (plugins/coverage.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from foldkv.export.plan import parameter_groups, table_bytes
from foldkv.export.spec import ModelSpec


@dataclass(frozen=True)
class WeightFormat:
    """Bits per parameter of each group (export/plan.py), the compute capabilities that keep it, and the source."""

    name: str
    bits: Mapping[str, float]
    sms: tuple[int, ...]
    source: str


def _bits(experts: float, projections: float, ends: float) -> dict[str, float]:
    # What optimize/passes/lower.py keeps in float32 is float32 in every format.
    return {"experts": experts, "projections": projections, "ends": ends, "precise": 32}


#: From wide to narrow; fp8 and fp4 as released: e4m3 with a scale per 128 x 128 block, which is below a thousandth and left
#: out; experts e2m1 with an e8m0 scale per 32; embedding and head in bfloat16.
FORMATS = {
    row.name: row
    for row in (
        WeightFormat("float32", _bits(32, 32, 32), (), "the cpu target: ONNX Runtime's graph is float32"),
        WeightFormat(
            "bf16", _bits(16, 16, 16), (80, 86, 89, 90, 100, 103, 120, 121),
            "TensorRT-RTX 1.7 built for 80, 86, 89, 120, 121; NVIDIA's TensorRT support matrix for 90, 100, 103",
        ),
        WeightFormat(
            "fp8", _bits(8, 8, 16), (89, 90, 100, 103, 120, 121),
            "TensorRT-RTX 1.7 built block-scaled e4m3 for 89, 120, 121 and refused 80, 86; NVIDIA Model Optimizer's support "
            "matrix, 'Ada and later', for 90, 100, 103",
        ),
        WeightFormat(
            "fp4", _bits(4.25, 8, 16), (100, 103, 120, 121),
            "TensorRT-RTX 1.7 built block-scaled e2m1 for 120 and refused 80, 86, 89; NVIDIA Model Optimizer's support matrix, "
            "'Blackwell and later', for 100, 103, 121",
        ),
    )
}  # fmt: skip


def kept_formats(sm: int | None) -> tuple[str, ...]:
    """The formats that engines for a compute capability keep, from wide to narrow; float32 for None, the cpu."""
    return ("float32",) if sm is None else tuple(name for name, row in FORMATS.items() if sm in row.sms)


def weight_bytes_in(spec: ModelSpec, format_: str) -> int:
    """Bytes of the weights in a format, with the hash layers' tables."""
    bits = FORMATS[format_].bits
    return int(sum(count * bits[group] for group, count in parameter_groups(spec).items())) // 8 + table_bytes(spec)
