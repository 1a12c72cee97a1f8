"""The evidence folder of a bundle: its files, and what its in-toto statement names. ``foldkv evidence`` writes it, the runtime reads it.

The signature covers the other three files. The statement covers every file of the bundle by its sha256. So whoever trusts the key
knows which plans, lock and report it was given for. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping

#: CycloneDX ML-BOM, in-toto Statement, the validation report, and the signature in the form of model-signing (a Sigstore bundle).
BOM, STATEMENT, REPORT, SIGNATURE = "bom.cdx.json", "statement.intoto.json", "report.json", "model.sig"
#: What the signature covers.
SIGNED = (BOM, STATEMENT, REPORT)

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://in-toto.io/attestation/test-result/v0.1"
PASSED, FAILED = "PASSED", "FAILED"

#: Subjects that are files of the bundle are named with this before their path.
BUNDLE = "bundle/"
#: Subjects that are no single file; validation/binding.py computes their digests.
ENGINE_SET, WEIGHTS = "engine set", "weights"


def bundle_subjects(files: Mapping[str, str]) -> dict[str, str]:
    """The subjects that are files of a bundle, from the sha256 of its files by name, the manifest's too."""
    return {f"{BUNDLE}{name}": digest for name, digest in files.items()}
