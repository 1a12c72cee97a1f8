"""Which weight formats a GPU's engines keep, and how large a model is in them. Standard library only.

This is the only table of them, with its sources. Cache rows are different: plugins read packed rows as bytes on every GPU
(plugins/coverage.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..backends import BF16, FLOAT32, FP4, FP8, Backend
from ..export.contract.geometry import ModelSpec
from ..export.contract.lock import Weight
from ..export.contract.products import EXACT, layer_products
from ..export.contract.weights import BFLOAT16, E4M3
from ..export.memory import parameter_groups, table_bytes


@dataclass(frozen=True)
class WeightFormat:
    """Bits per parameter of each group (export/memory.py), which checkpoints give it, and the source.

    Attributes:
        name: of the experts' format.
        bits: of each group; of ``projections`` where a plugin reads e4m3 matrices.
        stored: what the checkpoint must be for `build` to write it.
        source: how it is known.
    """

    name: str
    bits: Mapping[str, float]
    stored: str
    source: str


def _bits(experts: float, projections: float, ends: float) -> dict[str, float]:
    # Whatever optimize/passes/lower.py keeps in float32 is float32 in every format.
    return {"experts": experts, "projections": projections, "ends": ends, "precise": 32}


_WORDS = (
    "read as stored by a plugin (plugins/kernels/experts.py), or without plugins carried in int32 words, gathered and decoded "
    "(optimize/passes/place_weights.py): TensorRT-RTX 1.7 built the plugins for 80, 89 and 120, and the words for 86 and 121 too; nothing "
    "in either is specific to a GPU"
)
#: From wide to narrow. fp8 and fp4 are as released: e4m3 with a scale per 128 x 128 block (below a thousandth, so not
#: counted); experts in e2m1 with an e8m0 scale per 32; embedding and head in bfloat16.
FORMATS = {
    row.name: row
    for row in (
        WeightFormat(FLOAT32, _bits(32, 32, 32), "any plain format", "the cpu target: ONNX Runtime's graph is float32"),
        WeightFormat(
            BF16, _bits(16, 16, 16), "any plain format",
            "TensorRT-RTX 1.7 built for 80, 86, 89, 120, 121; NVIDIA's TensorRT support matrix for 90, 100, 103",
        ),
        WeightFormat(FP8, _bits(8, 8, 16), "fp8", f"experts in e4m3, {_WORDS}"),
        WeightFormat(FP4, _bits(4.25, 8, 16), "fp4", f"experts in e2m1, {_WORDS}"),
    )
}  # fmt: skip


def built_in(stored: str, backend: Backend) -> str:
    """The format in which ``build`` writes a bundle of a backend.

    Quantised experts stay as they are stored. Plain ones become the type of their products.

    Args:
        stored: the format of the checkpoint's experts.
        backend: that builds.
    """
    return stored if stored in (FP8, FP4) else backend.weights[0]


_EXPERT_DTYPES = {"I8": FP4, "U8": FP4, "F8_E4M3": FP8, "BF16": BF16, "F16": BF16}
_CONFIG_DTYPES = {"fp4": FP4, "fp8": FP8, "bfloat16": BF16, "float16": BF16}


def stored_format(config: Mapping[str, Any], dtypes: Mapping[str, str] | None = None) -> str:
    """The format of a checkpoint's experts.

    Args:
        config: its parsed config.json, which need not say it.
        dtypes: of every tensor by released name, if the weights are there.
    """
    for name, dtype in (dtypes or {}).items():
        if ".experts." in name and not name.endswith("scale"):
            return _EXPERT_DTYPES.get(dtype, FLOAT32)
    quantised = config.get("quantization_config")
    names = [config.get("expert_dtype"), config.get("dtype"), config.get("torch_dtype")]
    if isinstance(quantised, Mapping):
        # The first release of V4-Flash names only fp8, but its experts are in fp4.
        names[1:1] = [quantised.get("expert_dtype"), FP4 if quantised.get("quant_method") == "fp8" else None]
    return next((_CONFIG_DTYPES[str(name)] for name in names if str(name) in _CONFIG_DTYPES), FLOAT32)


def locked_format(weights: Mapping[str, Weight]) -> str:
    """The format of a layer's experts, from what a package's lock says of its weights."""
    [dtype] = {
        weight.dtype
        for role, weight in weights.items()
        if role.startswith("ffn.experts.") and role != "ffn.experts.scales"
    }
    return _EXPERT_DTYPES.get(dtype, FLOAT32)


def weight_bytes_in(spec: ModelSpec, format_: str, *, widened: bool = False) -> int:
    """Bytes of the weights in a format, with the hash layers' tables.

    Args:
        spec: the model.
        format_: a name in :data:`FORMATS`.
        widened: take weights of products in the precision of the product, bfloat16 or float32: where no plugin reads them.
            Else they are counted as stored.
    """
    bits, counts = dict(FORMATS[format_].bits), parameter_groups(spec)
    total = table_bytes(spec)
    if widened and bits["projections"] == 8:
        bits["projections"] = FORMATS[BF16].bits["projections"]
    elif format_ != FLOAT32 and not widened:  # products in float32 have their weights in narrower formats too
        stored = {BFLOAT16: 16, E4M3: int(bits["projections"])}
        total -= sum(count * (32 - stored[released]) for released, count in _exact(spec).items()) // 8
    return int(sum(count * bits[group] for group, count in counts.items())) // 8 + total


def cpu_weight_bytes(spec: ModelSpec, stored: str) -> tuple[int, int]:
    """Bytes of the weights as a cpu bundle reads them: those in the checkpoint's files, and those that it holds itself.

    What optimize/chain.py converts once is float32 in the bundle. Of the small weights, which engines keep in float32, those
    that are stored in float32 are counted as converted too: they are few.

    Args:
        spec: the model.
        stored: the format of the checkpoint's experts, a name in :data:`FORMATS`.
    """
    if stored == FLOAT32:
        return weight_bytes_in(spec, stored), 0
    counts, bits = parameter_groups(spec), FORMATS[stored].bits
    embedding, experts = spec.vocab_size * spec.hidden_size, counts["experts"]
    mapped, placed = int(embedding * bits["ends"]) // 8 + table_bytes(spec), sum(counts.values()) - embedding - experts
    if stored in (FP8, FP4):
        return mapped + int(experts * bits["experts"]) // 8, placed * 4
    return mapped, (placed + experts) * 4


def stacked_bytes(spec: ModelSpec, stored: str, backend: Backend) -> int:
    """Bytes of the experts that a runtime copies once in the order in which ONNX Runtime reads them on the cpu; 0 if it copies none.

    optimize/passes/stack_experts.py says which it reads so.
    """
    sizes = (spec.hidden_size, spec.moe_intermediate_size)
    if stored != FP4 or backend.engine or backend.gpu or any(size % 32 for size in sizes):
        return 0
    return int(parameter_groups(spec)["experts"] * FORMATS[FP4].bits["experts"]) // 8


def index_queries(spec: ModelSpec) -> int:
    """Parameters of the indexers' query projections."""
    return len(spec.indexed_ratios) * spec.q_lora_rank * spec.index_heads * spec.index_head_dim


def _exact(spec: ModelSpec) -> Counter[str]:
    """Parameters of the products that are computed with float32's accuracy, by the format of their weights: the gate's, which
    routing multiplies itself, and those of :func:`layer_products`."""
    found = Counter({BFLOAT16: spec.num_layers * spec.num_experts * spec.hidden_size})
    for kind, layers in Counter(spec.layer_types).items():
        for product in layer_products(spec, kind):
            if product.terms == EXACT:
                found[product.released] += layers * product.rows * product.columns
    return found
