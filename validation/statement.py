"""The in-toto statement of a validated bundle: which files, and whether the gates held on them.

Its predicate is in-toto's test result, https://github.com/in-toto/attestation/blob/main/spec/predicates/test-result.md. A gate that is
not informative is a warning there, and the result is FAILED all the same, because such a gate does not pass.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from google.protobuf.json_format import MessageToDict
from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
from in_toto_attestation.v1.statement import Statement

from ..export.contract.evidence import (
    BOM,
    ENGINE_SET,
    FAILED,
    PASSED,
    PREDICATE_TYPE,
    REPORT,
    WEIGHTS,
    bundle_subjects,
)
from .gates import FAILS, HOLDS, NOT_INFORMATIVE

#: Subjects whose digest is computed from several files.
_COMPUTED = {ENGINE_SET: "engine_set_sha256", WEIGHTS: "weights_sha256"}


def statement(files: Mapping[str, str], report: Mapping[str, Any], *, report_sha256: str, bom_sha256: str) -> str:
    """The statement as JSON text.

    Args:
        files: sha256 of every file of the bundle, its manifest too.
        report: content of report.json.
        report_sha256, bom_sha256: of the bytes of the files beside the statement.
    """
    about = report["provenance"]
    named = {**bundle_subjects(files), REPORT: report_sha256}
    subjects = [ResourceDescriptor(name=name, digest={"sha256": digest}) for name, digest in named.items()]
    subjects += [
        ResourceDescriptor(name=name, digest={"sha256": about[key]}, annotations={"report": f"provenance.{key}"})
        for name, key in _COMPUTED.items()
    ]
    configuration = [
        ResourceDescriptor(name=BOM, digest={"sha256": bom_sha256}),
        ResourceDescriptor(name="checkpoint", digest={"sha256": about["checkpoint_sha256"]}),
        ResourceDescriptor(name=f"text: {about['text']}", digest={"sha256": about["text_sha256"]}),
    ]
    predicate = {
        "result": PASSED if report["passed"] else FAILED,
        "configuration": [MessageToDict(one.pb) for one in configuration],
        "passedTests": _gates(report, HOLDS),
        "warnedTests": _gates(report, NOT_INFORMATIVE),
        "failedTests": _gates(report, FAILS),
        "headline": report["headline"],
        "date": about["date"],
    }
    made = Statement([one.pb for one in subjects], PREDICATE_TYPE, predicate)
    made.validate()
    return json.dumps(MessageToDict(made.pb), indent=2, ensure_ascii=False) + "\n"


def _gates(report: Mapping[str, Any], verdict: str) -> list[str]:
    return [gate["name"] for gate in report["gates"] if gate["verdict"] == verdict]
