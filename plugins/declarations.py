"""PluginSpec: one operator as its plugin sees it. Standard library only, so a runtime can read it.

Tensors, attributes, updates and row formats follow from the operator's declaration (export/contract/operators.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..export.contract.operators import OperatorSpec, TensorSpec, operator_specs
from ..export.contract.rows import DENSE, RowFormat, row_format_named, row_formats

#: The namespace of foldkv's plugins in TensorRT's registry. The registered creator takes a node with this
#: namespace even if there is a function body of the same name.
NAMESPACE = "foldkv"
#: Version of the row formats as plugins/kernels reads and writes them; nodes and bundles with another one are refused.
LAYOUT_VERSION = 1
#: What injection adds to a node beside the operator's own attributes: the compute capability, the type of dense rows, the
#: format of the state rows that it touches, that format's version, the rotated channels of a row, and the kernels' library.
FIELDS: dict[str, type] = {
    "sm": int, "dtype": str, "row_format": str, "layout_version": int, "rope_dim": int, "library": str
}  # fmt: skip


@dataclass(frozen=True)
class PluginSpec:
    """A plugin for one operator.

    Attributes:
        operator: ONNX name of the operator that it computes.
        version: of the plugin in the registry.
        inputs: in the operator's order.
        outputs: in the operator's order.
        attributes: name to type (int, float, str or tuple), in the operator's order.
        aliases: output index to the index of the input whose buffer it updates in place.
        sms: compute capabilities that it has kernels for.
        dtypes: types of dense rows of the state ("bfloat16").
        row_formats: of the state that it reads and writes ("dense", ...); empty if it touches no state.
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
    row_formats: frozenset[str] = frozenset()
    layout_version: int = LAYOUT_VERSION

    @classmethod
    def of(cls, spec: OperatorSpec) -> PluginSpec:
        """The plugin of an operator that has one."""
        assert spec.plugin is not None
        formats = frozenset(format_.name for format_ in row_formats() if format_.kernels and _takes(spec, format_))
        return cls(
            spec.name, spec.plugin, spec.inputs, spec.outputs, dict(spec.attributes), dict(spec.updates),
            row_formats=formats if spec.state else frozenset(),
        )  # fmt: skip

    def refusals(self, *, sm: int, dtype: str, row_format: str) -> list[str]:
        """Why it cannot take a node: every broken rule, or nothing.

        Args:
            sm: compute capability of the target.
            dtype: type of dense rows on the target.
            row_format: of the state that the node touches.
        """
        reasons = []
        if sm not in self.sms:
            reasons.append(f"no kernel for sm{sm}; there are sm{', sm'.join(map(str, sorted(self.sms)))}")
        if dtype not in self.dtypes:
            reasons.append(f"no kernel in {dtype}; there are {', '.join(sorted(self.dtypes))}")
        if self.row_formats and row_format not in self.row_formats:
            reasons.append(f"does not read rows in {row_format}; it reads {', '.join(sorted(self.row_formats))}")
        elif (version := row_format_named(row_format).version) != self.layout_version:
            reasons.append(f"does not read version {version} of {row_format}; it reads version {self.layout_version}")
        return reasons

    def dimensions(self, shapes: Sequence[Sequence[int]], *, row_format: str = DENSE) -> dict[str, int]:
        """The size of every symbol, from the shapes of the inputs in order.

        Raises:
            ValueError: a shape has the wrong rank, or two tensors disagree on a symbol.
        """
        packed, sizes = row_format_named(row_format).packed, dict[str, int]()
        sums: list[tuple[str, int]] = []
        for tensor, shape in zip(self.inputs, shapes, strict=True):
            for symbol, size in tensor.sized(shape, packed=packed):
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

    def output_shapes(self, sizes: Mapping[str, int], *, row_format: str = DENSE) -> list[tuple[int, ...]]:
        """The shapes of the outputs, from the size of every symbol."""
        packed = row_format_named(row_format).packed
        return [
            tuple(
                sum(int(sizes.get(part.strip(), part)) for part in str(dim).split("+"))
                for dim in tensor.stored_dims(packed=packed)
            )
            for tensor in self.outputs
        ]


def _takes(spec: OperatorSpec, format_: RowFormat) -> bool:
    """Whether rows of a format can be the state of an operator.

    An operator that rounds takes the format that it rounds to: ``index_fp8`` has one scale, e2m1 values have several.
    """
    if not format_.packed:
        return True
    if spec.rounds is not None:
        return format_.name == spec.rounds
    return format_.index in {group.startswith("index") for tensor in spec.state for group in tensor.groups}


PLUGINS: dict[str, PluginSpec] = {
    name: PluginSpec.of(spec) for name, spec in operator_specs().items() if spec.plugin is not None
}

#: Operators that stay function bodies in every engine, and why.
BODIES: dict[str, str] = {
    name: f"stays a function body: {spec.no_plugin}" for name, spec in operator_specs().items() if spec.plugin is None
}
#: Operators of graphs with stored weights (export/operators/packed.py), and why each stays a function body.
WEIGHT_BODIES: dict[str, str] = {
    "FoldkvExponents": "stays a function body: it decodes weights",
    "FoldkvBlockScale": "stays a function body: it decodes weights",
    "FoldkvPartialBlockScale": "stays a function body: it decodes weights",
}
