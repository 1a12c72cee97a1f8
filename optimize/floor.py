"""The bytes that a decode step must read, and so the most tokens that a GPU can give in a second. Standard library only.

A step of one sequence reads every weight once, of the routed experts those of the chosen ones, and the rows of the state that
attention and indexer look at. No kernel can be faster than memory gives these bytes.
"""

from __future__ import annotations

from ..backends import BF16
from ..export.contract.geometry import CSA, HCA, ModelSpec
from ..export.contract.layouts import LAYOUTS
from ..export.contract.state import state_tensors
from ..export.contract.weights import EXPERTS
from ..export.memory import parameter_groups
from .kept_weights import FORMATS, index_queries

# What engines keep in float32 is stored in bfloat16 by released checkpoints, but for hyper-connections and a few vectors. They
# are counted as bfloat16 too, so the floor is half a percent too low, and not too high.
_PRECISE_BITS = 16
#: Tables of which a token reads a row, by their roles in a segment.
_TABLES = ("embed.weight", "ffn.gate.tid2eid")


def weight_floor(spec: ModelSpec, format_: str) -> int:
    """Bytes of weights that a step of one token reads, as they are stored: one row of the embedding, the chosen experts only.

    Args:
        spec: the model.
        format_: of the weights, a name in :data:`~foldkv.optimize.kept_weights.FORMATS`.
    """
    bits, counts = FORMATS[format_].bits, parameter_groups(spec)
    head = spec.vocab_size * spec.hidden_size
    read = {
        "experts": spec.num_layers * spec.chosen_parameters,
        "projections": counts["projections"],
        "ends": head + spec.hidden_size,
        "precise": counts["precise"],
    }
    widths = {**bits, "precise": min(_PRECISE_BITS, bits["ends"])}
    total = int(sum(count * widths[group] for group, count in read.items())) // 8
    # The indexers' queries are stored in e4m3, like the projections.
    return total - (index_queries(spec) if bits["projections"] == 8 else 0)


def stored_read(spec: ModelSpec, role: str, size: int, tokens: int = 1) -> int:
    """Of the bytes of a weight as stored, those that a step reads: of tables a row a token, of experts those that are chosen.

    Several tokens read an expert once. How many they choose together is what independent choices, each expert as likely as any
    other, give on average: E * (1 - (1 - k / E) ** tokens) of E experts if a token chooses k.

    Args:
        spec: the model.
        role: of the weight in its segment.
        size: its bytes as stored, all experts.
        tokens: of the step, of all sequences together.
    """
    if role.startswith(f"{EXPERTS}."):
        chosen, count = spec.experts_per_token, spec.num_experts
        if tokens == 1:
            return size * chosen // count
        return round(size * (1 - (1 - chosen / count) ** tokens))
    return size // spec.vocab_size * tokens if role in _TABLES else size


def weights_moved_without_plugins(spec: ModelSpec, format_: str) -> int:
    """Bytes of weights that a step of one token moves at least in engines without plugins.

    Function bodies take every matrix in the type of its product. Of the chosen experts they gather a copy, which is written and
    read again; of packed ones also the decoded values are.

    Args:
        spec: the model.
        format_: of the weights, a name in :data:`~foldkv.optimize.kept_weights.FORMATS`.
    """
    bits, counts = FORMATS[format_].bits, parameter_groups(spec)
    chosen = spec.num_layers * spec.chosen_parameters
    product = FORMATS[BF16].bits
    decoded = 2 * product["experts"] if bits["experts"] < product["experts"] else 0
    total = chosen * (3 * min(bits["experts"], product["experts"]) + decoded)
    total += counts["projections"] * product["projections"] + counts["precise"] * bits["precise"]
    total += (spec.vocab_size + 1) * spec.hidden_size * product["ends"]
    return int(total) // 8


def state_floor(spec: ModelSpec, layout: str, context: int, dtype: str, *, layer: int | None = None) -> int:
    """Bytes of the state that a step reads after ``context`` tokens of one sequence.

    CSA layers read all rows of the index and the entries that the indexer chooses; HCA layers read all entries; all layers
    read window and carries.

    Args:
        spec: the model.
        layout: of the cache rows.
        context: tokens in the state.
        dtype: of dense rows.
        layer: only this one.
    """
    total = 0
    for tensor in state_tensors(spec):
        if layer not in (None, tensor.layer):
            continue
        kept = LAYOUTS[layout].stored(tensor, spec.rope_dim, dtype)
        kind = spec.layer_types[tensor.layer]
        assert kind in (CSA, HCA) or tensor.group == "window"
        if kind == CSA and tensor.group == "entries":
            context_of_chosen = min(context, spec.index_topk * (tensor.ratio or 1))
            total += kept.bytes(context_of_chosen)
        else:
            total += kept.bytes(context)
    return total
