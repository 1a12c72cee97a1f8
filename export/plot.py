"""Cache memory against context as one picture, SVG or HTML, which needs nothing from the network. Standard library only.

V4-Flash, V4-Pro and V3.2 are always shown for comparison; export/configs has their configurations.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path

from ..artifact import write_whole
from ..errors import InputError
from .checkpoint.config_reader import spec_from_file
from .contract.geometry import ModelSpec
from .memory import V32_BYTES_PER_TOKEN, plan_memory

#: Context sizes to draw: 1k to 1M.
CONTEXTS = tuple(1 << power for power in range(10, 21))
RELEASED = {"V4-Flash": "deepseek-v4-flash.json", "V4-Pro": "deepseek-v4-pro.json"}
SUFFIXES = (".html", ".svg")
# Okabe and Ito's colours, which colour-blind readers can also tell apart; V3.2 is grey and dashed.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_GREY = "#666666"
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 860, 520, 84, 150, 64, 56
_LABEL_GAP = 16  # pixels between the names at the right edge
_FONT = 'font-family="system-ui, sans-serif"'
_GIB = 1 << 30


@dataclass(frozen=True)
class Curve:
    """Bytes for each context of ``CONTEXTS`` that the model takes."""

    name: str
    points: tuple[tuple[int, int], ...]
    colour: str
    dashed: bool = False


def released_specs() -> dict[str, ModelSpec]:
    """The released models with configurations in this package."""
    folder = resources.files("foldkv.export").joinpath("configs")
    return {name: spec_from_file(Path(str(folder.joinpath(file)))) for name, file in RELEASED.items()}


def memory_curves(models: Mapping[str, ModelSpec], *, batch: int, layout: str) -> list[Curve]:
    """The caches of the released models, of ``models`` by name, and of V3.2 in fp8.

    Models with the same caches are drawn once.

    Raises:
        InputError: an unknown layout, or one whose rows a model does not have.
    """
    curves: list[Curve] = []
    for name, spec in {**released_specs(), **models}.items():
        sizes = [context for context in CONTEXTS if context <= spec.max_position_embeddings]
        points = tuple(
            (size, plan_memory(spec, context=size, batch=batch, layout=layout).total) for size in sizes
        )  # fmt: skip
        if points and points not in [curve.points for curve in curves]:
            curves.append(Curve(name, points, _COLOURS[len(curves) % len(_COLOURS)]))
    v32 = tuple((size, batch * size * V32_BYTES_PER_TOKEN) for size in CONTEXTS)
    return [*curves, Curve("V3.2 (fp8)", v32, _GREY, dashed=True)]


def write_plot(
    path: Path, models: Mapping[str, ModelSpec], *, batch: int, layout: str, limits: Mapping[str, int] | None = None
) -> None:
    """Write the picture to ``path``, in the format of its suffix.

    Args:
        path: a file with the suffix .html or .svg.
        models: further models by name.
        batch: sequences.
        layout: of the cache rows of V4.
        limits: bytes by name, drawn as horizontal lines: the memory of one GPU.

    Raises:
        InputError: another suffix, or as :func:`memory_curves`.
        SystemFailure: the file cannot be written.
    """
    check_plot_path(path)
    curves = memory_curves(models, batch=batch, layout=layout)
    title = f"KV cache against context: {layout} rows, {batch} sequence{'s' if batch > 1 else ''}"
    picture = plot_svg(curves, title, limits or {})
    text = picture if path.suffix == ".svg" else _page(title, picture, curves)
    write_whole(path, text)


def check_plot_path(path: Path) -> None:
    """Refuse a path that a picture cannot be written to, before any work is done.

    Raises:
        InputError: a suffix that is neither .html nor .svg, or a folder that does not exist or is not writable.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(f"a plot is written as {' or '.join(SUFFIXES)}; {path} ends in {path.suffix or 'nothing'!r}.")
    for wrong, why in (
        (path.is_dir(), "it is a folder"),
        (not path.parent.is_dir(), f"{path.parent} is not a folder"),
        (not os.access(path.parent, os.W_OK), f"you have no permission to write to {path.parent}"),
    ):
        if wrong:
            raise InputError(f"{path} cannot be written: {why}. Give a file in a folder that exists and is writable.")


def plot_svg(curves: Sequence[Curve], title: str, limits: Mapping[str, int]) -> str:
    """The curves on two logarithmic axes, with their names at the end and figures on their points."""
    values = [bytes_ for curve in curves for _, bytes_ in curve.points] + list(limits.values())
    axes = _Axes(math.floor(math.log10(min(values) / _GIB)), math.ceil(math.log10(max(values) / _GIB)))
    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}"'
    note = "entries, index, window and carries; V3.2: 61 layers of 656 + 132 bytes per token"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" {_FONT} font-size="13" fill="#222222">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="28" font-size="17" font-weight="600">{escape(title)}</text>',
        f'<text x="{_LEFT}" y="48" fill="#555555">{note}</text>',
        *_grid(axes),
        *_limit_lines(axes, limits),
    ]
    names = _spread([axes.y(curve.points[-1][1]) for curve in curves])
    for curve, name_y in zip(curves, names, strict=True):
        parts += _curve(axes, curve, name_y)
    return "\n".join([*parts, "</svg>\n"])


