"""The layout of cache rows in memory, and their size. Standard library only.

``fp8_ds_mla`` is the row of deployed engines: the channels without position as e4m3 in tiles of 64,
the rotated ones as bfloat16, then one power-of-two scale per tile (e8m0). Index rows are e4m3 with one float32
scale (itself a power of two), or e2m1, the lower half of a byte first, with one e8m0 scale per 32 channels.
``export/operators/rows.py`` defines the values; kernels and backends know the formats by ``version``.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import InputError

#: Version of every format below; kernels read this version and refuse others.
LAYOUT_VERSION = 1
DENSE, FP8_DS_MLA, NVFP4, INDEX_FP8, INDEX_FP4 = "dense", "fp8_ds_mla", "nvfp4", "index_fp8", "index_fp4"
#: Channels that share a scale.
TILES = {FP8_DS_MLA: 64, NVFP4: 16, INDEX_FP4: 32}
#: Rows of an open window that does not overlap: largest score, sum of weights, weighted sum (operators/compress_online.py).
ONLINE_ROWS = 3
_ROW_ALIGNMENT = 8  # bytes, of rows with several parts


@dataclass(frozen=True)
class CacheLayout:
    """The format of a row of ``window`` and ``entries``, and of a row of ``index_entries``.

    ``built`` says whether engines of this version support it; the others are formats of other systems, only for planning.
    """

    name: str
    rows: str
    index_rows: str
    built: bool = True

    def format_of(self, group: str) -> str | None:
        """The format of a state group; None for carries, which are float32 in every layout."""
        if "carry" in group:
            return None
        return self.index_rows if group.startswith("index") else self.rows


LAYOUTS = {
    layout.name: layout
    for layout in (
        CacheLayout("dense", DENSE, DENSE),
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


def row_bytes(format_: str, width: int, rotary: int, item: int = 2) -> int:
    """Bytes of one row.

    Args:
        format_: of the row, "dense" or a packed one.
        width: channels.
        rotary: the channels among them that RoPE turns; they come last.
        item: bytes of a channel of a dense row.

    Raises:
        InputError: an unknown format, or channels that do not fill its bytes.
    """
    plain = width - rotary
    halves = {FP8_DS_MLA: 2, NVFP4: 2 * TILES[NVFP4], INDEX_FP4: TILES[INDEX_FP4]}.get(format_, 1)
    if (width if format_ == INDEX_FP4 else plain) % halves or plain < 0:
        raise InputError(f"rows of {width} channels, {rotary} of them rotated, cannot be stored as {format_}.")
    sizes = {
        DENSE: item * width,
        FP8_DS_MLA: _aligned(plain + 2 * rotary + -(-plain // TILES[FP8_DS_MLA])),
        NVFP4: _aligned(plain // 2 + 2 * rotary + plain // TILES[NVFP4]),
        INDEX_FP8: width + 4,
        INDEX_FP4: width // 2 + width // TILES[INDEX_FP4],
    }
    if format_ not in sizes:
        raise InputError(f"row format {format_!r} is not known; expected one of {', '.join(sizes)}.")
    return sizes[format_]


def _aligned(size: int) -> int:
    return -(-size // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
