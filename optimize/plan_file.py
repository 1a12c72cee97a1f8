"""The header of a TensorRT-RTX plan, read without a GPU and compared with what was asked for."""

from __future__ import annotations

import struct
from typing import Any

from ..errors import BuildError

_HEADER_BYTES = 64
_MAGIC = b"vtrt"
_CAPABILITIES = {1: 75, 2: 80, 4: 86, 8: 89, 16: 120, 32: 121}
_FORWARD = 64  # in a plan for which no compute capability was named


def read_plan_header(plan: bytes) -> dict[str, Any]:
    """Version, size in bytes and compute capabilities of a plan, and whether it also supports later ones (layout seen in
    TensorRT-RTX 1.7).

    Raises:
        BuildError: these bytes are not a plan.
    """
    if len(plan) < _HEADER_BYTES or plan[:4] != _MAGIC or plan[28:32] != _MAGIC:
        raise BuildError(
            f"{len(plan)} bytes that start with {plan[:4]!r} are not a TensorRT-RTX plan. Build the engine again."
        )
    (mask,) = struct.unpack_from("<I", plan, 32)
    return {
        "version": ".".join(str(byte) for byte in plan[24:28]),
        "bytes": struct.unpack_from("<Q", plan, 16)[0],
        "sm": [sm for bit, sm in _CAPABILITIES.items() if mask & bit],
        "forward_compatible": bool(mask & _FORWARD),
    }


def named_capability(sm: int) -> int | None:
    """The compute capability that a build for a GPU names, or None if TensorRT-RTX has no such target.

    A plan without a named one runs on those that the library knows and on later ones, but not between: TensorRT-RTX 1.7
    refuses it on 9.0 (benchmarks/results/gpu-h200.json) and names 8.0, 8.6, 8.9, 12.0, 12.1 and more than 12.0.
    """
    return sm if sm in _CAPABILITIES.values() else None


def check_plan(plan: bytes, *, sm: int | None) -> dict[str, Any]:
    """The header, if the plan is complete and only for that compute capability; with None, if the build named none.

    Raises:
        BuildError: the plan is cut off or was built for something else.
    """
    header = read_plan_header(plan)
    if header["bytes"] > len(plan):
        raise BuildError(
            f"the plan has {len(plan)} bytes, its header says {header['bytes']}: it is cut off. Build it again."
        )
    if sm is None and not header["forward_compatible"]:
        raise BuildError(
            f"the plan is for sm {header['sm']} only; expected a forward-compatible one. Report this as a fault of foldkv."
        )
    if sm is not None and (header["sm"] != [sm] or header["forward_compatible"]):
        raise BuildError(f"the plan is for sm {header['sm']}; expected {sm}. Report this as a fault of foldkv.")
    return header
