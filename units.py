"""Numbers as people write them: tokens in powers of 1024, bytes, seconds. Standard library only."""

from __future__ import annotations

import re
from typing import Any

_TOKENS = {"k": 1 << 10, "m": 1 << 20}


def read_tokens(value: Any) -> int:
    """A number of tokens: 4096, "4096", "64k" or "1M" (powers of 1024). The command line and pipeline files use it.

    Raises:
        ValueError: it is something else, or less than 1; the message says what was expected.
    """
    text = str(value).strip().lower() if isinstance(value, (int, str)) and not isinstance(value, bool) else ""
    unit = _TOKENS.get(text[-1:], 1)
    digits = text[:-1] if unit > 1 else text
    if not (digits.isascii() and digits.isdigit()) or int(digits) < 1:
        raise ValueError(f"{value!r} is not a number of tokens; expected for example 4096, 64k or 1M.")
    return int(digits) * unit


def read_size(value: Any) -> int:
    """Bytes: 4096, "512KiB", "4MiB", "1GiB" or "2TiB" (powers of 1024; "KB", "K" and so on mean the same).

    Raises:
        ValueError: it is something else, or less than 1; the message says what was expected.
    """
    text = str(value).strip().lower() if isinstance(value, (int, str)) and not isinstance(value, bool) else ""
    found = re.fullmatch(r"([0-9]{1,15})\s*(?:([kmgt])i?)?b?", text)
    if found is None or int(found[1]) < 1:
        raise ValueError(f"{value!r} is not a number of bytes; expected for example 4096, 512KiB, 4MiB or 1GiB.")
    return int(found[1]) << (10 * (" kmgt".index(found[2]) if found[2] else 0))


def count_text(count: float) -> str:
    """A large number in billions or millions: "284 billion"."""
    word, factor = ("billion", 1e9) if count >= 1e9 else ("million", 1e6)
    return f"{count / factor:,.0f} {word}" if count >= 100 * factor else f"{count / factor:.3g} {word}"


def size_text(count: float) -> str:
    """Bytes in the largest unit that gives 1 or more."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f} B"


def duration_text(seconds: float) -> str:
    """Seconds in the largest unit that gives 2 or more."""
    for unit, factor in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds:.3g} s"
