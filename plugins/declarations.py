"""PluginSpec: one operator as its plugin sees it. Standard library only, so a runtime can read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..export.contract.layouts import DENSE, FP8_DS_MLA, INDEX_FP4, INDEX_FP8, LAYOUT_VERSION, ONLINE_ROWS

#: The namespace of foldkv's plugins in TensorRT's registry. The registered creator takes a node with this
#: namespace even if there is a function body of the same name.
NAMESPACE = "foldkv"
STATE = "state"
#: What injection adds to a node beside the operator's own attributes: the compute capability, the type of dense rows, the
#: format of the state rows that it touches, that format's version, the rotated channels of a row, and the kernels' library.
FIELDS: dict[str, type] = {
    "sm": int, "dtype": str, "rows": str, "layout_version": int, "rotary": int, "library": str
}  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of an operator.

    Attributes:
        name: as the operator declares it.
        dims: one per axis: a number, a symbol, or a sum of symbols ("W + S").
        dtype: "float32", "int32", "int64", or "state" for rows of the state. These have the engine's type and D channels, or
            they are packed bytes (int8), and the last axis is the bytes of a row.
    """

    name: str
    dims: tuple[str | int, ...]
    dtype: str = "float32"

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.dims)

    def stored_dims(self, rows: str) -> tuple[str | int, ...]:
        """The axes as stored: packed rows of the state end in ``ROW`` bytes."""
        return (*self.dims[:-1], "ROW") if self.dtype == STATE and rows != DENSE else self.dims


@dataclass(frozen=True)
class PluginSpec:
    """A plugin for one operator.

    Attributes:
        operator: ONNX name of the operator that it computes.
        version: of the plugin in the registry.
        inputs: in the operator's order.
        outputs: in the operator's order.
        attributes: name to type (int or float), in the operator's order.
        aliases: output index to the index of the input whose buffer it updates in place.
        sms: compute capabilities that it has kernels for.
        dtypes: types of dense rows of the state ("bfloat16").
        rows: row formats of the state that it reads and writes ("dense", ...); empty if it touches no state.
        layout_version: version of those formats.
    """

    operator: str
    version: str
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    attributes: Mapping[str, type] = field(default_factory=dict)
    aliases: Mapping[int, int] = field(default_factory=dict)
    sms: frozenset[int] = frozenset({80, 86, 89, 90, 100, 103, 120, 121})
    dtypes: frozenset[str] = frozenset({"bfloat16"})
    rows: frozenset[str] = frozenset()
    layout_version: int = LAYOUT_VERSION

    def refusals(self, *, sm: int, dtype: str, rows: str) -> list[str]:
        """Why it cannot take a node: every broken rule, or nothing.

        Args:
            sm: compute capability of the target.
            dtype: type of dense rows on the target.
            rows: row format of the state that the node touches.
        """
        reasons = []
        if sm not in self.sms:
            reasons.append(f"no kernel for sm{sm}; there are sm{', sm'.join(map(str, sorted(self.sms)))}")
        if dtype not in self.dtypes:
            reasons.append(f"no kernel in {dtype}; there are {', '.join(sorted(self.dtypes))}")
        if self.rows and rows not in self.rows:
            reasons.append(f"does not read rows in {rows}; it reads {', '.join(sorted(self.rows))}")
        return reasons

    def dimensions(self, shapes: Sequence[Sequence[int]], *, rows: str = DENSE) -> dict[str, int]:
        """The size of every symbol, from the shapes of the inputs in order.

        Raises:
            ValueError: a shape has the wrong rank, or two tensors disagree on a symbol.
        """
        sizes: dict[str, int] = {}
        sums: list[tuple[str, int]] = []
        for tensor, shape in zip(self.inputs, shapes, strict=True):
            if len(shape) != tensor.rank:
                raise ValueError(f"{self.operator}.{tensor.name} has shape {tuple(shape)}; expected {tensor.dims}")
            for symbol, size in zip(tensor.stored_dims(rows), shape, strict=True):
                if "+" in str(symbol):
                    sums.append((str(symbol), size))
                elif (symbol if isinstance(symbol, int) else sizes.setdefault(symbol, size)) != size:
                    raise ValueError(
                        f"{self.operator}.{tensor.name} has shape {tuple(shape)}; expected {tensor.dims} with {sizes}"
                    )
        for symbol, size in sums:
            whole, part = (text.strip() for text in symbol.split("+"))
            sizes.setdefault(whole, size - sizes[part])
        return sizes

    def output_shapes(self, sizes: Mapping[str, int], *, rows: str = DENSE) -> list[tuple[int, ...]]:
        """The shapes of the outputs, from the size of every symbol."""
        return [
            tuple(
                sum(int(sizes.get(part.strip(), part)) for part in str(dim).split("+"))
                for dim in tensor.stored_dims(rows)
            )
            for tensor in self.outputs
        ]


