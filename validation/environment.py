"""What computes: the versions of Python and of the packages that measure."""

from __future__ import annotations

import platform

from .. import __version__
from ..packages import FEATURES, package_of, version_of
from ..runtime.bundle import Bundle


def environment(bundle: Bundle) -> dict[str, str]:
    """Versions by package, with Python's and foldkv's own. A package that is not installed is left out."""
    modules = dict.fromkeys([*FEATURES["validate"].modules, bundle.backend.module])
    found = {package_of(module): version_of(module) for module in modules}
    return {"python": platform.python_version(), "foldkv": __version__} | {name: v for name, v in found.items() if v}
