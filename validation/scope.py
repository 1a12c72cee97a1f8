"""What a report is for and what it does not say: for the page itself, and for the model card of the ML-BOM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..backends import ONNX_RUNTIME

_USE = "To decide whether this bundle may answer in the place of the PyTorch checkpoint. It compares the two; how good the model is, it does not say."
_CONTROLS = (
    "Faults that deployed engines have had are planted by foldkv's tests (tests/validation/test_controls.py), and each must be caught by the gate that is "
    "meant for it. They were planted in small models."
)


def scope(provenance: Mapping[str, Any]) -> dict[str, list[str]]:
    """Paragraphs by heading.

    Args:
        provenance: of the report.
    """
    return {
        "use": [_USE],
        "limits": _limits(provenance),
        "determinism": [_determinism(provenance)],
        "negative controls": [_CONTROLS],
    }


def _limits(provenance: Mapping[str, Any]) -> list[str]:
    plan = provenance["plan"]
    longest = max([plan["text_tokens"], *plan["contexts"]])
    return [
        f"It speaks for the target {provenance['target']} with these engines, this lock and these weights only.",
        f"Texts had {plan['text_tokens']:,} tokens, and no context was longer than {longest:,} beside the cases. Longer ones were not measured.",
        "Gates on exact answers say something only where the reference answers, too.",
    ]


def _determinism(provenance: Mapping[str, Any]) -> str:
    """Whether a second run gives the same figures."""
    same = f"texts and cases follow from the seed {provenance['plan']['seed']}, and answers are the likeliest tokens"
    if provenance["backend"].partition(" ")[0] == ONNX_RUNTIME.name:
        threads = provenance["threads"]
        count = f"{threads} thread{'s' if threads != 1 else ''}" if threads else "the same number of threads"
        count += f" and matrices in {provenance['matrices']}" if "matrices" in provenance else ""
        return (
            f"Nothing is drawn while it runs: {same}. The same packages on the same processor with {count} give the same figures to the bit. "
            "Others add in another order, which changes the last digits."
        )
    return (
        f"Nothing is drawn while it runs: {same}. Whether this backend repeats its figures to the bit was not measured; gates have room for the "
        "last digits."
    )
