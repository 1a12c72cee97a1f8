"""The page at ``/``: one file, which asks nothing but this server."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib import resources


@functools.cache
def page() -> bytes:
    """The page, in UTF-8."""
    return resources.files(__package__).joinpath("page.html").read_bytes()


def _digest(tag: str) -> str:
    """The one element of this name, as a browser's policy names what it may run."""
    content = re.search(f"<{tag}>(.*?)</{tag}>".encode(), page(), re.DOTALL)
    assert content is not None
    return f"'sha256-{base64.b64encode(hashlib.sha256(content[1]).digest()).decode()}'"


@functools.cache
def page_headers() -> dict[str, str]:
    """What a browser may do for the page: run its own script and ask this server, and nothing else."""
    return {
        "content-security-policy": (
            f"default-src 'none'; script-src {_digest('script')}; style-src {_digest('style')}; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }
