"""What this machine has of what foldkv can use."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

# (package, what needs it)
_PACKAGES = (
    ("onnxruntime", "generate, cpu bundles"),
    ("tokenizers", "generate"),
    ("torch", "export, validate"),
    ("transformers", "validate"),
    ("onnx", "export"),
    ("onnxscript", "export"),
    ("jinja2", "validate"),
    ("tensorrt-rtx", "engines for sm80, 86, 89, 120, 121"),
    ("tensorrt", "engines for sm90, 100, 103; builds on a GPU"),
    ("triton", "kernels of the plugins"),
    ("cuda-bindings", "running engines"),
)


def examine() -> dict[str, Any]:
    """Facts on Python, packages, processors, memory and GPUs; nothing is changed and no GPU is touched."""
    packages = []
    for name, purpose in _PACKAGES:
        try:
            found: str | None = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = None
        packages.append({"package": name, "version": found, "for": purpose})
    from foldkv.plugins.cuda import device_capability, device_count

    return {
        "python": platform.python_version(),
        "processors": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "cuda_devices": device_count(),
        "compute_capability": device_capability(),
        "packages": packages,
        "can": {
            "generate": _all(packages, "onnxruntime", "tokenizers"),
            "export": _all(packages, "torch", "onnx", "onnxscript"),
            "validate": _all(packages, "torch", "transformers", "jinja2", "onnxruntime"),
            "build cpu": _all(packages, "onnxruntime"),
            "build GPU engines": _all(packages, "tensorrt-rtx"),
            "build with plugins": _all(packages, "tensorrt-rtx", "triton"),
        },
    }


def _all(packages: list[dict[str, Any]], *names: str) -> bool:
    return all(row["version"] for row in packages if row["package"] in names)
