"""Traced segments on disk: a kind of layer is traced once per machine, geometry and version.

Tracing takes most of an export. What comes out depends on the geometry, on how weights are stored, on the code that traces
and on the versions of its libraries, and on nothing else: a fine-tune of a model has the same segments. So a segment is kept
under a digest of all of these, in ``segments/`` of ``FOLDKV_CACHE``, or of ``~/.cache/foldkv``.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..artifact import sha256_json
from ..inputs import cache_folder
from ..packages import version_of

_TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript")


def traced_once(facts: Any, trace: Callable[[], ir.Model]) -> ir.Model:
    """The graph that ``trace`` makes, from the cache if it was made before.

    A file that cannot be read is traced again; a cache that cannot be written is not used.

    Args:
        facts: everything that the graph depends on beside code and libraries, as JSON values.
        trace: makes it.
    """
    file = (
        cache_folder()
        / "segments"
        / f"{sha256_json([facts, _sources(), {tool: version_of(tool) for tool in _TOOLS}])}.onnx"
    )
    with contextlib.suppress(Exception):  # whatever is wrong with it, it can be made again
        return ir.load(file)
    model = trace()
    part = file.with_name(f"{file.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        ir.save(model, part)
        part.replace(file)
        return ir.load(file)  # what a later export gets
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        return model


@functools.cache
def _sources() -> str:
    """sha256 over the code of this folder: whatever of it changes, segments are traced again."""
    folder, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(
            f"{path.relative_to(folder).as_posix()}:{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode()
        )
    return digest.hexdigest()
