"""Cache layouts: which row format each state group has, and what its tensors are then. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...errors import InputError
from .rows import DENSE as DENSE_ROWS
from .rows import FP8_DS_MLA, INDEX_FP4, INDEX_FP8, NVFP4, row_format_named
from .state import StateTensor

#: Name of the layout whose rows are all dense.
DENSE = "dense"


@dataclass(frozen=True)
class CacheLayout:
    """The names of the row formats of ``window`` and ``entries``, and of ``index_entries``.

    ``built`` says whether engines of this version support it; the others are formats of other systems, only for planning.
    """

    name: str
    row_format: str
    index_row_format: str
    built: bool = True

    def format_of(self, group: str) -> str | None:
        """The name of a state group's row format; None for carries, which are float32 in every layout."""
        if "carry" in group:
            return None
        return self.index_row_format if group.startswith("index") else self.row_format

    def stored(self, tensor: StateTensor, rope_dim: int, dense: str = "float32") -> StateTensor:
        """A state tensor of the model as this layout keeps it.

        Args:
            tensor: in float32.
            rope_dim: channels of a row that RoPE turns.
            dense: type of dense rows.

        Raises:
            InputError: an unknown row format, or channels that do not fill its bytes.
        """
        name = self.format_of(tensor.group)
        if name is None:
            return tensor
        format_ = row_format_named(name)
        if not format_.packed:
            return replace(tensor, dtype=dense)
        return replace(tensor, dtype="int8", width=format_.row_bytes(tensor.width, rope_dim))


LAYOUTS = {
    layout.name: layout
    for layout in (
        CacheLayout(DENSE, DENSE_ROWS, DENSE_ROWS),
        CacheLayout("fp8", FP8_DS_MLA, INDEX_FP8),
        CacheLayout("fp8+fp4", FP8_DS_MLA, INDEX_FP4),
        CacheLayout("nvfp4+fp4", NVFP4, INDEX_FP4, built=False),
    )
}
#: The layouts that a build can use, if the target and the graph support them (optimize/choices.py).
BUILT = tuple(name for name, layout in LAYOUTS.items() if layout.built)


def cache_layout(name: str) -> CacheLayout:
    """The layout with that name.

    Raises:
        InputError: there is none, or no target supports it.
    """
    if name not in BUILT:
        found = "is not supported by any target" if name in LAYOUTS else "is not known"
        raise InputError(f"layout {name!r} {found}; expected one of {', '.join(BUILT)}.")
    return LAYOUTS[name]
