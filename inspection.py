"""Facts about a graph package, a bundle, a report or a checkpoint."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .artifact import MANIFEST, folder_hint
from .errors import ArtifactError, InputError
from .export.contract.engine_set import ENGINES, EngineTable
from .export.contract.state import StateTensor
from .inputs import snapshot_hint
from .manifests import BundleManifest, FlatManifest, GraphManifest, ReportManifest, read_any
from .records import to_json

_SHOWN = (
    "foldkv_version", "profile", "weights", "layout", "precision", "backend", "target", "shapes", "tool_versions", "inputs", "model",
    "operators", "injection", "engine", "plugins", "kernels", "precision_islands", "build", "cache_key", "passed",
)  # fmt: skip
#: Contexts (tokens) for which a bundle's state is counted, besides the largest of the model.
_CONTEXTS = (4096, 65536)


def inspect_artifact(path: Path, *, allow_unknown_keys: Sequence[str] = ()) -> dict[str, Any]:
    """The facts of an artifact, after checking the hashes of its files, or of a checkpoint, from its headers.

    Args:
        path: the folder of the artifact or checkpoint.
        allow_unknown_keys: keys of a checkpoint's config.json to ignore instead of refusing them.

    Raises:
        InputError: nothing there, or neither an artifact nor a checkpoint.
        ArtifactError, CheckpointError: it is damaged.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return _artifact_facts(path)
    if (path / "config.json").is_file():
        return _checkpoint_facts(path, allow_unknown_keys)
    if not path.exists():
        raise InputError(f"{path} does not exist; expected the folder of an artifact or a checkpoint. Check the path.")
    if path.is_file():
        raise InputError(
            f"{path} is a file; expected the folder of an artifact or a checkpoint. Give its folder; for a bare config.json there is "
            "`foldkv plan`."
        )
    hint = snapshot_hint(path) or folder_hint(path) or " Give the folder of one."
    raise InputError(f"{path} is neither an artifact (no {MANIFEST}) nor a checkpoint (no config.json).{hint}")


def _artifact_facts(path: Path) -> dict[str, Any]:
    manifest = read_any(path, verify=True)
    facts: dict[str, Any] = {"kind": manifest.KIND, "bytes": sum(file.bytes for file in manifest.files.values())}
    if manifest.linked is not None:
        facts["linked_bytes"] = sum(file.bytes for file in manifest.linked.values())
    content = manifest.content()
    facts |= {key: content[key] for key in _SHOWN if key in content}
    if isinstance(manifest, GraphManifest | FlatManifest | BundleManifest):
        facts["state"] = _state_facts(manifest)
    if isinstance(manifest, BundleManifest) and ENGINES in manifest.files:
        table = EngineTable.read(path / ENGINES)
        facts["engine"] = {key: value for key, value in content["engine"].items() if key != "segments"}
        facts["plans"] = _plan_facts(manifest, table)
        facts["taken"] = _taken_facts(table)
    if isinstance(manifest, ReportManifest):
        facts |= _report_facts(path)
    if isinstance(manifest, GraphManifest):
        facts["segments"] = _segment_facts(manifest)
    facts["files"] = manifest.sizes
    return facts


def _plan_facts(manifest: BundleManifest, table: EngineTable) -> dict[str, dict[str, Any]]:
    """Every plan: how often a step calls it, its layers, those that plugins compute, and whether steps can be captured."""
    calls = Counter(call.segment for call in table.calls)
    return {
        name: {
            "calls": calls[name] or 1,  # the table lists those that take weights
            "layers": plan.layers,
            "bytes": plan.header["bytes"],
            "capture": plan.capture,
            "reused": plan.reused,
            "plugins": {operator.removeprefix("Foldkv"): nodes for operator, nodes in plan.plugins.items()},
        }
        for name, plan in (manifest.engine.segments or {}).items()
    }


def _taken_facts(table: EngineTable) -> dict[str, dict[str, dict[str, Any]]]:
    """How the engines of each segment take their weights, by role."""
    return {
        name: {
            role: {"form": one.form, "dtype": one.dtype, "shape": list(one.shape), "bytes": one.bytes}
            for role, one in roles.items()
        }
        for name, roles in table.weights.items()
    }


