"""Which formats of weights a GPU's engines keep, and what a model weighs in them. Standard library only.

The one table that says it, with where it is known from. Cache rows are another matter: plugins read packed rows as bytes
on every GPU (plugins/coverage.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from foldkv.export.plan import parameter_groups, table_bytes
from foldkv.export.spec import CSA, ModelSpec


@dataclass(frozen=True)
class WeightFormat:
    """Bits per parameter of each group (export/plan.py), how a package with it is exported, and the source.

    Attributes:
        name: of the format, that of the experts.
        bits: of each group; of ``projections`` where engines keep e4m3 matrices.
        exported: what `foldkv export --weights` is given.
        source: where it is known from.
    """

    name: str
    bits: Mapping[str, float]
    exported: str
    source: str


def _bits(experts: float, projections: float, ends: float) -> dict[str, float]:
    # What optimize/passes/lower.py keeps in float32 is float32 in every format.
    return {"experts": experts, "projections": projections, "ends": ends, "precise": 32}


_WORDS = (
    "carried in int32 words, gathered and decoded (optimize/passes/weights.py): TensorRT-RTX 1.7 built it for 80, 86, 89, 120, 121 "
    "with as many bytes in the plan as in the file; nothing of it is particular to a GPU"
)
#: From wide to narrow; fp8 and fp4 as released: e4m3 with a scale per 128 x 128 block, which is below a thousandth and left
#: out; experts e2m1 with an e8m0 scale per 32; embedding and head in bfloat16.
FORMATS = {
    row.name: row
    for row in (
        WeightFormat("float32", _bits(32, 32, 32), "float32", "the cpu target: ONNX Runtime's graph is float32"),
        WeightFormat(
            "bf16", _bits(16, 16, 16), "float32",
            "TensorRT-RTX 1.7 built for 80, 86, 89, 120, 121; NVIDIA's TensorRT support matrix for 90, 100, 103",
        ),
        WeightFormat("fp8", _bits(8, 8, 16), "reference or repack", f"experts in e4m3, {_WORDS}"),
        WeightFormat("fp4", _bits(4.25, 8, 16), "reference or repack", f"experts in e2m1, {_WORDS}"),
    )
}  # fmt: skip

#: Compute capabilities whose engines keep e4m3 matrices. TensorRT-RTX 1.7 built block-scaled e4m3 for 89, 120, 121, one byte per
#: weight in the plan, and refused 80 and 86; NVIDIA Model Optimizer's support matrix, 'Ada and later', for 90, 100, 103.
_FP8_MATRICES = (89, 90, 100, 103, 120, 121)
# Of packed e2m1 no target keeps more than the experts' words: TensorRT looks up no FP4, and a V4 model has it in experts only.


def fp8_gap(sm: int) -> str:
    """Why engines for a compute capability do not keep e4m3 matrices; "" where they do."""
    return "" if sm in _FP8_MATRICES else f"engines for sm{sm} keep no e4m3 matrices"


def kept_formats(sm: int | None) -> tuple[str, ...]:
    """The formats that engines for a compute capability keep, from wide to narrow; float32 for None, the cpu."""
    return ("float32",) if sm is None else tuple(name for name in FORMATS if name != "float32")


def weight_bytes_in(spec: ModelSpec, format_: str, sm: int | None = None) -> int:
    """Bytes of the weights in a format, with the hash layers' tables.

    Args:
        spec: the model.
        format_: a name in :data:`FORMATS`.
        sm: compute capability of the engine, which may have to widen e4m3 matrices to bfloat16 (their products run in it), the
            indexer's to float32; None counts them as stored.
    """
    bits, counts = dict(FORMATS[format_].bits), parameter_groups(spec)
    total = table_bytes(spec)
    if bits["projections"] == 8:
        if sm is not None and fp8_gap(sm):
            bits["projections"] = FORMATS["bf16"].bits["projections"]
        else:  # the indexer's query projection is stored so too, though its product is float32
            total -= _index_queries(spec) * 24 // 8
    return int(sum(count * bits[group] for group, count in counts.items())) // 8 + total


def _index_queries(spec: ModelSpec) -> int:
    """Parameters of the indexers' query projections."""
    return spec.layer_types.count(CSA) * spec.q_lora_rank * spec.index_heads * spec.index_head_dim