@dataclass(frozen=True)
class _Axes:
    """From tokens and bytes to pixels; ``low`` and ``high`` are powers of ten, in GiB."""

    low: int
    high: int

    def x(self, context: int) -> float:
        share = math.log2(context / CONTEXTS[0]) / math.log2(CONTEXTS[-1] / CONTEXTS[0])
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, bytes_: float) -> float:
        share = (math.log10(bytes_ / _GIB) - self.low) / max(1, self.high - self.low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _grid(axes: _Axes) -> list[str]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for power in range(axes.low, axes.high + 1):
        y = axes.y(10.0**power * _GIB)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="#dddddd"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    for context in CONTEXTS[::2]:
        x = axes.x(context)
        parts.append(f'<path d="M{x:.1f} {_TOP}V{bottom}" stroke="#eeeeee"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 20}" text-anchor="middle">{_tokens(context)}</text>')
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 12}" text-anchor="middle">context, tokens per sequence</text>'
    )
    parts.append(
        f'<text transform="translate(22 {middle}) rotate(-90)" text-anchor="middle">GiB of caches on each GPU</text>'
    )
    return parts


def _limit_lines(axes: _Axes, limits: Mapping[str, int]) -> list[str]:
    parts = []
    names: dict[int, list[str]] = {}
    for name, bytes_ in limits.items():
        names.setdefault(bytes_, []).append(name)
    levels = sorted(names, reverse=True)
    for bytes_, name_y in zip(levels, _spread([axes.y(level) for level in levels], gap=13), strict=True):
        y = axes.y(bytes_)
        text = f"one {' or '.join(names[bytes_])}: {bytes_ / _GIB:g} GiB"
        parts.append(
            f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="#999999" stroke-width="1.2" stroke-dasharray="2 4"/>'
        )
        place = f'x="{_LEFT + 6}" y="{name_y - 4:.1f}" font-size="11" fill="#555555"'
        parts.append(f'<text {place} stroke="#ffffff" stroke-width="3" paint-order="stroke">{escape(text)}</text>')
    return parts


def _curve(axes: _Axes, curve: Curve, name_y: float) -> list[str]:
    places = [(axes.x(context), axes.y(bytes_)) for context, bytes_ in curve.points]
    dashes = ' stroke-dasharray="7 5"' if curve.dashed else ""
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline points="{line}" fill="none" stroke="{curve.colour}" stroke-width="2.2"{dashes}/>']
    for (x, y), (context, bytes_) in zip(places, curve.points, strict=True):
        tip = f"{curve.name}, {_tokens(context)} tokens: {_figure(bytes_)}"
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{curve.colour}"><title>{escape(tip)}</title></circle>'
        )
    label = f"{curve.name}  {_figure(curve.points[-1][1])}"
    parts.append(
        f'<text x="{places[-1][0] + 9:.1f}" y="{name_y + 4:.1f}" fill="{curve.colour}" font-weight="600">{escape(label)}</text>'
    )
    return parts


def _spread(places: Sequence[float], *, gap: float = _LABEL_GAP) -> list[float]:
    """The places, moved apart if they are closer than ``gap``; their order stays the same."""
    moved = list(places)
    order = sorted(range(len(moved)), key=lambda index: places[index])
    for before, after in itertools.pairwise(order):
        moved[after] = max(moved[after], moved[before] + gap)
    return moved


def _page(title: str, picture: str, curves: Sequence[Curve]) -> str:
    head = "".join(f"<th>{escape(curve.name)}</th>" for curve in curves)
    rows = []
    for context in CONTEXTS:
        cells = (dict(curve.points).get(context) for curve in curves)
        figures = "".join(f"<td>{_figure(cell) if cell is not None else ''}</td>" for cell in cells)
        rows.append(f"<tr><th>{_tokens(context)}</th>{figures}</tr>")
    # Inside HTML a picture needs no namespace, so the page contains no address at all.
    inline = picture.replace(' xmlns="http://www.w3.org/2000/svg"', "", 1)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{escape(title)}</title>
<style>
body {{ font: 14px/1.45 system-ui, sans-serif; color: #222; background: #fff; max-width: {_WIDTH}px; margin: 24px auto; padding: 0 16px }}
svg {{ max-width: 100%; height: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: 3px 14px 3px 0; text-align: right; border-bottom: 1px solid #eee; font-weight: normal }}
thead th {{ font-weight: 600 }}
</style>
</head>
<body>
{inline}
<table>
<thead><tr><th>context</th>{head}</tr></thead>
<tbody>
{chr(10).join(rows)}
</tbody>
</table>
</body>
</html>
"""


def _tokens(context: int) -> str:
    return f"{context >> 20}M" if context >= 1 << 20 else f"{context >> 10}k"


def _figure(bytes_: int) -> str:
    unit, factor = ("GiB", _GIB) if bytes_ >= _GIB else ("MiB", 1 << 20)
    return f"{bytes_ / factor:.3g} {unit}"
