"""The operators of the domain ``foldkv``, each declared once. Standard library only.

From a declaration follow: the schemas in ONNX and torch (export/operators/registry.py), the shapes of outputs, the plugin
(plugins/declarations.py), how many nodes a graph must have (:func:`expected_operators`), which state a node updates in
place (plugins/inject.py), and how graphs with packed rows read and write them (optimize/passes/). CONTRIBUTING.md has the
steps for a new operator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import InputError
from .geometry import CSA, HCA, SLIDING, ModelSpec
from .profiles import HF, PROFILES, SERVED
from .rows import FP8_DS_MLA, INDEX_FP4
from .state import ONLINE_ROWS
from .weights import E2M1, E4M3, EXPONENT, FLOAT32, SCALE_FORMAT, SCALE_TYPES, WEIGHT_FORMAT, WEIGHT_TYPES

#: The type of tensors whose last axis is a row of the state.
STATE = "state"
#: The types of weights as stored and of their scales. Attributes of the operator say in which format they are (weights.py).
WEIGHT, SCALE = "weight", "scale"
#: The type of plain weights: that of the engine's large products, which dense rows have too.
PLAIN = "plain"
#: Any number of axes.
ANY = "..."
_FORMATS = {WEIGHT: (WEIGHT_FORMAT, WEIGHT_TYPES), SCALE: (SCALE_FORMAT, SCALE_TYPES)}
#: How an operator reads rows of the state: all of a window and a chunk, a whole cache block by block, or chosen entries.
WINDOW, BLOCKS, CHOSEN = "window", "blocks", "chosen"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of an operator.

    Attributes:
        name: as the operator declares it.
        dims: one per axis: a number, a symbol, or a sum of symbols ("W + S"); "..." stands for any number of axes.
        dtype: "float32", "int32", "int64", or "state" for rows of the state. These have the engine's type and D channels, or
            they are packed bytes (int8), and the last axis is the bytes of a row. Or "weight", "scale" and "plain", see
            :meth:`stored_type`.
        groups: the state groups that it can belong to.
        read: of rows that are only read: WINDOW, BLOCKS or CHOSEN; "" for others.
        may_end: whether a backend can omit columns at the end that no query can choose.
    """

    name: str
    dims: tuple[str | int, ...]
    dtype: str = "float32"
    groups: tuple[str, ...] = ()
    read: str = ""
    may_end: bool = False

    def stored_dims(self, *, packed: bool) -> tuple[str | int, ...]:
        """The axes as stored: packed rows of the state end in ``ROW`` bytes."""
        return (*self.dims[:-1], "ROW") if self.dtype == STATE and packed else self.dims

    def sized(self, shape: Sequence[Any], *, packed: bool = False) -> list[tuple[str | int, Any]]:
        """Each axis that has a name or a fixed size, with its size in ``shape``.

        Raises:
            ValueError: a shape with another number of axes.
        """
        dims = self.stored_dims(packed=packed)
        before = dims.index(ANY) if ANY in dims else len(dims)
        after = dims[before + 1 :]
        if len(shape) < before + len(after) or (ANY not in dims and len(shape) > before):
            raise ValueError(f"{self.name} has shape {tuple(shape)}; expected {dims}")
        ends = [(dim, shape[len(shape) - len(after) + axis]) for axis, dim in enumerate(after)]
        return [(dim, shape[axis]) for axis, dim in enumerate(dims[:before])] + ends

    def stored_type(self, attributes: Mapping[str, Any], *, rows: str) -> str:
        """The type of the elements in memory.

        Args:
            attributes: values of the operator's attributes.
            rows: type of rows of the state, which are "int8" if they are packed; of an operator without state, the type of
                the engine's products.

        Raises:
            InputError: weights or scales in a format that no plugin reads.
        """
        if self.dtype in (STATE, PLAIN):
            return rows
        if self.dtype not in _FORMATS:
            return self.dtype
        attribute, types = _FORMATS[self.dtype]
        if attributes[attribute] not in types:
            raise InputError(f"{attribute} is {attributes[attribute]!r}; expected one of {', '.join(types)}.")
        return types[attributes[attribute]]


