"""The code of a page of documentation, as a reader would run it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

#: Before a block that no test can run; the reason stands behind it.
NOT_RUN = "<!-- not run by the tests: "
_END = "END_OF_EXAMPLES"
_BLOCK = re.compile(
    r"^(?P<mark><!-- [^\n]* -->\n+)?```(?P<language>sh|python)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
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
    """A bash script of everything in a page that can be run, in order; it ends at the first error.

    Examples in Python with no command between them are one program.
    """
    parts, ran = ["set -euo pipefail"], ""
    for block in blocks(page):
        if block.not_run:
            continue
        if block.language == "sh":
            parts.append(block.code)
        elif ran == "python":  # goes on where the example before ended
            parts[-1] = parts[-1].removesuffix(_END) + block.code + _END
        else:
            parts.append(f"python - <<'{_END}'\n{block.code}{_END}")
        ran = block.language
    return "\n".join(parts)
