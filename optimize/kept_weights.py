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
from ..export.contract.products import EXACT, head_product, layer_products
from ..export.contract.stacks import SMALL
from ..export.contract.step_time import STACKED, STORED, step_seconds
from ..export.contract.weights import BFLOAT16, E4M3, EXPERTS
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
        if role.startswith(f"{EXPERTS}.") and role != f"{EXPERTS}.scales"
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


@dataclass(frozen=True)
class CpuWeights:
    """Bytes of the weights as the bundle of a model for ONNX Runtime reads them.

    Attributes:
        mapped: in the checkpoint's files.
        placed: in the bundle, in float32.
        decoded: matrices in bfloat16, which the first run makes once for all bundles of the checkpoint.
        experts: the routed experts, wherever they are.
    """

    mapped: int
    placed: int
    decoded: int
    experts: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.mapped + self.placed + self.decoded


def cpu_weight_bytes(spec: ModelSpec, stored: str, *, gpu: bool = False) -> CpuWeights:
    """Bytes of the weights as a bundle for ONNX Runtime reads them (optimize/chain.py).

    Of the small weights, which engines keep in float32, those that are stored in float32 are counted as converted too: they are few.

    Args:
        spec: the model.
        stored: the format of the checkpoint's experts, a name in :data:`FORMATS`.
        gpu: whether a GPU runs it. Then all matrices are in float32, as those of a small model are.
    """
    counts, bits = parameter_groups(spec), FORMATS[stored].bits
    quantised = stored in (FP8, FP4)
    experts = int(counts["experts"] * (bits["experts"] if quantised else 32)) // 8
    if stored == FLOAT32:
        return CpuWeights(weight_bytes_in(spec, stored), 0, 0, experts)
    embedding = spec.vocab_size * spec.hidden_size
    mapped, converted = (
        int(embedding * bits["ends"]) // 8 + table_bytes(spec),
        sum(counts.values()) - embedding - counts["experts"],
    )
    products = _products(spec)
    if gpu or 4 * sum(products.values()) <= SMALL:
        products = Counter()
    decoded = products[E4M3] if quantised else 0
    mapped += 2 * (sum(products.values()) - decoded) + (experts if quantised else 0)
    placed = 4 * (converted - sum(products.values())) + (0 if quantised else experts)
    return CpuWeights(mapped, placed, 2 * decoded, experts)


def cpu_step(spec: ModelSpec, stored: str) -> tuple[int, int]:
    """Bytes that a step of one sequence reads on the cpu where segments have a second form: of matrices, and of chosen experts."""
    found = cpu_weight_bytes(spec, stored)
    matrices = (
        found.total - spec.vocab_size * spec.hidden_size * int(FORMATS[stored].bits["ends"]) // 8 - table_bytes(spec)
    )
    return matrices - found.experts, found.experts * spec.experts_per_token // spec.num_experts


def cpu_step_seconds(spec: ModelSpec, stored: str, *, matrices: str) -> float:
    """See :func:`~foldkv.export.contract.step_time.step_seconds`; ``stored`` is the format of the checkpoint's experts."""
    chosen = spec.num_layers * spec.chosen_parameters
    plain, stacked = stored not in (FP8, FP4), matrices != STORED and _stacks_experts(spec, stored)
    experts = FLOAT32 if plain else STACKED if stacked else STORED
    return step_seconds(sum(_products(spec).values()), chosen, matrices=matrices, experts=experts)


def _stacks_experts(spec: ModelSpec, stored: str) -> bool:
    """Whether ONNX Runtime multiplies with the experts as they are (optimize/passes/stack_experts.py)."""
    return stored == FP4 and not any(size % 32 for size in (spec.hidden_size, spec.moe_intermediate_size))


def wide_matrix_bytes(spec: ModelSpec, stored: str) -> int:
    """Bytes of the matrices of a large model in float32, which a runtime holds where memory allows it; 0 if the bundle or the checkpoint
    has them in float32."""
    size = 4 * sum(_products(spec).values())
    return size if size > SMALL and stored != FLOAT32 else 0


def _products(spec: ModelSpec) -> Counter[str]:
    """Parameters of the products, by the format of their weights in released checkpoints."""
    found: Counter[str] = Counter()
    for kind in spec.layer_types:
        for product in layer_products(spec, kind):
            found[product.released] += product.rows * product.columns
    head = head_product(spec)
    found[head.released] += head.rows * head.columns
    return found


def stacked_bytes(spec: ModelSpec, stored: str, backend: Backend) -> int:
    """Bytes that a runtime copies once in the order and the type in which ONNX Runtime reads them on the cpu; 0 if it copies none.

    These are experts in e2m1 (optimize/passes/stack_experts.py) and e4m3 matrices (optimize/passes/row_blocks.py).
    """
    if backend.engine or backend.gpu:
        return 0
    found = cpu_weight_bytes(spec, stored)
    return found.decoded + (found.experts if _stacks_experts(spec, stored) else 0)


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