_POSITIONS = (TensorSpec("positions", ("B",), "int32"), TensorSpec("num_tokens", ("B",), "int32"))
_QUERY = TensorSpec("q", ("B", "S", "H", "D"))
_ROWS = TensorSpec("rows", ("B", "W + S", "D"), STATE)
_ENTRIES = TensorSpec("entries", ("B", "E", "D"), STATE)
_SINKS, _FREQUENCIES = TensorSpec("sinks", ("H",)), TensorSpec("inv_freq", ("P",))
_CONTEXT = TensorSpec("active_context", (1,), "int64")
_OUT = (TensorSpec("out", ("B", "S", "H", "D")),)
_CHOSEN = TensorSpec("chosen", ("B", "S", "K"), "int32")
_SCORES = TensorSpec("scores", ("B", "S", "E"))
_WINDOW = TensorSpec("window", ("B", "W", "D"), STATE)
_CARRIES = (TensorSpec("carry_kv", ("B", "R", "C")), TensorSpec("carry_gate", ("B", "R", "C")))
_COMPRESSED = (
    _ENTRIES, *_CARRIES, TensorSpec("kv", ("B", "S", "C")), TensorSpec("gate", ("B", "S", "C")),
    TensorSpec("bias", ("T", "C")), TensorSpec("norm", ("D",)), _FREQUENCIES, *_POSITIONS,
)  # fmt: skip
_CARRY = TensorSpec("carry", ("B", ONLINE_ROWS, "D"))
_COMPRESSED_ONLINE = (
    _ENTRIES, _CARRY, TensorSpec("kv", ("B", "S", "D")), TensorSpec("gate", ("B", "S", "D")),
    TensorSpec("bias", ("T", "D")), TensorSpec("norm", ("D",)), _FREQUENCIES, *_POSITIONS,
)  # fmt: skip
_MAIN, _INDEX = frozenset({DENSE, FP8_DS_MLA}), frozenset({DENSE, INDEX_FP8, INDEX_FP4})