@dataclass(frozen=True)
class OperatorSpec:
    """One operator: ``FoldkvXxx`` in ONNX, ``torch.ops.foldkv.xxx`` in torch.

    Attributes:
        name: in ONNX.
        inputs: tensors, in order.
        outputs: tensors, in order.
        attributes: name to type (int, float, str, or tuple for several int), in order; in torch they follow the inputs.
        updates: output index to the index of the state input whose next value it is.
        rounds: the row format to whose values it rounds what it returns or writes; None if it does not round.
        layers: how many nodes a layer of each kind has.
        hashed: True or False if only layers that look their experts up, or only the others, have it; None for all layers.
        profiles: of the graphs that have it.
        plugin: version of its plugin; None if it is a function body in every engine.
        no_plugin: why it has none.
        form_of: the operator that it stands for in graphs that take weights as stored. Such a form has no definition in torch,
            and its body depends on how the weights are stored.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    attributes: Mapping[str, type] = field(default_factory=dict)
    updates: Mapping[int, int] = field(default_factory=dict)
    rounds: str | None = None
    layers: Mapping[str, int] = field(default_factory=dict)
    hashed: bool | None = None
    profiles: tuple[str, ...] = PROFILES
    plugin: str | None = None
    no_plugin: str = ""
    form_of: str = ""

    @property
    def state(self) -> tuple[TensorSpec, ...]:
        """The inputs that are rows of the state, in order."""
        return tuple(tensor for tensor in self.inputs if tensor.dtype == STATE)

    @property
    def reads(self) -> tuple[str, ...]:
        """The state groups that it can read, carries too."""
        return tuple(dict.fromkeys(group for tensor in self.inputs for group in tensor.groups))

    @property
    def writes(self) -> tuple[str, ...]:
        """The state groups that it can update."""
        changed = (self.inputs[index] for index in self.updates.values())
        return tuple(dict.fromkeys(group for tensor in changed for group in tensor.groups))


_OPERATORS: dict[str, OperatorSpec] = {}


def register_operator(spec: OperatorSpec) -> OperatorSpec:
    """Make an operator known; its torch and ONNX definitions are given to export/operators/registry.py.

    Raises:
        InputError: another operator has that name, or an update connects tensors that differ.
    """
    for out, given in spec.updates.items():
        if spec.outputs[out].dims != spec.inputs[given].dims:
            raise InputError(
                f"{spec.name} updates {spec.inputs[given].name} {spec.inputs[given].dims} by {spec.outputs[out].name} "
                f"{spec.outputs[out].dims}; expected equal axes."
            )
    if _OPERATORS.setdefault(spec.name, spec) != spec:
        raise InputError(f"operator {spec.name!r} is declared twice, in different ways. Give one another name.")
    return spec


def operator_spec(name: str) -> OperatorSpec:
    """The declaration of an operator.

    Raises:
        InputError: there is none of that name.
    """
    if name not in _OPERATORS:
        raise InputError(
            f"operator {name!r} is not known; expected one of {', '.join(_OPERATORS)}. "
            "An operator of your own is declared with export.contract.operators.register_operator."
        )
    return _OPERATORS[name]


def operator_specs() -> dict[str, OperatorSpec]:
    """Every declared operator by name, in the order of declaration."""
    return dict(_OPERATORS)


def expected_operators(spec: ModelSpec, profile: str = HF) -> dict[str, int]:
    """How many nodes of each operator a model's graph must have, by name in alphabetical order, without zeros."""
    kinds = Counter(zip(spec.layer_types, spec.hash_layers, strict=True))
    counts = {
        name: sum(
            one.layers.get(kind, 0) * count for (kind, hashed), count in kinds.items() if one.hashed in (None, hashed)
        )
        for name, one in sorted(_OPERATORS.items())
        if profile in one.profiles
    }
    return {name: count for name, count in counts.items() if count}


