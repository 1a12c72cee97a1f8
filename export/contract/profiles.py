"""Profiles: which of the two published computations a graph follows. Standard library only.

``hf`` is what transformers computes. ``served`` is what deployed systems compute (the released inference code). There,
window rows and entries are quantised to ``fp8_ds_mla`` values before they are written, the indexer's rows and queries are
rotated by a Hadamard matrix and quantised to FP4, and the compressor and its carries are float32.
"""

from __future__ import annotations

from ...errors import InputError, listing
from .geometry import CSA, ModelSpec
from .rows import FP8_DS_MLA, INDEX_FP4, row_format_named

HF, SERVED = "hf", "served"
PROFILES = (HF, SERVED)


def check_profile(profile: str, spec: ModelSpec) -> None:
    """Check that a profile is known and that the model's rows fit the formats that it needs.

    Raises:
        InputError: an unknown profile, or sizes that do not fit a packed row; all are listed.
    """
    if profile not in PROFILES:
        raise InputError(f"profile {profile!r} is not known; expected one of {', '.join(PROFILES)}.")
    if profile == HF:
        return
    findings = []
    try:
        row_format_named(FP8_DS_MLA).row_bytes(spec.head_dim, spec.rope_dim)
        if CSA in spec.layer_types:
            row_format_named(INDEX_FP4).row_bytes(spec.index_head_dim, spec.rope_dim)
    except InputError as error:
        findings.append(str(error))
    if CSA in spec.layer_types and spec.index_head_dim & (spec.index_head_dim - 1):
        findings.append(f"index_head_dim is {spec.index_head_dim}; a Hadamard matrix needs a power of two")
    if findings:
        raise InputError(listing("this model has no served profile", findings, "Export it with --profile hf."))
