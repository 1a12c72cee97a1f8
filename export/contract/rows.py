"""Row formats: how a row of cached values is stored, and how many bytes it takes. Standard library only.

A row of the state is dense (values of one type side by side) or packed (bytes: codes, then channels that stay bfloat16,
then scales). Everything else asks the object here: planners its bytes, kernels its name and version, graphs its packer
and bodies (export/operators/row_formats.py has them by name).
CONTRIBUTING.md has the steps for a new format.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import InputError


@dataclass(frozen=True)
class RowFormat:
    """How one row of the state is stored.

    Attributes:
        name: in manifests, node attributes and kernels.
        code_bits: of a channel's code; None for dense rows, whose channels have the type of the tensor.
        tile: channels that share a scale; None if the whole row shares one.
        scale_bytes: bytes of a scale.
        keeps_rope: whether the channels that RoPE turned stay bfloat16, after the codes. Otherwise they are coded too.
        multiple: the coded channels must be a multiple of this.
        alignment: bytes to whose multiple a row is padded.
        version: of the bytes' meaning. Kernels, bundles and snapshots of another version are refused.
        index: whether it is for the indexer's rows, and not for the rows that attention reads.
        kernels: whether plugins/kernels read and write it.
    """

    name: str
    code_bits: int | None = None
    tile: int | None = None
    scale_bytes: int = 0
    keeps_rope: bool = False
    multiple: int = 1
    alignment: int = 1
    version: int = 1
    index: bool = False
    kernels: bool = False

    @property
    def packed(self) -> bool:
        """Whether rows are bytes (int8), and not values of the tensor's type."""
        return self.code_bits is not None

    def kept(self, rope_dim: int) -> int:
        """Channels at the end of a row that stay bfloat16, of the ``rope_dim`` that RoPE turned."""
        return rope_dim if self.keeps_rope else 0

    def row_bytes(self, width: int, rope_dim: int = 0, *, item: int = 2) -> int:
        """Bytes of one row.

        Args:
            width: channels.
            rope_dim: the channels among them that RoPE turns; they come last.
            item: bytes of a channel of a dense row.

        Raises:
            InputError: channels that do not fill its bytes.
        """
        coded = width - self.kept(rope_dim)
        if not 0 <= rope_dim <= width or coded % self.multiple:
            raise InputError(f"rows of {width} channels, {rope_dim} of them rotated, cannot be stored as {self.name}.")
        if self.code_bits is None:
            return item * width
        scales = 1 if self.tile is None else -(-coded // self.tile)
        size = coded * self.code_bits // 8 + 2 * self.kept(rope_dim) + scales * self.scale_bytes
        return -(-size // self.alignment) * self.alignment


_FORMATS: dict[str, RowFormat] = {}


def register_row_format(format_: RowFormat) -> str:
    """Make a row format known; returns its name.

    Raises:
        InputError: another format has that name.
    """
    if _FORMATS.setdefault(format_.name, format_) != format_:
        raise InputError(f"row format {format_.name!r} is declared twice, in different ways. Give one another name.")
    return format_.name


def row_format_named(name: str) -> RowFormat:
    """The row format with that name.

    Raises:
        InputError: there is none.
    """
    if name not in _FORMATS:
        raise InputError(
            f"row format {name!r} is not known; expected one of {', '.join(_FORMATS)}. "
            "A format of your own is declared with export.contract.rows.register_row_format."
        )
    return _FORMATS[name]


def row_formats() -> tuple[RowFormat, ...]:
    """Every known format, in the order of declaration."""
    return tuple(_FORMATS.values())


DENSE = register_row_format(RowFormat("dense", kernels=True))
#: The row of deployed engines: e4m3 in tiles of 64, the rotated channels as bfloat16, one e8m0 scale per tile.
FP8_DS_MLA = register_row_format(
    RowFormat("fp8_ds_mla", code_bits=8, tile=64, scale_bytes=1, keeps_rope=True, multiple=2, alignment=8, kernels=True)
)
#: e2m1 in tiles of 16, the rotated channels as bfloat16, one e4m3 scale per tile. Of other systems, only for planning.
NVFP4 = register_row_format(
    RowFormat("nvfp4", code_bits=4, tile=16, scale_bytes=1, keeps_rope=True, multiple=32, alignment=8)
)
#: e4m3 with one float32 scale, itself a power of two.
INDEX_FP8 = register_row_format(RowFormat("index_fp8", code_bits=8, scale_bytes=4, index=True, kernels=True))
#: e2m1, the lower half of a byte first, with one e8m0 scale per 32 channels.
INDEX_FP4 = register_row_format(
    RowFormat("index_fp4", code_bits=4, tile=32, scale_bytes=1, multiple=32, index=True, kernels=True)
)