_OF_ANY_RANK = (ANY, "D")
_EACH, _TWICE = {SLIDING: 1, CSA: 1, HCA: 1}, {SLIDING: 2, CSA: 2, HCA: 2}
_NO_STATE = "it reads no compressed KV"

_POSITIONS = (TensorSpec("positions", ("B",), "int32"), TensorSpec("num_tokens", ("B",), "int32"))
_QUERY = TensorSpec("q", ("B", "S", "H", "D"))
_ROWS = TensorSpec("rows", ("B", "W + S", "D"), STATE, ("window",), WINDOW)
_WINDOW = TensorSpec("window", ("B", "W", "D"), STATE, ("window",))
_SINKS, _FREQUENCIES = TensorSpec("sinks", ("H",)), TensorSpec("inv_freq", ("P",))
_CONTEXT = TensorSpec("active_context", (1,), "int64")
_OUT = (TensorSpec("out", ("B", "S", "H", "D")),)
_SCORES = TensorSpec("scores", ("B", "S", "E"), may_end=True)
_STREAMS = TensorSpec("streams", ("B", "S", "N", "C"))
_MIX = (TensorSpec("post", ("B", "S", "N")), TensorSpec("comb", ("B", "S", "N", "N")))
_GATE = (TensorSpec("x", ("M", "C")), TensorSpec("weight", ("X", "C"), WEIGHT))
_STORED = {WEIGHT_FORMAT: str}


def _entries(*groups: str, read: str = "", name: str = "entries") -> TensorSpec:
    return TensorSpec(name, ("B", "E", "D"), STATE, groups, read)


def _compressed(*prefixes: str) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of CSA's compression, for the groups with these prefixes."""
    written = (
        _entries(*(f"{prefix}entries" for prefix in prefixes)),
        TensorSpec("carry_kv", ("B", "R", "C"), groups=tuple(f"{prefix}carry_kv" for prefix in prefixes)),
        TensorSpec("carry_gate", ("B", "R", "C"), groups=tuple(f"{prefix}carry_gate" for prefix in prefixes)),
    )
    chunk = (TensorSpec("kv", ("B", "S", "C")), TensorSpec("gate", ("B", "S", "C")), TensorSpec("bias", ("T", "C")))
    return (*written, *chunk, TensorSpec("norm", ("D",)), _FREQUENCIES, *_POSITIONS), written


def _compress(
    name: str, *prefixes: str, plugin: str, more: tuple[TensorSpec, ...] = (),
    rope_dim: bool = False, rounds: str | None = None, nodes: int = 1,
) -> OperatorSpec:  # fmt: skip
    """CSA's compression; every form writes entries and both carries."""
    inputs, outputs = _compressed(*prefixes)
    return OperatorSpec(
        name, (*inputs, *more), outputs,
        attributes={**({"rope_dim": int} if rope_dim else {}), "ratio": int, "eps": float},
        updates={0: 0, 1: 1, 2: 2}, rounds=rounds, layers={CSA: nodes},
        profiles=(SERVED,) if rounds else (HF,), plugin=plugin,
    )  # fmt: skip


def _compress_online(name: str, *, rope_dim: bool = False, rounds: str | None = None) -> OperatorSpec:
    """HCA's compression; every form writes entries and the carry."""
    written = (_entries("entries"), TensorSpec("carry", ("B", ONLINE_ROWS, "D"), groups=("carry",)))
    chunk = (TensorSpec("kv", ("B", "S", "D")), TensorSpec("gate", ("B", "S", "D")), TensorSpec("bias", ("T", "D")))
    return OperatorSpec(
        name, (*written, *chunk, TensorSpec("norm", ("D",)), _FREQUENCIES, *_POSITIONS), written,
        attributes={**({"rope_dim": int} if rope_dim else {}), "ratio": int, "eps": float},
        updates={0: 0, 1: 1}, rounds=rounds, layers={HCA: 1},
        profiles=(SERVED,) if rounds else (HF,), plugin="1",
    )  # fmt: skip