def _segment_facts(manifest: GraphManifest) -> dict[str, dict[str, Any]]:
    """Every segment: size, how many layers it serves, and how many weights it takes as inputs."""
    layers = Counter(manifest.layers)
    return {
        name: {
            "bytes": manifest.files[row.file].bytes,
            "layers": layers[name],
            "weights": len(row.weights),
            "operators": row.operators,
        }
        for name, row in manifest.segments.items()
    }


def _state_facts(manifest: GraphManifest | FlatManifest | BundleManifest) -> dict[str, Any]:
    """The state tensors by group, and the bytes of one sequence by context."""
    tensors = [StateTensor(**row) for row in manifest.state]
    longest = manifest.model.max_position_embeddings
    contexts = sorted({*(context for context in _CONTEXTS if context < longest), longest})
    groups: dict[str, dict[str, Any]] = {}
    for tensor in tensors:
        group = groups.setdefault(tensor.group, {"tensors": 0, "dtype": tensor.dtype, "width": tensor.width})
        group["tensors"] += 1
    return {
        "tensors": len(tensors),
        "groups": groups,
        "sequence_bytes": {str(context): sum(t.bytes(context) for t in tensors) for context in contexts},
    }


def _report_facts(path: Path) -> dict[str, Any]:
    """Gates, figures and what was measured, from report.json."""
    name = "report.json"
    try:
        content = json.loads((path / name).read_text())
        return {
            **{
                key: content[key]
                for key in ("headline", "notes", "not_validated", "first_divergence")
                if key in content
            },
            # The reason for a gate's threshold is in the report itself.
            "gates": [{key: value for key, value in gate.items() if key != "reason"} for gate in content["gates"]],
            "metrics": dict(content["metrics"]),
            "measured": dict(content["provenance"]),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{path / name} is not a report that this version reads ({error}). Validate the bundle again."
        ) from None


def _checkpoint_facts(path: Path, allow_unknown_keys: Sequence[str]) -> dict[str, Any]:
    from .export.checkpoint.reader import Checkpoint, model_facts
    from .export.memory import parameter_count
    from .export.tensor_table import check_tensors

    checkpoint = Checkpoint(path, allow_unknown_keys=allow_unknown_keys)
    check_tensors(checkpoint)
    spec = checkpoint.spec
    stored: dict[str, dict[str, int]] = {}
    for header in checkpoint.headers.values():
        row = stored.setdefault(header.dtype, {"tensors": 0, "bytes": 0})
        row["tensors"] += 1
        row["bytes"] += header.bytes
    kinds = Counter(
        f"{kind}, ratio {ratio}" if ratio else kind for kind, ratio in zip(spec.layer_types, spec.ratios, strict=True)
    )
    return {
        "kind": "checkpoint",
        "bytes": sum(file.stat().st_size for file in checkpoint.files),
        "files": {file.name: file.stat().st_size for file in checkpoint.files},
        "tensors": len(checkpoint.headers),
        "parameters": parameter_count(spec),
        "geometry": {
            "layers": dict(kinds), "hidden_size": spec.hidden_size, "vocab_size": spec.vocab_size, "heads": spec.num_heads,
            "head_dim": spec.head_dim, "rope_dim": spec.rope_dim, "q_lora_rank": spec.q_lora_rank, "o_lora_rank": spec.o_lora_rank,
            "sliding_window": spec.sliding_window, "index_heads": spec.index_heads, "index_head_dim": spec.index_head_dim,
            "index_topk": spec.index_topk, "experts": spec.num_experts, "experts_per_token": spec.experts_per_token,
            "moe_intermediate_size": spec.moe_intermediate_size, "hash_layers": sum(spec.hash_layers), "hc_mult": spec.hc_mult,
            "max_position_embeddings": spec.max_position_embeddings,
        },
        "stored": stored,
        "model": to_json(model_facts(checkpoint)),
    }  # fmt: skip
