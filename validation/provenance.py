"""What a report says about itself: what was compared with what, when, by which versions, on which text, and where."""

from __future__ import annotations

import datetime
import platform
from typing import Any

from .. import __version__
from ..export.checkpoint.reader import Checkpoint
from ..packages import version_of
from ..runtime.bundle import Bundle
from ..runtime.wide import AUTO
from .baseline import MEASURES
from .binding import binding
from .cases import Text
from .environment import environment
from .selection import OBSERVED, RECOMPUTED
from .settings import Plan
from .sides import Sides


def about(bundle: Bundle, checkpoint: Checkpoint, plan: Plan, text: Text, threads: int) -> dict[str, Any]:
    """What is known before anything is executed."""
    manifest, spec = bundle.manifest, checkpoint.spec
    ratios = spec.indexed_ratios.values()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "foldkv": __version__,
        "measures": MEASURES,
        "subject": f"{bundle.target} bundle",
        "reference": f"transformers {version_of('transformers')}, float32",
        "yardstick": "",
        "bundle": str(bundle.folder),
        **binding(bundle.folder, manifest),
        "weights_sha256": "",
        "checkpoint": str(checkpoint.folder),
        "checkpoint_sha256": manifest.inputs.checkpoint.sha256,
        "text": text.name,
        "text_sha256": text.sha256,
        "profile": manifest.profile,
        "layout": manifest.layout,
        "layers_against": "transformers",
        "choices": RECOMPUTED if bundle.backend.gpu else OBSERVED,
        "precision": manifest.precision,
        "window": manifest.model.sliding_window,
        "choice_from_tokens": (spec.index_topk + 1) * max(ratios) - 1 if ratios else 0,
        "target": manifest.target.name,
        "backend": f"{manifest.backend} {manifest.tool_versions.get(manifest.backend, '')}",
        "machine": f"{platform.system()} {platform.machine()}, not executed here",
        "threads": threads,
        "environment": environment(bundle),
        "plan": {name: list(v) if isinstance(v, tuple) else v for name, v in vars(plan).items()},
    }


def executed(sides: Sides) -> dict[str, Any]:
    """What is known when it was executed."""
    subject = sides.subject
    places = ", ".join(subject.model.devices()) or "the CPU"
    matrices = {} if subject.model.matrices == AUTO else {"matrices": subject.model.matrices}
    return matrices | {
        "subject": subject.name,
        "reference": sides.reference.name,
        "yardstick": "" if sides.yardstick is None else sides.yardstick.name,
        "layers_against": "transformers" if sides.oracle is None else sides.oracle.name,
        "state_bytes": subject.state_bytes,
        "state_context": subject.context,
        "machine": f"{platform.system()} {platform.machine()}, executed on {places}",
    }