BLOCK_LINEAR, ROUTED_EXPERTS = "FoldkvBlockLinear", "FoldkvRoutedExperts"
#: The forms of :data:`ROUTED_EXPERTS` on packed weights: format of the codes, format of the scales.
PACKED_EXPERTS: Mapping[tuple[str, str], str] = {
    (E2M1, EXPONENT): "FoldkvRoutedExpertsFp4", (E4M3, EXPONENT): "FoldkvRoutedExpertsFp8",
    (E2M1, FLOAT32): "FoldkvScaledExpertsFp4", (E4M3, FLOAT32): "FoldkvScaledExpertsFp8",
}  # fmt: skip
_ROUTED = (
    TensorSpec("x", ("M", "C")), TensorSpec("chosen", ("M", "K"), "int64"), TensorSpec("weights", ("M", "K")),
)  # fmt: skip


def _packed_experts(weight: str, scale: str) -> OperatorSpec:
    """Rows of codes and scales hold w1, w2 and w3 of one expert; the attributes say where (export/operators/packed.py).

    Between rows and bytes engines have an axis of 1 (optimize/passes/place_weights.py)."""
    return OperatorSpec(
        PACKED_EXPERTS[weight, scale],
        inputs=(
            *_ROUTED, TensorSpec("codes", ("rows", ANY, "CODES"), WEIGHT_TYPES[weight]),
            TensorSpec("scales", ("rows", ANY, "SCALES"), SCALE_TYPES[scale]), TensorSpec("slots", ("X",), "int64"),
        ),
        outputs=(TensorSpec("y", ("M", "C")),),
        attributes={"limit": float, "codes_at": tuple, "scales_at": tuple, "shapes": tuple, "grids": tuple},
        plugin="1", form_of=ROUTED_EXPERTS,
    )  # fmt: skip


