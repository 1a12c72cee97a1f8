"""Evidence of a release: a BOM and a statement that hold by their own schemas, and a signature that any change breaks."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from command import run
from cryptography.hazmat.primitives.asymmetric import ec
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from google.protobuf.json_format import ParseDict
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as StatementMessage
from keys import write_keys

from foldkv.artifact import MANIFEST, sha256_file
from foldkv.cli import main
from foldkv.errors import EXIT_BAD_INPUT, EXIT_ENVIRONMENT, EXIT_OK, ArtifactError, InputError
from foldkv.export.contract.evidence import BOM, REPORT, SIGNATURE, SIGNED, STATEMENT
from foldkv.export.weight_digests import verify_weights
from foldkv.manifests import EvidenceManifest, read
from foldkv.runtime import Model, Session
from foldkv.runtime.bundle import load_bundle
from foldkv.runtime.signature import check_signature


def foldkv(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def words(result: Result) -> str:
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def signed(tiny_bundle: Path, tiny_report: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the evidence of the tiny bundle and the keys."""
    folder = tmp_path_factory.mktemp("signed")
    key, _ = write_keys(folder / "keys")
    made = foldkv(
        "evidence", tiny_bundle, tiny_report, "-o", folder / "evidence", "--key", key, "--license", "Apache-2.0"
    )
    assert made.exit_code == EXIT_OK, made.output
    assert "signed evidence: " in made.output and "all gates hold" in made.output
    return folder


