"""What computes: the versions of Python and of the packages that measure."""

from __future__ import annotations

from ..packages import FEATURES, versions
from ..runtime.bundle import Bundle


def environment(bundle: Bundle) -> dict[str, str]:
    """Versions by package, with Python's and foldkv's own. A package that is not installed is left out."""
    return versions(dict.fromkeys([*FEATURES["validate"].modules, bundle.backend.module]))