for _spec in (
    OperatorSpec(
        "FoldkvWindowUpdate",
        inputs=(_WINDOW, TensorSpec("kv", ("B", "S", "D")), *_POSITIONS),
        outputs=(_ROWS, _WINDOW),
        updates={1: 0}, layers=_EACH, plugin="1",
    ),
    _compress("FoldkvCompress", "", "index_", plugin="2", nodes=2),
    _compress("FoldkvCompressFp8", "", plugin="2", rope_dim=True, rounds=FP8_DS_MLA),
    _compress(
        "FoldkvCompressFp4", "index_", plugin="2", more=(TensorSpec("hadamard", ("D", "D")),), rounds=INDEX_FP4
    ),
    _compress_online("FoldkvCompressOnline"),
    _compress_online("FoldkvCompressOnlineFp8", rope_dim=True, rounds=FP8_DS_MLA),
    OperatorSpec(
        "FoldkvIndexScores",
        inputs=(
            _QUERY, TensorSpec("weights", ("B", "S", "H")),
            _entries("index_entries", read=BLOCKS, name="index_entries"), _POSITIONS[0], _CONTEXT,
        ),
        outputs=(_SCORES,),
        attributes={"ratio": int}, layers={CSA: 1}, plugin="1",
    ),
    OperatorSpec(
        "FoldkvIndexSelect",
        inputs=(_SCORES, _POSITIONS[0]),
        outputs=(TensorSpec("chosen", ("B", "S", "topk"), "int32"),),
        attributes={"ratio": int, "topk": int}, layers={CSA: 1}, plugin="1",
    ),
    OperatorSpec(
        "FoldkvWindowAttention",
        inputs=(_QUERY, _ROWS, _SINKS, _FREQUENCIES, *_POSITIONS),
        outputs=_OUT, layers={SLIDING: 1}, plugin="1",
    ),
    OperatorSpec(
        "FoldkvSparseAttention",
        inputs=(
            _QUERY, _ROWS, _entries("entries", read=CHOSEN), TensorSpec("chosen", ("B", "S", "K"), "int32"), _SINKS,
            _FREQUENCIES, *_POSITIONS,
        ),
        outputs=_OUT, layers={CSA: 1}, plugin="1",
    ),
    OperatorSpec(
        "FoldkvDenseAttention",
        inputs=(_QUERY, _ROWS, _entries("entries", read=BLOCKS), _SINKS, _FREQUENCIES, *_POSITIONS, _CONTEXT),
        outputs=_OUT, attributes={"ratio": int}, layers={HCA: 1}, plugin="1",
    ),
    OperatorSpec(
        "FoldkvRope",
        inputs=(TensorSpec("x", ("B", "S", "H", "D")), TensorSpec("positions", ("B", "S"), "int64"), _FREQUENCIES),
        outputs=(TensorSpec("turned", ("B", "S", "H", "D")),),
        attributes={"inverse": int}, layers={SLIDING: 2, CSA: 3, HCA: 2},
        no_plugin="TensorRT fuses it with the projection before it",
    ),
    OperatorSpec(
        "FoldkvHcPre",
        inputs=(_STREAMS, TensorSpec("fn", ("J", "NC")), TensorSpec("base", ("J",)), TensorSpec("scale", (3,))),
        outputs=(TensorSpec("x", ("B", "S", "C")), *_MIX),
        attributes={"norm_eps": float, "iterations": int, "eps": float}, layers=_TWICE, plugin="1",
    ),
    OperatorSpec(
        "FoldkvHcPost",
        inputs=(_STREAMS, TensorSpec("out", ("B", "S", "C")), *_MIX),
        outputs=(TensorSpec("mixed", ("B", "S", "N", "C")),), layers=_TWICE, plugin="1",
    ),
    OperatorSpec(
        "FoldkvRoute",
        inputs=(*_GATE, TensorSpec("bias", ("X",))),
        outputs=(TensorSpec("chosen", ("M", "topk"), "int64"), TensorSpec("weights", ("M", "topk"))),
        attributes={"topk": int, "scaling": float, **_STORED}, layers=_EACH, hashed=False, plugin="1",
    ),
    OperatorSpec(
        "FoldkvRouteHashed",
        inputs=(*_GATE, TensorSpec("tid2eid", ("V", "K"), "int64"), TensorSpec("input_ids", ("M",), "int64")),
        outputs=(TensorSpec("chosen", ("M", "K"), "int64"), TensorSpec("weights", ("M", "K"))),
        attributes={"scaling": float, **_STORED}, layers=_EACH, hashed=True, plugin="1",
    ),
    OperatorSpec(
        ROUTED_EXPERTS,
        inputs=(*_ROUTED, TensorSpec("w13", ("X", "2I", "C"), PLAIN), TensorSpec("w2", ("X", "C", "I"), PLAIN)),
        outputs=(TensorSpec("y", ("M", "C")),),
        attributes={"limit": float}, layers=_EACH, plugin="1",
    ),
    *(_packed_experts(*form) for form in PACKED_EXPERTS),
    OperatorSpec(
        BLOCK_LINEAR,
        inputs=(
            TensorSpec("x", ("M", "GK")), TensorSpec("weight", ("GN", "K"), WEIGHT), TensorSpec("scale", ("SN", "SK"), SCALE),
        ),
        outputs=(TensorSpec("y", ("M", "GN")),),
        attributes={
            "groups": int, "block_rows": int, "block_columns": int, "terms": int, WEIGHT_FORMAT: str, SCALE_FORMAT: str
        },
        plugin="1",
    ),
    OperatorSpec(
        "FoldkvQuantizeFp8",
        inputs=(TensorSpec("x", _OF_ANY_RANK),), outputs=(TensorSpec("quantized", _OF_ANY_RANK),),
        attributes={"rope_dim": int}, rounds=FP8_DS_MLA, layers=_EACH, profiles=(SERVED,),
        no_plugin="rounding before a row is written, in graphs of the profile served",
    ),
    OperatorSpec(
        "FoldkvQuantizeFp4",
        inputs=(TensorSpec("x", _OF_ANY_RANK),), outputs=(TensorSpec("quantized", _OF_ANY_RANK),),
        rounds=INDEX_FP4, layers={CSA: 1}, profiles=(SERVED,),
        no_plugin="rounding of the indexer's queries, in graphs of the profile served",
    ),
):  # fmt: skip
    register_operator(_spec)
