"""What a release manager files beside a bundle: ML-BOM, in-toto statement and report in one folder, signed if there is a key."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..artifact import MANIFEST, sha256_file, staged
from ..errors import ArtifactError, InputError, system_failure
from ..export.contract.evidence import BOM, REPORT, SIGNATURE, STATEMENT
from ..export.contract.lock import WeightsLock
from ..export.locate import find_weights
from ..export.pack import read_locked
from ..export.weight_digests import refuse_others, verify_weights
from ..manifests import BundleManifest, EvidenceManifest, write
from ..packages import require
from ..progress import Say, silent
from .baseline import JSON, read_report
from .binding import check_report


@dataclass(frozen=True)
class Evidence:
    """What was written: the folder, the report's headline and verdict, whether it is signed, and the model's licence if anyone states it."""

    folder: Path
    headline: str
    passed: bool
    signed: bool
    licence: str | None


def write_evidence(
    bundle: Path, report: Path, out: Path, *, key: Path | None = None, licence: str | None = None,
    weights_from: Path | None = None, progress: Say = silent,
) -> Evidence:  # fmt: skip
    """Write the evidence of a bundle; an older one there is replaced. Every byte of the weights is read.

    Args:
        bundle: folder of one target.
        report: of this bundle with these weights; its verdict does not matter here, and is in the evidence.
        out: folder to write.
        key: private key of an elliptic curve (P-256, P-384 or P-521) in PEM, not encrypted; without one nothing is signed.
        licence: of the model, as SPDX writes it; the default is what the README.md beside the weights states.
        weights_from: where the weight files are; see :func:`foldkv.export.locate.find_weights`.
        progress: gets the bytes of the weights.

    Raises:
        InputError: the report is about another bundle or other weights, or nothing was executed for it; weights are missing or
            others; or the key cannot be used. Nothing was written.
        ArtifactError: the bundle is damaged, or is none.
        MissingDependencyError: the extra ``evidence`` is not installed.
    """
    require("evidence")
    from .bom import ml_bom
    from .statement import statement

    bundle, report = Path(bundle), Path(report)
    manifest, lock = read_locked(bundle)
    if not isinstance(manifest, BundleManifest):
        raise ArtifactError(f"{bundle} is a graph package; evidence is about a bundle. Build and validate one.")
    content = read_report(report)
    # Reading all weights takes minutes, in which another report may be put there: what is signed is what was read now.
    raw = (report / JSON if report.is_dir() else report).read_bytes()
    if json.loads(raw) != content:
        raise InputError(f"{report} was changed while it was read. Run it again.")
    signer = None if key is None else _signer(Path(key))
    paths = find_weights(bundle, lock, manifest.inputs.checkpoint, weights_from)
    rows = verify_weights(lock, paths, progress=progress)
    refuse_others(rows)
    headline = check_report(report, bundle, manifest, lock, rows, content=content)
    licence = licence or _stated_licence({path.parent for path in paths.values()})
    with staged(Path(out), kind=EvidenceManifest.KIND) as folder:
        (folder / REPORT).write_bytes(raw)
        digest = sha256_file(bundle / MANIFEST)
        bom = ml_bom(
            manifest, digest, lock, rows, content, name=_name(lock, manifest), licence=licence
        )  # fmt: skip
        (folder / BOM).write_text(bom, encoding="utf-8")
        files = {MANIFEST: digest} | {name: file.sha256 for name, file in manifest.files.items()}
        made = statement(
            files, content, report_sha256=sha256_file(folder / REPORT), bom_sha256=sha256_file(folder / BOM)
        )
        (folder / STATEMENT).write_text(made, encoding="utf-8")
        if signer is not None:
            signer.sign(folder, folder / SIGNATURE)
        write(
            folder,
            EvidenceManifest(
                foldkv_version=__version__, passed=content["passed"], signed=key is not None, bundle_manifest_sha256=digest
            ),
        )  # fmt: skip
    return Evidence(Path(out), headline, content["passed"], key is not None, licence)


def _signer(key: Path) -> Any:
    """What signs a folder with a key."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from model_signing import hashing, signing

    files = hashing.Config().set_ignored_paths(paths=[SIGNATURE, MANIFEST], ignore_git_paths=False)
    try:
        return signing.Config().set_hashing_config(files).use_elliptic_key_signer(private_key=key)
    except OSError as error:
        raise system_failure(error, key) from None
    except (ValueError, TypeError, AttributeError, UnsupportedAlgorithm) as error:
        # model-signing asks a key for its curve without a look at its kind.
        why = "it is of another kind" if isinstance(error, AttributeError) else str(error).splitlines()[0][:200]
        raise InputError(
            f"{key} is no private key of an elliptic curve in PEM without a password ({why}). Make one: "
            "`openssl ecparam -name prime256v1 -genkey -noout -out KEY`."
        ) from None


def _name(lock: WeightsLock, manifest: BundleManifest) -> str:
    """The model's name: its repository, or the folder that it was exported from."""
    return lock.source.get("repository") or Path(manifest.inputs.checkpoint.path).name


def _stated_licence(folders: Iterable[Path]) -> str | None:
    """The licence that the model card beside the weights states in its first lines, as on the Hugging Face Hub; or None."""
    for folder in folders:
        try:
            text = (folder / "README.md").read_text(encoding="utf-8")
        except (OSError, ValueError):
            continue
        head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        stated = (
            dict(re.findall(r"^(license|license_name):\s*[\"']?([^\s\"']+)", head[1], re.MULTILINE)) if head else {}
        )
        if found := stated.get("license_name") or stated.get("license"):
            return str(found)
    return None
