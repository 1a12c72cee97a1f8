"""What computes: the versions of Python and of the packages that measure, and the processor."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..backends import ONNX_RUNTIME
from ..packages import FEATURES, versions
from ..runtime.bundle import Bundle

#: Instruction sets that libraries choose kernels by, as Linux names them.
_VECTORS = re.compile(r"(?:s?sse|avx|amx|fma|f16c|asimd|sve|sme(?!p)|bf16|i8mm|fp(?!u))")


def environment(bundle: Bundle, *, executed: bool = True) -> dict[str, str]:
    """Versions by package, with Python's and foldkv's own. A package that is not installed is left out.

    Args:
        bundle: what is measured.
        executed: with the library that executes it, else only what references need.
    """
    return versions(dict.fromkeys([*FEATURES["validate"].modules, *([bundle.backend.module] if executed else [])]))


def computing() -> list[Any]:
    """What decides the last bits of what is computed here, for the keys of what is kept: versions, and instruction sets."""
    return [versions([*FEATURES["validate"].modules, ONNX_RUNTIME.module]), sorted(instructions())]


def instructions() -> frozenset[str]:
    """Instruction sets for vectors and matrices that this machine's processors have: kernels for others round otherwise in the last bits.
    Empty where the system does not say it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(word for word in found[1].split() if _VECTORS.match(word)) if found else frozenset()
