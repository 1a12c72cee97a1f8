"""Which operators of a model have a plugin, by row format, type of dense rows and compute capability, with reasons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import InputError
from ..export.contract.geometry import ModelSpec
from ..export.contract.layouts import LAYOUTS
from ..export.contract.operators import WEIGHT
from ..export.contract.profiles import PROFILES
from ..export.contract.rows import DENSE, row_format_named
from .declarations import PLUGINS
from .launch import kernels
from .model import EXPERT_FORMS, OperatorCall, operator_calls

#: Types of dense rows that engines keep.
DTYPES = ("bfloat16",)


@dataclass(frozen=True)
class CoverageRow:
    """One operator on one kind of rows: the state group, "weights" for products, or "experts"; the format, the type of dense rows
    ("" if packed), and per compute capability why there is no plugin ("" if there is one)."""

    operator: str
    group: str
    row_format: str
    dtype: str
    gaps: dict[int, str]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


def coverage(spec: ModelSpec, sms: Sequence[int], profiles: Sequence[str] = PROFILES) -> list[CoverageRow]:
    """The coverage of a model's operators for compute capabilities, by the same rules as injection.

    Args:
        spec: of the model.
        sms: compute capabilities.
        profiles: whose operators; the default is all of them.
    """
    rows: dict[tuple[str, str, str, str], CoverageRow] = {}
    calls: list[OperatorCall] = []
    for profile in profiles:
        calls += [call for call in operator_calls(spec, profile, EXPERT_FORMS) if call not in calls]
    for call in calls:
        formats = dict.fromkeys(layout.format_of(call.group) or DENSE for layout in LAYOUTS.values())
        if not PLUGINS[call.operator].row_formats:
            formats = {DENSE: None}
        for format_ in formats:
            dense = not row_format_named(format_).packed
            for dtype in DTYPES if dense and PLUGINS[call.operator].row_formats else ("",):
                gaps = {sm: _gap(call, spec, sm, dtype or DTYPES[0], format_) for sm in sms}
                key = (call.operator, "weights" if _is_product(call) else call.group, format_, dtype)
                if key in rows:  # another kind of layer has the same
                    gaps = {sm: rows[key].gaps[sm] or gap for sm, gap in gaps.items()}
                rows[key] = CoverageRow(*key, gaps)
    return list(rows.values())


def _is_product(call: OperatorCall) -> bool:
    return any(tensor.dtype == WEIGHT for tensor in PLUGINS[call.operator].inputs)


def _gap(call: OperatorCall, spec: ModelSpec, sm: int, dtype: str, format_: str) -> str:
    reasons = PLUGINS[call.operator].refusals(sm=sm, dtype=dtype, row_format=format_)
    if reasons:
        return "; ".join(reasons)
    sizes = dict(call.sizes)
    try:
        if row_format_named(format_).packed:
            sizes["ROW"] = row_format_named(format_).row_bytes(sizes["D"], spec.rope_dim)
        kernels(call.operator, sizes, call.attributes, sm=sm, dtype=dtype, row_format=format_, rope_dim=spec.rope_dim)
    except (ValueError, InputError) as error:
        return str(error)
    return ""
