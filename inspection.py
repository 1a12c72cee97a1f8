"""Facts about a graph package, a bundle, a report or a checkpoint, and these facts as text."""

from __future__ import annotations

import importlib.util
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .artifact import MANIFEST, read_manifest, verify_files
from .errors import ArtifactError, InputError
from .export.contract.state import StateTensor
from .inputs import snapshot_hint
from .units import duration_text, size_text

_SHOWN = (
    "foldkv_version", "profile", "weights", "layout", "precision", "backend", "target", "shapes", "tool_versions", "inputs", "model",
    "operators", "layers", "injection", "engine", "plugins", "kernels", "precision_islands", "build", "cache_key", "passed",
)  # fmt: skip
#: Contexts (tokens) for which a bundle's state is counted, besides the largest of the model.
_CONTEXTS = (4096, 65536)


def inspect_artifact(path: Path, *, allow_unknown_keys: Sequence[str] = ()) -> dict[str, Any]:
    """The facts of an artifact, after checking the hashes of its files, or of a checkpoint, from its headers.

    Args:
        path: the folder of the artifact or checkpoint.
        allow_unknown_keys: keys of a checkpoint's config.json to ignore instead of refusing them.

    Raises:
        InputError: neither an artifact nor a checkpoint.
        ArtifactError, CheckpointError: it is damaged.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return _artifact_facts(path)
    if (path / "config.json").is_file():
        return _checkpoint_facts(path, allow_unknown_keys)
    raise InputError(
        f"{path} is neither an artifact (no {MANIFEST}) nor a checkpoint (no config.json).{snapshot_hint(path)}"
    )


def _artifact_facts(path: Path) -> dict[str, Any]:
    try:
        kind = str(json.loads((path / MANIFEST).read_text()).get("kind"))
    except (ValueError, AttributeError):
        kind = "foldkv"  # read_manifest then says what is wrong
    manifest = read_manifest(path, kind=kind)
    verify_files(path, manifest)
    files = {**manifest["files"], **manifest.get("linked", {})}
    facts: dict[str, Any] = {"kind": kind, "bytes": sum(row["bytes"] for row in manifest["files"].values())}
    if "linked" in manifest:
        facts["linked_bytes"] = sum(row["bytes"] for row in manifest["linked"].values())
    facts |= {key: manifest[key] for key in _SHOWN if key in manifest}
    if "state" in manifest:
        facts["state"] = _state_facts(manifest)
    if kind == "foldkv.report":
        facts |= _report_facts(path)
    if kind == "foldkv.graph" and importlib.util.find_spec("onnx"):
        facts["nodes"] = _node_counts(path)
    facts["files"] = {name: row["bytes"] for name, row in files.items()}
    return facts


def _node_counts(path: Path) -> dict[str, int]:
    """Nodes of the graph itself and of its functions; no weight is read."""
    import onnx

    model = onnx.load(path / "model.onnx", load_external_data=False)
    functions = {function.name: len(function.node) for function in model.functions}
    return {"graph": len(model.graph.node), "functions": len(functions), "in functions": sum(functions.values())}


def _state_facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The state tensors by group, and the bytes of one sequence by context."""
    tensors = [StateTensor(**row) for row in manifest["state"]]
    longest = manifest["model"]["max_position_embeddings"]
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

    checkpoint = Checkpoint(path, allow_unknown_keys=allow_unknown_keys)
    checkpoint.check()
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
        "model": model_facts(checkpoint),
    }  # fmt: skip


# The facts as text: one line per fact, tables for lists of rows, sizes in units.


_LONG = 120  # a list with more characters is written one item per line


def describe(facts: Mapping[str, Any]) -> str:
    """Facts as lines for people: nested facts are indented, rows of one shape become a table."""
    return "\n".join(_lines(facts, "", ""))


def _lines(facts: Mapping[str, Any], indent: str, parent: str) -> list[str]:
    lines: list[str] = []
    for name, value in facts.items():
        if isinstance(value, Mapping) and value:
            rows = _rows(value)
            lines.append(f"{indent}{name}:")
            lines += _table(rows, f"{indent}  ") if rows else _lines(value, f"{indent}  ", name)
        elif isinstance(value, Sequence) and value and all(isinstance(row, Mapping) for row in value):
            columns = list(dict.fromkeys(key for row in value for key in row))
            lines.append(f"{indent}{name}:")
            lines += _table(
                [columns, *([_text(key, row.get(key), "") for key in columns] for row in value)], f"{indent}  "
            )
        elif isinstance(value, Sequence) and not isinstance(value, str) and len(", ".join(map(str, value))) > _LONG:
            lines.append(f"{indent}{name}:")
            lines += [f"{indent}  {_text('', item, name)}" for item in value]
        else:
            lines.append(f"{indent}{name}: {_text(name, value, parent)}")
    return lines


def _rows(table: Mapping[str, Any]) -> list[list[str]]:
    """A mapping of rows of one shape, as a table; empty for anything else."""
    if not all(isinstance(row, Mapping) and row for row in table.values()):
        return []
    columns = list(next(iter(table.values())))
    if len(table) < 2 or any(list(row) != columns for row in table.values()):
        return []
    if any(isinstance(cell, Mapping) for row in table.values() for cell in row.values()):
        return []
    return [["", *columns], *([name, *(_text(key, row[key], "") for key in columns)] for name, row in table.items())]


def _table(rows: list[list[str]], indent: str) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        (indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]


def _text(name: str, value: Any, parent: str) -> str:
    """One fact: bytes and seconds in units, lists with commas, runs of equal values counted."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, int):
        if name == "bytes" or name.endswith("_bytes") or parent in ("files", "sequence_bytes"):
            return size_text(value)
        return f"{value:,}" if abs(value) > 9999 else str(value)
    if isinstance(value, float):
        if name == "seconds":
            return duration_text(value)
        return f"{value:.6g}" if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(key, item, name)}" for key, item in value.items()) or "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        runs: list[list[Any]] = []
        for item in value:
            if runs and runs[-1][0] == item:
                runs[-1][1] += 1
            else:
                runs.append([item, 1])
        long = len(value) > 4  # [1, 1, 256] is three sizes, not a run of two
        texts = [
            f"{count} x {_text('', item, name)}" if count > 1 and long else ", ".join([_text("", item, name)] * count)
            for item, count in runs
        ]
        return ", ".join(texts) or "none"
    return str(value)