@pytest.fixture
def copied(signed: Path, tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of evidence, public key and bundle to change."""
    shutil.copytree(signed / "evidence", tmp_path / "evidence")
    shutil.copyfile(signed / "keys" / "key.pub", tmp_path / "key.pub")
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    return tmp_path


def verify(folder: Path, *options: object) -> Result:
    return foldkv(
        "verify", folder / "bundle", "--signature", folder / "evidence", "--public-key", folder / "key.pub", *options
    )


def flip(path: Path, at: int | None = None) -> None:
    """Change one bit of one byte."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


def test_the_bom_holds_by_its_schema_and_says_what_the_report_says(signed: Path, tiny_report: Path) -> None:
    text = (signed / "evidence" / BOM).read_text(encoding="utf-8")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bom, report = json.loads(text), json.loads((tiny_report / "report.json").read_text())
    bundle, about = bom["metadata"]["component"], report["provenance"]
    card = bundle["modelCard"]
    assert bundle["type"] == "machine-learning-model" and bundle["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    figures = {row["slice"]: row for row in card["quantitativeAnalysis"]["performanceMetrics"]}
    for gate in report["gates"]:
        row = next(row for words, row in figures.items() if words.startswith(f"gate {gate['name']}: "))
        assert row["type"] == gate["metric"] and row.get("value", "None") == str(gate["value"])
        assert gate["verdict"] in row["slice"]
    for row in report["behaviour"]:
        assert row["group"] or figures[f"subject, {row['kind']}, {row['cases']} cases: {row['word']}"]["value"] == str(
            row["subject"]
        )
    said = card["considerations"]
    assert "in the place of the PyTorch checkpoint" in said["useCases"][0]
    assert any("to the bit" in line for line in said["technicalLimitations"])
    row = report["retrieval"][0]
    found = figures[f"subject, distance {row['distance']} bytes, {row['cases']} cases"]
    assert [float(found["confidenceInterval"][side]) for side in ("lowerBound", "upperBound")] == row[
        "subject_interval"
    ]
    parts = {part["name"]: part for part in bom["components"]}
    refs = {part["bom-ref"] for part in bom["components"]}
    assert [row["ref"] for row in card["modelParameters"]["datasets"]] == ["text"] and "text" in refs
    assert parts[about["text"]]["hashes"] == [{"alg": "SHA-256", "content": about["text_sha256"]}]
    assert {name: parts[name]["version"] for name in about["environment"]} == about["environment"]
    assert parts["numpy"]["licenses"] and parts["numpy"]["purl"].startswith("pkg:pypi/numpy@")
    weights = {file["name"]: file["hashes"][0]["content"] for file in parts["tiny-v4"]["components"]}
    assert weights == {"model.safetensors": sha256_file(Path(about["checkpoint"]) / "model.safetensors")}


def test_the_statement_is_in_totos_and_names_every_file(signed: Path, tiny_bundle: Path, tiny_report: Path) -> None:
    content = json.loads((signed / "evidence" / STATEMENT).read_text())
    Statement.copy_from_pb(ParseDict(content, StatementMessage())).validate()
    report = json.loads((tiny_report / "report.json").read_text())
    subjects = {row["name"]: row["digest"]["sha256"] for row in content["subject"]}
    files = {
        f"bundle/{path.relative_to(tiny_bundle).as_posix()}": sha256_file(path)
        for path in tiny_bundle.rglob("*") if path.is_file()
    }  # fmt: skip
    assert files.items() <= subjects.items() and "bundle/weights.lock.json" in files
    assert subjects.keys() - files.keys() == {REPORT, "engine set", "weights"}
    assert subjects[REPORT] == sha256_file(tiny_report / REPORT)
    assert subjects["engine set"] == report["provenance"]["engine_set_sha256"]
    predicate = content["predicate"]
    assert predicate["result"] == "PASSED" and predicate["failedTests"] == predicate["warnedTests"] == []
    assert predicate["passedTests"] == [gate["name"] for gate in report["gates"]]


def test_the_same_inputs_give_the_same_bytes(
    signed: Path, tiny_bundle: Path, tiny_report: Path, tmp_path: Path
) -> None:
    made = foldkv("evidence", tiny_bundle, tiny_report, "-o", tmp_path / "again", "--license", "Apache-2.0", "--json")
    assert made.exit_code == EXIT_OK and json.loads(made.stdout)["signed"] is False
    for name in SIGNED:
        assert (tmp_path / "again" / name).read_bytes() == (signed / "evidence" / name).read_bytes(), name
    assert read(EvidenceManifest, tmp_path / "again", verify=True).signed is False
    assert not (tmp_path / "again" / SIGNATURE).exists()


def test_a_verdict_that_is_not_passed_is_evidence_too(tiny_bundle: Path, tiny_report: Path, tmp_path: Path) -> None:
    report = json.loads((tiny_report / "report.json").read_text())
    report["passed"], report["headline"] = False, "1 of 9 gates fails"
    report["gates"][0]["verdict"], report["gates"][1]["verdict"] = "fails", "not informative"
    (tmp_path / "report.json").write_text(json.dumps(report))
    made = foldkv("evidence", tiny_bundle, tmp_path / "report.json", "-o", tmp_path / "evidence")
    assert made.exit_code == EXIT_OK and "1 of 9 gates fails" in made.output and "Give it with --license" in made.output
    predicate = json.loads((tmp_path / "evidence" / STATEMENT).read_text())["predicate"]
    assert predicate["result"] == "FAILED"
    assert predicate["failedTests"] == [report["gates"][0]["name"]]
    assert predicate["warnedTests"] == [report["gates"][1]["name"]]


def test_a_signature_holds_and_survives_a_move(copied: Path) -> None:
    (copied / "evidence" / "README.md").write_text("a file of my own\n")
    (copied / "evidence").rename(copied / "moved")
    (copied / "evidence").symlink_to(copied / "moved")
    done = verify(copied)
    assert done.exit_code == EXIT_OK, done.output
    assert "vouches for this bundle and these weights, signed with the key of" in words(done)
    assert "all gates hold" in done.output
    found = check_signature(load_bundle(copied / "bundle"), copied / "evidence", copied / "key.pub")
    assert found.passed and found.subjects["weights"] == found.report["provenance"]["weights_sha256"]


def test_what_is_compared_is_what_was_verified(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report that somebody puts there after the signature was verified is not read."""

    def then_another(*given: Any) -> Any:
        found = check_signature(*given)
        (copied / "evidence" / REPORT).write_text("{}")
        return found

    monkeypatch.setattr("foldkv.runtime.signature.check_signature", then_another)
    done = verify(copied)
    assert done.exit_code == EXIT_OK and "all gates hold" in done.output


#: A field that ONNX does not know, empty: the model stays one, with another sha256.
UNKNOWN_FIELD = b"\xfa\x07\x00"
CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "bom": (lambda w: flip(w / "evidence" / BOM), f"{BOM} was changed after the signature was made"),
    "statement": (lambda w: flip(w / "evidence" / STATEMENT), f"{STATEMENT} was changed after the signature was made"),
    "report": (lambda w: flip(w / "evidence" / REPORT), f"{REPORT} was changed after the signature was made"),
    "signature": (lambda w: flip(w / "evidence" / SIGNATURE), SIGNATURE),
    "signature's payload": (lambda w: change_payload(w / "evidence" / SIGNATURE), "does not hold"),
    "no signature": (lambda w: (w / "evidence" / SIGNATURE).unlink(), "has no signature: model.sig is missing"),
    "no statement": (lambda w: (w / "evidence" / STATEMENT).unlink(), f"is not whole: {STATEMENT} is missing"),
    "no evidence": (lambda w: shutil.rmtree(w / "evidence"), "is not whole"),
    "another key": (lambda w: other_key(w), "it was signed with another key than the one that belongs to"),
    "no key": (lambda w: (w / "key.pub").write_text("-----BEGIN PUBLIC KEY-----\n"), "no public key of an elliptic curve"),
    "another curve": (lambda w: other_key(w, ec.SECP256K1()), "no public key of an elliptic curve"),
    "lock, and its manifest": (lambda w: forge(w, "weights.lock.json", b" "), "weights.lock.json has sha256"),
    "segment, and its manifest": (lambda w: forge(w, "segments/csa-moe.onnx", UNKNOWN_FIELD), "segments/csa-moe.onnx has sha256"),
    "a file more": (lambda w: forge(w, "chain2.json", b"{}"), "chain2.json was not signed"),
    "bundle's manifest": (lambda w: respace(w / "bundle" / MANIFEST), "manifest.json has sha256"),
}  # fmt: skip


def other_key(world: Path, curve: ec.EllipticCurve | None = None) -> None:
    _, public = write_keys(world / "other", curve)
    shutil.copyfile(public, world / "key.pub")


def change_payload(path: Path) -> None:
    """Another file list under the old signature."""
    import base64

    content = json.loads(path.read_text())
    payload = base64.b64decode(content["dsseEnvelope"]["payload"]).replace(b"files", b"filez")
    content["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    path.write_text(json.dumps(content))


def forge(world: Path, name: str, more: bytes) -> None:
    """Change or add a file, and its row in the manifest, so that the bundle agrees with itself."""
    path = world / "bundle" / name
    path.write_bytes((path.read_bytes() if path.exists() else b"") + more)
    manifest = json.loads((world / "bundle" / MANIFEST).read_text())
    manifest["files"][name] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    (world / "bundle" / MANIFEST).write_text(json.dumps(manifest))


def respace(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text())))


@pytest.mark.parametrize("name", CHANGES)
def test_any_change_is_refused_by_name_before_anything_is_deserialised(
    name: str, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: object, **__: object) -> None:
        raise AssertionError("the segments were opened")

    change, message = CHANGES[name]
    change(copied)
    refused = verify(copied)
    assert refused.exit_code == EXIT_BAD_INPUT and message in words(refused), refused.output
    monkeypatch.setattr("foldkv.runtime.chain.ChainModel.__init__", opened)
    with pytest.raises((InputError, ArtifactError), match=re.escape(message)):
        Model(copied / "bundle", signature=copied / "evidence", public_key=copied / "key.pub")


def test_other_weights_under_the_same_lock_are_refused(copied: Path, tiny_checkpoint: Path) -> None:
    shutil.copytree(tiny_checkpoint, copied / "weights", copy_function=shutil.copyfile)
    flip(copied / "weights" / "model.safetensors", -1)
    refused = verify(copied, "--weights-from", copied / "weights")
    assert refused.exit_code == EXIT_BAD_INPUT and "it is about other weights" in words(refused)


def test_a_session_opens_what_was_signed(copied: Path) -> None:
    told = ("--signature", copied / "evidence", "--public-key", copied / "key.pub")
    done = foldkv("generate", copied / "bundle", "def", "-n", 2, *told)
    assert done.exit_code == EXIT_OK, done.output
    flip(copied / "evidence" / STATEMENT)
    assert foldkv("generate", copied / "bundle", "def", "-n", 2, *told).exit_code == EXIT_BAD_INPUT
    with pytest.raises(InputError, match="belong together"):
        Session(copied / "bundle", context=64, signature=copied / "evidence")
    assert foldkv("verify", copied / "bundle", *told[:2]).exit_code == EXIT_BAD_INPUT


def test_evidence_that_cannot_be_made_leaves_nothing(
    copied: Path, tiny_report: Path, tiny_graph: Path, tiny_checkpoint: Path
) -> None:
    out = copied / "new"

    def refused(message: str, bundle: Path, report: Path, *options: object) -> None:
        done = foldkv("evidence", bundle, report, "-o", out, *options)
        assert done.exit_code == EXIT_BAD_INPUT and message in words(done), done.output
        assert not out.exists()

    bundle = copied / "bundle"
    refused("is no private key of an elliptic curve", bundle, tiny_report, "--key", copied / "key.pub")
    refused("No such file", bundle, tiny_report, "--key", copied / "none.pem")
    refused("is a graph package", tiny_graph, tiny_report)
    refused("is not a report", bundle, tiny_checkpoint)
    refused("nothing was changed", bundle, tiny_report, "-o", bundle)
    forge(copied, "weights.lock.json", b" ")
    refused("it is about another weights lock, a bundle with another manifest", bundle, tiny_report)
    # An older evidence stays as it was.
    before = sha256_file(copied / "evidence" / SIGNATURE)
    assert foldkv("evidence", bundle, tiny_report, "-o", copied / "evidence").exit_code == EXIT_BAD_INPUT
    assert sha256_file(copied / "evidence" / SIGNATURE) == before and verify(copied).exit_code == EXIT_BAD_INPUT


def test_a_report_that_changes_while_weights_are_read_is_not_the_one_that_is_filed(
    tiny_bundle: Path, tiny_report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "report.json"
    shutil.copyfile(tiny_report / "report.json", report)

    def slowly(*given: Any, **named: Any) -> Any:
        report.write_text("{}")
        return verify_weights(*given, **named)

    monkeypatch.setattr("foldkv.validation.evidence.verify_weights", slowly)
    made = foldkv("evidence", tiny_bundle, report, "-o", tmp_path / "evidence")
    assert made.exit_code == EXIT_OK, made.output
    assert (tmp_path / "evidence" / REPORT).read_bytes() == (tiny_report / "report.json").read_bytes()


def test_evidence_that_is_made_again_without_a_key_has_no_old_signature(copied: Path, tiny_report: Path) -> None:
    assert foldkv("evidence", copied / "bundle", tiny_report, "-o", copied / "evidence").exit_code == EXIT_OK
    assert not (copied / "evidence" / SIGNATURE).exists()


def test_the_licence_is_what_the_model_card_states(copied: Path, tiny_report: Path, tiny_checkpoint: Path) -> None:
    shutil.copytree(tiny_checkpoint, copied / "weights", copy_function=shutil.copyfile)
    (copied / "weights" / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# A model\nlicense: other\n")
    done = foldkv(
        "evidence", copied / "bundle", tiny_report, "-o", copied / "new", "--weights-from", copied / "weights"
    )
    assert done.exit_code == EXIT_OK and "--license" not in done.output
    bom = json.loads((copied / "new" / BOM).read_text())
    assert bom["metadata"]["component"]["licenses"] == [{"license": {"id": "MIT"}}]


def test_without_a_signature_the_runtime_imports_nothing_for_one(copied: Path, tmp_path: Path) -> None:
    heavy: tuple[str, ...] = ("model_signing", "cryptography", "sigstore", "in_toto_attestation", "OpenSSL")
    told = ("--signature", copied / "evidence", "--public-key", copied / "key.pub", "--json")
    code, out, _ = run("generate", copied / "bundle", "x", "-n", 1, *told, hide=heavy)
    assert code == EXIT_ENVIRONMENT and "model-signing" in json.loads(out)["error"]["packages"]
    script = f"""
import sys
from foldkv.runtime.session import Session
with Session({str(copied / "bundle")!r}, context=64) as session:
    session.generate([[72]], max_new_tokens=1)
"""
    code, _, err = run(hide=heavy, code=script)
    assert code == EXIT_OK, err