PLUGINS: dict[str, PluginSpec] = {
    spec.operator: spec
    for spec in (
        PluginSpec(
            "FoldkvWindowUpdate", "1",
            inputs=(_WINDOW, TensorSpec("kv", ("B", "S", "D")), *_POSITIONS),
            outputs=(_ROWS, _WINDOW),
            aliases={1: 0},
            rows=_MAIN,
        ),
        PluginSpec(
            "FoldkvCompress", "2",
            inputs=_COMPRESSED,
            outputs=(_ENTRIES, *_CARRIES),
            attributes={"ratio": int, "eps": float},
            aliases={0: 0, 1: 1, 2: 2},
            rows=_MAIN | _INDEX,
        ),
        PluginSpec(
            "FoldkvCompressFp8", "2",
            inputs=_COMPRESSED,
            outputs=(_ENTRIES, *_CARRIES),
            attributes={"rotary": int, "ratio": int, "eps": float},
            aliases={0: 0, 1: 1, 2: 2},
            rows=_MAIN,
        ),
        PluginSpec(
            "FoldkvCompressFp4", "2",
            inputs=(*_COMPRESSED, TensorSpec("hadamard", ("D", "D"))),
            outputs=(_ENTRIES, *_CARRIES),
            attributes={"ratio": int, "eps": float},
            aliases={0: 0, 1: 1, 2: 2},
            # Rows in index_fp8 have one scale; e2m1 values have several.
            rows=frozenset({DENSE, INDEX_FP4}),
        ),
        PluginSpec(
            "FoldkvCompressOnline", "1",
            inputs=_COMPRESSED_ONLINE,
            outputs=(_ENTRIES, _CARRY),
            attributes={"ratio": int, "eps": float},
            aliases={0: 0, 1: 1},
            rows=_MAIN,
        ),
        PluginSpec(
            "FoldkvCompressOnlineFp8", "1",
            inputs=_COMPRESSED_ONLINE,
            outputs=(_ENTRIES, _CARRY),
            attributes={"rotary": int, "ratio": int, "eps": float},
            aliases={0: 0, 1: 1},
            rows=_MAIN,
        ),
        PluginSpec(
            "FoldkvIndexScores", "1",
            inputs=(
                _QUERY, TensorSpec("weights", ("B", "S", "H")), TensorSpec("index_entries", ("B", "E", "D"), STATE),
                TensorSpec("positions", ("B",), "int32"), _CONTEXT,
            ),
            outputs=(_SCORES,),
            attributes={"ratio": int},
            rows=_INDEX,
        ),
        PluginSpec(
            "FoldkvIndexSelect", "1",
            inputs=(_SCORES, TensorSpec("positions", ("B",), "int32")),
            outputs=(TensorSpec("chosen", ("B", "S", "topk"), "int32"),),
            attributes={"ratio": int, "topk": int},
        ),
        PluginSpec(
            "FoldkvWindowAttention", "1",
            inputs=(_QUERY, _ROWS, _SINKS, _FREQUENCIES, *_POSITIONS),
            outputs=_OUT,
            rows=_MAIN,
        ),
        PluginSpec(
            "FoldkvSparseAttention", "1",
            inputs=(_QUERY, _ROWS, _ENTRIES, _CHOSEN, _SINKS, _FREQUENCIES, *_POSITIONS),
            outputs=_OUT,
            rows=_MAIN,
        ),
        PluginSpec(
            "FoldkvDenseAttention", "1",
            inputs=(_QUERY, _ROWS, _ENTRIES, _SINKS, _FREQUENCIES, *_POSITIONS, _CONTEXT),
            outputs=_OUT,
            rows=_MAIN,
            attributes={"ratio": int},
        ),
    )
}  # fmt: skip

#: Operators that stay function bodies in every engine, and why.
BODIES: dict[str, str] = {
    "FoldkvRope": "stays a function body: TensorRT fuses it with the projection before it",
    "FoldkvSinkhorn": "stays a function body: it reads no compressed KV",
    "FoldkvRoutedExperts": "stays a function body: it reads no compressed KV",
    "FoldkvQuantizeFp8": "stays a function body: rounding before a row is written, in graphs of the profile served",
    "FoldkvQuantizeFp4": "stays a function body: rounding of the indexer's queries, in graphs of the profile served",
}
#: Operators of graphs with stored weights (export/operators/packed.py), and why each stays a function body.
WEIGHT_BODIES: dict[str, str] = {
    "FoldkvRoutedExpertsFp4": "stays a function body: it reads no compressed KV",
    "FoldkvRoutedExpertsFp8": "stays a function body: it reads no compressed KV",
    "FoldkvExponents": "stays a function body: it decodes weights",
    "FoldkvBlockScale": "stays a function body: it decodes weights",
    "FoldkvPartialBlockScale": "stays a function body: it decodes weights",
}
