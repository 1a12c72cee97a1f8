"""What a report speaks for: one engine set with one lock, and the weights that were read under it.

Plans hold no weight, so a fine-tune has the plans of its base. What was measured with other weights says nothing about it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..artifact import MANIFEST, sha256_file, sha256_json
from ..errors import ArtifactError, InputError
from ..export.contract.engine_set import ENGINES
from ..export.contract.lock import LOCK, WeightsLock
from ..export.locate import find_weights
from ..export.weight_digests import Hashed, refuse_others, verify_weights
from ..manifests import BundleManifest, read
from ..progress import Progress
from ..runtime.bundle import Bundle
from .baseline import checked_report, read_report

_COMPUTES = (".onnx", ".plan", ".cubin")
#: What a report can be about instead, by the fact that tells.
_DIFFERENCES = {
    "engine_set_sha256": "other engines or graphs", "weights_lock_sha256": "another weights lock",
    "weights_sha256": "other weights", "bundle_manifest_sha256": "a bundle with another manifest",
}  # fmt: skip


def engine_set_digest(manifest: BundleManifest) -> str:
    """Digest of what computes: engines with their table and kernels, or graphs. Weights and texts are not part of it."""
    files = {
        name: facts.sha256
        for name, facts in manifest.files.items()
        # The table of a chain of graphs says where weights lie; that of engines does not.
        if name.endswith(_COMPUTES) or name == ENGINES
    }
    return sha256_json([manifest.backend, files])


def binding(folder: Path, manifest: BundleManifest) -> dict[str, str]:
    """Digests of the manifest of a bundle, of its engine set and of its lock."""
    return {
        "bundle_manifest_sha256": sha256_file(folder / MANIFEST),
        "engine_set_sha256": engine_set_digest(manifest),
        "weights_lock_sha256": manifest.files[LOCK].sha256,
    }


def weights_digest(bundle: Bundle, progress: Progress) -> str:
    """Digest of the bytes of all weight files that the bundle reads: the lock may know only their headers.

    Raises:
        InputError: weights are missing, or are others than the lock or the Hugging Face cache says.
    """
    lock = WeightsLock.read(bundle.folder / LOCK)
    paths = find_weights(bundle.folder, lock, bundle.manifest.inputs.checkpoint, wanted=_taken(lock))
    known = WeightsLock({name: lock.files[name] for name in paths}, {}, lock.source)
    rows = verify_weights(known, paths, progress=progress)
    refuse_others(rows)
    return _digest(lock, rows)


def _taken(lock: WeightsLock) -> set[str]:
    """The files that hold a weight of the model."""
    return {part.file for roles in lock.weights.values() for weight in roles.values() for part in weight.parts}


def _digest(lock: WeightsLock, rows: Iterable[Hashed]) -> str:
    taken = _taken(lock)
    return sha256_json({row.name: row.sha256 for row in rows if row.name in taken})


def not_validated(bundle: Path, manifest: BundleManifest) -> list[dict[str, str]]:
    """Bundles beside this one that one could take for it, and why the report does not speak for them.

    They were built from the same graph, or have the same engines.
    """
    own, found = engine_set_digest(manifest), []
    for folder in sorted(bundle.resolve().parent.iterdir()):
        if folder == bundle.resolve() or not (folder / MANIFEST).is_file():
            continue
        try:
            other = read(BundleManifest, folder)
        except ArtifactError:
            continue  # not a bundle, or not a usable one
        same_engines = engine_set_digest(other) == own
        if other.inputs.graph == manifest.inputs.graph or same_engines:
            row = {"target": other.target.name, "folder": folder.name, "why": _why(manifest, other, same_engines)}
            found.append(row)
    return found


def _why(own: BundleManifest, other: BundleManifest, same_engines: bool) -> str:
    reasons = [] if same_engines else ["other engines" if other.engine.file == ENGINES else "other graphs"]
    if own.files[LOCK].sha256 != other.files[LOCK].sha256:
        reasons.append("other weights")
    return " and ".join(reasons) or "another copy"


def check_report(
    report: Path,
    folder: Path,
    manifest: BundleManifest,
    lock: WeightsLock,
    rows: Iterable[Hashed],
    *,
    content: Mapping[str, Any] | None = None,
) -> str:
    """Check that a report speaks for a bundle and its weights; returns the report's headline.

    Args:
        report: its folder or report.json.
        folder: the bundle.
        manifest: its manifest.
        lock: its lock.
        rows: its weight files, hashed.
        content: of the report, where it must not be read again: files that a signature vouches for can change after they were verified.

    Raises:
        InputError: it is no report, nothing was executed for it, or it is about another bundle or other weights.
    """
    content = read_report(report) if content is None else checked_report(content, report)
    then, now = content["provenance"], binding(folder, manifest) | {"weights_sha256": _digest(lock, rows)}
    differences = [text for name, text in _DIFFERENCES.items() if then[name] != now[name]]
    if differences or content["not_executed"]:
        reason = f"it is about {', '.join(differences)}" if differences else content["headline"]
        raise InputError(
            f"{report} does not speak for {folder}: {reason}. This bundle with these weights was not validated by it: run "
            "`foldkv validate`."
        )
    return str(content["headline"])
