"""The CycloneDX ML-BOM of a validated bundle: model, weights, texts, packages, licences, and the figures of the gates in a model card.

It follows from its inputs: the serial number and the time are those of the report, so that the same evidence has the same bytes.
https://cyclonedx.org/docs/1.6/json/#metadata_component_modelCard
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType, Pedigree
from cyclonedx.model.license import License
from cyclonedx.model.tool import ToolRepository
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from .. import __version__
from ..export.contract.lock import WeightsLock
from ..export.weight_digests import Hashed
from ..manifests import BundleManifest
from .scope import scope

#: Of random numbers from names (RFC 9562, version 5).
_NAMESPACE = uuid.UUID("9b6d1a52-1f7c-5f0e-8d5c-2f0a4f6b7c11")


def ml_bom(
    manifest: BundleManifest, manifest_sha256: str, lock: WeightsLock, weights: Iterable[Hashed], report: Mapping[str, Any],
    *, name: str, licence: str | None,
) -> str:  # fmt: skip
    """The ML-BOM as JSON text.

    Args:
        manifest: of the bundle.
        manifest_sha256: of the manifest's bytes.
        lock: of the bundle; it may know the repository and the revision.
        weights: its files, hashed.
        report: content of report.json.
        name: of the model.
        licence: SPDX expression or name of the model's licence; None if nobody states it.
    """
    about, source = report["provenance"], lock.source
    licences = _licences(licence)
    files = [_file("weights", file.name, file.sha256) for file in weights]
    checkpoint = Component(
        name=source.get("repository") or name, version=source.get("revision") or about["checkpoint_sha256"],
        type=ComponentType.MACHINE_LEARNING_MODEL, bom_ref="checkpoint", licenses=licences, components=files,
        properties=_properties({"checkpoint_sha256": about["checkpoint_sha256"], "weights_sha256": about["weights_sha256"]}),
    )  # fmt: skip
    packages = [_package(package, version) for package, version in sorted(about["environment"].items())]
    text = Component(
        name=about["text"], type=ComponentType.DATA, bom_ref="text", hashes=[_hash(about["text_sha256"])],
        description="the text that was validated on",
    )  # fmt: skip
    bundle = Component(
        name=f"{name} for {manifest.target.name}", version=manifest_sha256, type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="bundle", licenses=licences, hashes=[_hash(manifest_sha256)],
        components=[_file("bundle", file, facts.sha256) for file, facts in manifest.files.items()],
        pedigree=Pedigree(ancestors=[_ancestor(checkpoint)], notes=f"built by foldkv {manifest.foldkv_version}"),
        properties=_properties(
            {key: about[key] for key in ("engine_set_sha256", "weights_lock_sha256", "target", "backend", "profile", "precision", "layout", "machine")}
        ),
    )  # fmt: skip
    bom = Bom(
        components=[checkpoint, text, *packages],
        serial_number=uuid.uuid5(_NAMESPACE, f"{manifest_sha256} {json.dumps(report, sort_keys=True)} {licence}"),
        metadata=BomMetaData(
            component=bundle, timestamp=datetime.datetime.fromisoformat(about["date"]), tools=ToolRepository(components=[Component(name="foldkv", version=__version__, type=ComponentType.APPLICATION, bom_ref="tool")])
        ),
    )  # fmt: skip
    bom.register_dependency(bundle, [checkpoint, *packages])
    content = json.loads(JsonV1Dot6(bom).output_as_string())
    # The library has no class for model cards; its validator knows them.
    content["metadata"]["component"]["modelCard"] = _card(manifest, report)
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _card(manifest: BundleManifest, report: Mapping[str, Any]) -> dict[str, Any]:
    about, said = report["provenance"], scope(report["provenance"])
    return {
        "modelParameters": {
            "task": "text-generation",
            "architectureFamily": "transformer",
            "modelArchitecture": manifest.model.architecture,
            "datasets": [{"ref": "text"}],
            "inputs": [{"format": "token ids"}],
            "outputs": [{"format": "logits"}],
        },
        "quantitativeAnalysis": {"performanceMetrics": [*_gates(report), *_retrieval(report), *_behaviour(report)]},
        "considerations": {
            "useCases": said["use"],
            "technicalLimitations": [*said["limits"], *report["notes"], *said["determinism"], *said["negative controls"]],
        },
        "properties": [
            {"name": f"foldkv:{key}", "value": str(value)}
            for key, value in (
                ("verdict", report["headline"]), ("reference", about["reference"]), ("yardstick", about["yardstick"]),
                ("command", about["command"]), ("plan", json.dumps(about["plan"])),
            )
            if value
        ],
    }  # fmt: skip


def _gates(report: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    for gate in report["gates"]:
        words = f"gate {gate['name']}: {gate['verdict']}; {gate['comparison']} {gate['threshold']}"
        changed = f", {gate['changed']} from {gate['default']}" if gate["changed"] else ""
        value = {} if gate["value"] is None else {"value": str(gate["value"])}
        yield {"type": gate["metric"], **value, "slice": words + changed}


def _retrieval(report: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    for row in report["retrieval"]:
        for side in ("reference", "subject"):
            low, high = row[f"{side}_interval"]
            yield {
                "type": "exact retrieval", "value": str(row[side]),
                "slice": f"{side}, distance {row['distance']} bytes, {row['cases']} cases",
                "confidenceInterval": {"lowerBound": str(low), "upperBound": str(high)},
            }  # fmt: skip


def _behaviour(report: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    for row in report["behaviour"]:
        if row["group"]:
            continue
        for side in ("reference", "subject"):
            low, high = row[f"{side}_interval"]
            yield {
                "type": "exact answers", "value": str(row[side]), "slice": f"{side}, {row['kind']}, {row['cases']} cases: {row['word']}",
                "confidenceInterval": {"lowerBound": str(low), "upperBound": str(high)},
            }  # fmt: skip


def _hash(sha256: str) -> HashType:
    return HashType(alg=HashAlgorithm.SHA_256, content=sha256)


def _file(where: str, name: str, sha256: str) -> Component:
    return Component(name=name, type=ComponentType.FILE, bom_ref=f"{where}/{name}", hashes=[_hash(sha256)])


def _ancestor(checkpoint: Component) -> Component:
    """A reference to the checkpoint, without its files again."""
    return Component(name=checkpoint.name, version=checkpoint.version, type=checkpoint.type, bom_ref="ancestor")


def _properties(values: Mapping[str, str]) -> list[Property]:
    return [Property(name=f"foldkv:{key}", value=value) for key, value in values.items()]


def _package(package: str, version: str) -> Component:
    if package == "python":
        return Component(name="python", version=version, type=ComponentType.PLATFORM, bom_ref="python")
    url = PackageURL("pypi", name=package, version=version)
    return Component(
        name=package, version=version, type=ComponentType.LIBRARY, purl=url, bom_ref=str(url),
        licenses=_licences(_stated(package, version)),
    )  # fmt: skip


def _stated(package: str, version: str) -> str | None:
    """The licence of a package, if that version is installed here and states it."""
    try:
        found = importlib.metadata.metadata(package).json
    except importlib.metadata.PackageNotFoundError:
        return None
    if found.get("version") != version:
        return None
    return str(found.get("license_expression") or found.get("license") or "").strip().partition("\n")[0] or None


def _licences(licence: str | None) -> list[License]:
    return [LicenseFactory().make_from_string(licence)] if licence else []
