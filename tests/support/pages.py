"""The code of a page of documentation, as a reader would run it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

#: Before a block that no test can run; the reason stands behind it.
NOT_RUN = "<!-- not run by the tests: "
_BLOCK = re.compile(
    r"^(?P<mark><!-- .*? -->\n+)?```(?P<language>sh|python)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """One fenced block: "sh" or "python", its code, and why it is not run ("" where it is)."""

    language: str
    code: str
    not_run: str


def blocks(page: Path) -> list[Block]:
    """The blocks of shell commands and of Python in a page, in order."""
    found = []
    for match in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        mark = match["mark"] or ""
        reason = mark.removeprefix(NOT_RUN).removesuffix(" -->\n") if mark.startswith(NOT_RUN) else ""
        found.append(Block(match["language"], match["code"], reason))
    return found


def script(page: Path) -> str:
    """A bash script of everything in a page that can be run, in order; it ends at the first error."""
    parts = ["set -euo pipefail"]
    for number, block in enumerate(blocks(page), 1):
        if block.not_run:
            continue
        if block.language == "sh":
            parts.append(block.code)
        else:
            parts.append(f"python - <<'END_OF_BLOCK_{number}'\n{block.code}END_OF_BLOCK_{number}")
    return "\n".join(parts)
