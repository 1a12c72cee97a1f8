"""Whether somebody whose key one trusts vouched for a bundle. Needs the extra ``evidence``, which nothing else of the runtime needs.

Nothing of the bundle is deserialised for it, and nothing is written but a private copy of the evidence, so that the files that were
verified are those that are read.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact import MANIFEST, scratch_folder, sha256_json
from ..errors import ArtifactError, InputError, listing, system_failure
from ..export.contract.evidence import (
    BUNDLE,
    PASSED,
    PREDICATE_TYPE,
    REPORT,
    SIGNATURE,
    SIGNED,
    STATEMENT,
    STATEMENT_TYPE,
    bundle_subjects,
)
from ..packages import require
from .bundle import Bundle

#: In packages.FEATURES.
VERIFY = "verify signatures"
_AGAIN = "Get the evidence again from who signed it, or make it with `foldkv evidence BUNDLE REPORT --key FILE`."


@dataclass(frozen=True)
class Signed:
    """What a signature vouches for.

    Attributes:
        subjects: sha256 by name, as the statement has them.
        passed: whether every gate of the report held.
        report: the content of report.json.
    """

    subjects: dict[str, str]
    passed: bool
    report: dict[str, Any]


def check_signature(bundle: Bundle, evidence: Path, public_key: Path) -> Signed:
    """Check that evidence was signed with a key, and that it is about a bundle: every file of it, by its sha256.

    The weights are not read: the lock, which is signed, says what they should be, and ``Model(verify=True)`` compares them.

    Args:
        bundle: loaded, so that its files are what its manifest says.
        evidence: the folder that ``foldkv evidence`` wrote.
        public_key: of an elliptic curve (P-256, P-384 or P-521), in PEM.

    Raises:
        InputError: the evidence lacks a file or the signature, was changed since, or was signed with another key; or the key cannot
            be used.
        ArtifactError: the bundle is another one than that which was signed; all files that differ are named.
        MissingDependencyError: the extra ``evidence`` is not installed.
    """
    signed = read_signed(evidence, public_key)
    raw = (bundle.folder / MANIFEST).read_bytes()
    if sha256_json(json.loads(raw)) != bundle.digest:
        raise ArtifactError(f"{bundle.folder / MANIFEST} was changed while it was verified. Open the bundle again.")
    files = {name: file.sha256 for name, file in bundle.manifest.files.items()}
    here = bundle_subjects({MANIFEST: hashlib.sha256(raw).hexdigest(), **files})
    there = {name: digest for name, digest in signed.subjects.items() if name.startswith(BUNDLE)}
    findings = [
        f"{name.removeprefix(BUNDLE)} {_difference(here.get(name), there.get(name))}"
        for name in dict.fromkeys([*here, *there])
        if here.get(name) != there.get(name)
    ]
    if findings:
        title = f"{bundle.folder} is not the bundle that {evidence} vouches for"
        raise ArtifactError(
            listing(title, findings, "Use the bundle that was signed, or have this one validated and signed.")
        )
    return signed


def _difference(here: str | None, there: str | None) -> str:
    if here is None:
        return "was signed and is missing"
    return "was not signed" if there is None else f"has sha256 {here[:12]}..., signed was {there[:12]}..."


def read_signed(evidence: Path, public_key: Path) -> Signed:
    """The content of an evidence folder, after verifying its signature; see :func:`check_signature`."""
    require(VERIFY)
    evidence = Path(evidence)
    verifier = _verifier(Path(public_key))
    with scratch_folder("signed") as copy:
        for file in (*SIGNED, SIGNATURE):
            _take(evidence, file, copy)
        try:
            verifier.verify(copy, copy / SIGNATURE)
        except Exception as error:  # noqa: BLE001 - whatever it is, the signature was not verified
            raise InputError(f"{evidence} is refused: {_reason(error, public_key)}. {_AGAIN}") from None
        statement = _read(evidence, copy, STATEMENT)
        report = _read(evidence, copy, REPORT)
    if (statement.get("_type"), statement.get("predicateType")) != (STATEMENT_TYPE, PREDICATE_TYPE):
        raise InputError(
            f"{evidence / STATEMENT} is of type {statement.get('predicateType')!r}; expected {PREDICATE_TYPE!r}. {_AGAIN}"
        )
    try:
        subjects = {row["name"]: row["digest"]["sha256"] for row in statement["subject"]}
        passed = statement["predicate"]["result"] == PASSED
    except (KeyError, TypeError) as error:
        raise InputError(f"{evidence / STATEMENT} is no statement of foldkv ({error!r}). {_AGAIN}") from None
    return Signed(subjects, passed, report)


def _verifier(public_key: Path) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm
    from model_signing import verifying

    try:
        return verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except OSError as error:
        raise system_failure(error, public_key) from None
    except (ValueError, TypeError, AttributeError, UnsupportedAlgorithm) as error:
        raise InputError(
            f"{public_key} is no public key of an elliptic curve in PEM ({str(error).splitlines()[0][:200]}). Give the key that belongs to "
            "the private one; `openssl ec -in KEY -pubout` writes it."
        ) from None


def _take(evidence: Path, file: str, copy: Path) -> None:
    try:
        shutil.copyfile(evidence / file, copy / file)
    except FileNotFoundError:
        what = "has no signature" if file == SIGNATURE and evidence.is_dir() else "is not whole"
        raise InputError(f"{evidence} {what}: {file} is missing. {_AGAIN}") from None
    except OSError as error:
        raise system_failure(error, evidence / file) from None


def _reason(error: Exception, public_key: Path) -> str:
    """Why model-signing refused, in a few words, with the names of files."""
    text = str(error).replace("\\'", "'")
    if names := re.findall(r"Hash mismatch for '([^']+)'", text):
        return f"{', '.join(names)} {'was' if len(names) == 1 else 'were'} changed after the signature was made"
    if type(error).__name__ == "InvalidSignature":
        return f"the signature in {SIGNATURE} does not hold"
    if "Key mismatch" in text:
        return f"it was signed with another key than the one that belongs to {public_key}"
    return f"{SIGNATURE} is not a signature of these files ({type(error).__name__}: {text.splitlines()[0][:200] if text else ''})"


def _read(evidence: Path, copy: Path, file: str) -> dict[str, Any]:
    try:
        content = json.loads((copy / file).read_bytes())
    except ValueError as error:
        raise InputError(f"{evidence / file} is not JSON ({error}). {_AGAIN}") from None
    if not isinstance(content, dict):
        raise InputError(f"{evidence / file} is {type(content).__name__}; expected a table. {_AGAIN}")
    return content
