"""What an artifact is, in facts: a graph package, a bundle, a report or a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foldkv.artifact import MANIFEST, read_manifest, verify_files
from foldkv.errors import InputError

_SHOWN = (
    "foldkv_version", "profile", "precision", "backend", "target", "tool_versions", "inputs", "operators", "plugins", "engine",
    "build", "cache_key", "model", "weights", "layers", "passed",
)  # fmt: skip


def inspect_artifact(path: Path, *, allow_unknown_keys: Sequence[str] = ()) -> dict[str, Any]:
    """The facts of an artifact whose files were verified by hash, or of a checkpoint from its headers.

    Args:
        path: of the artifact, or of the checkpoint's folder.
        allow_unknown_keys: keys of a checkpoint's config.json to ignore that would be refused.

    Raises:
        InputError: neither an artifact nor a checkpoint.
        ArtifactError, CheckpointError: it is damaged.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        try:
            kind = str(json.loads((path / MANIFEST).read_text()).get("kind"))
        except (ValueError, AttributeError):
            kind = "foldkv"  # read_manifest then says what is wrong
        manifest = read_manifest(path, kind=kind)
        verify_files(path, manifest)
        facts: dict[str, Any] = {"kind": kind, "bytes": sum(f["bytes"] for f in manifest["files"].values())}
        facts |= {key: manifest[key] for key in _SHOWN if key in manifest}
        facts["files"] = {name: row["bytes"] for name, row in manifest["files"].items()}
        if "state" in manifest:
            facts["state_tensors"] = len(manifest["state"])
        return facts
    if (path / "config.json").is_file():
        from foldkv.export.checkpoint import Checkpoint, model_facts
        from foldkv.export.plan import parameter_count

        checkpoint = Checkpoint(path, allow_unknown_keys=allow_unknown_keys)
        checkpoint.check()
        return {
            "kind": "checkpoint",
            "bytes": sum(file.stat().st_size for file in checkpoint.files),
            "tensors": len(checkpoint.headers),
            "parameters": parameter_count(checkpoint.spec),
            "model": model_facts(checkpoint),
        }
    raise InputError(f"{path} is neither an artifact (no {MANIFEST}) nor a checkpoint (no config.json).")
