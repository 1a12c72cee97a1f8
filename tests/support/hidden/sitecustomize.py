"""Makes packages unfindable in a process and in its children: FOLDKV_HIDE names their modules, with commas.

Python imports this at its start where this folder is in PYTHONPATH. Neither modules nor metadata are found.
"""

from __future__ import annotations

import os
import re
import sys
from importlib.machinery import PathFinder
from typing import Any

HIDDEN = set(filter(None, os.environ.get("FOLDKV_HIDE", "").split(",")))


def _name(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text).lower()


class Without(PathFinder):
    """Finds what PathFinder finds, without what is hidden."""

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> Any:
        return None if fullname.split(".")[0] in HIDDEN else PathFinder.find_spec(fullname, path, target)

    @classmethod
    def find_distributions(cls, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        hidden = {_name("cuda-bindings" if name == "cuda" else name) for name in HIDDEN}
        found = PathFinder.find_distributions(*args, **kwargs)
        return [one for one in found if _name(one.metadata["Name"]) not in hidden]


if HIDDEN:
    sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
