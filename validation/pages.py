"""Pages that need nothing from the network, and Markdown: a template with the common style in it, and how figures are written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .kl_table import Row


def render(template: str, **values: Any) -> str:
    """A page from a template of this folder. Texts of pages are escaped; in Markdown, cells of tables are by ``|cell``."""
    import jinja2
    import markupsafe

    folder = resources.files("foldkv.validation").joinpath("templates")
    environment = jinja2.Environment(
        autoescape="html" in template, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "figure": format_figure, "beside": format_beside, "quoted": _quoted, "with_error": format_with_error, "cell": _cell,
    }  # fmt: skip
    style = markupsafe.Markup(folder.joinpath("style.css").read_text(encoding="utf-8"))
    source = folder.joinpath(template).read_text(encoding="utf-8")
    return environment.from_string(source).render(style=style, **values)


def _quoted(text: str) -> str:
    """The text in quotation marks. Characters that cannot be seen are escaped, all others are not."""
    return json.dumps(text, ensure_ascii=False)


def _cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def format_figure(value: float | None, digits: int = 4) -> str:
    """A value with ``digits`` significant digits; small and large values in powers of ten; a dash for none."""
    if value is None:
        return "\u2013"
    if not math.isfinite(value):
        return {"inf": "∞", "-inf": "-∞", "nan": "not a number"}[str(value)]
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{value:,.0f}"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.{digits}g}"
    return f"{value:.{digits - 3}e}"


def format_beside(value: float | None, threshold: float) -> str:
    """A figure with enough digits to tell it from its threshold."""
    for digits in range(4, 18):
        if (text := format_figure(value, digits)) != format_figure(threshold, digits):
            return text
    return format_figure(value)


def format_with_error(row: Row, metrics: Mapping[str, float]) -> str:
    """A line of the table of metrics: its value, with ``±`` and one standard error, in per cent if it is a share."""
    factor, unit = (100, " %") if row.percent else (1, "")
    error = "" if row.error is None else f" ± {format_figure(factor * metrics[row.error], 3)}"
    return f"{format_figure(factor * metrics[row.metric])}{error}{unit}"


def plain(value: Any) -> Any:
    """Values as JSON has them: infinities and NaN as texts."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
