"""The graph package: an ONNX model, its weights beside it, and a manifest that describes the state."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

import foldkv
from foldkv.artifact import staged, write_manifest
from foldkv.errors import InputError
from foldkv.export.checkpoint import Checkpoint, decoder_from_checkpoint, model_facts
from foldkv.export.operators.registry import ONNX_OPSET
from foldkv.export.profiles import HF, check_profile
from foldkv.export.state import state_tensors
from foldkv.export.trace import INPUTS, LOGITS, onnx_from_decoder, operator_counts

KIND = "foldkv.graph"
MODEL, WEIGHTS, TOKENIZER, CONFIG = "model.onnx", "weights.bin", "tokenizer.json", "config.json"
# Tensors below this stay inside model.onnx, where a person who opens the graph can read them.
_INLINE_BYTES = 1024


def graph_spec(profile: str) -> dict[str, Any]:
    """Everything besides the checkpoint and the tool versions that changes an exported graph."""
    return {"profile": profile, "dtype": "float32", "opset": ONNX_OPSET, "inline_bytes": _INLINE_BYTES, "recipe": 3}


def tool_versions() -> dict[str, str]:
    """Versions of the tools that make a graph."""
    return {name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnx-ir", "onnxscript")}


def export_checkpoint(
    checkpoint: Path, out: Path, *, profile: str = HF, progress: Callable[[str], None] = lambda _: None
) -> Path:
    """Export a checkpoint folder to a graph package and return its path.

    Args:
        checkpoint: folder with config.json and safetensors in any of the three spellings.
        out: folder of the package; an older package there is replaced once the new one is whole.
        profile: which numerics: "hf" computes what transformers computes, "served" what deployed systems compute.
        progress: called with one line per step.

    Raises:
        CheckpointError: the checkpoint cannot be exported; every finding is listed.
        InputError: ``out`` cannot be written, lies in the checkpoint, the profile is unknown, or
            the model has no such profile.
    """
    source = Checkpoint(checkpoint)
    check_profile(profile, source.spec)
    if (
        Path(out).resolve().is_relative_to(Path(checkpoint).resolve())
        and Path(out).resolve() == Path(checkpoint).resolve()
    ):
        raise InputError(f"{out} is the checkpoint itself; give another output folder.")
    progress(f"reading {len(source.headers)} tensors from {source.folder}")
    decoder = decoder_from_checkpoint(source, profile)
    with staged(Path(out), kind=KIND) as folder:
        progress(f"tracing {source.spec.num_layers} layers")
        model = onnx_from_decoder(decoder)
        progress("writing the graph and its weights")
        ir.save(model, folder / MODEL, external_data=WEIGHTS, size_threshold_bytes=_INLINE_BYTES)
        onnx.checker.check_model(str(folder / MODEL), full_check=False)
        (folder / CONFIG).write_text(json.dumps(source.config, indent=2) + "\n")
        tokenizer = source.folder / TOKENIZER
        if tokenizer.is_file():
            (folder / TOKENIZER).write_bytes(tokenizer.read_bytes())
        write_manifest(
            folder,
            kind=KIND,
            content={
                "foldkv_version": foldkv.__version__,
                "tool_versions": tool_versions(),
                "profile": profile,
                "inputs": {"checkpoint": {"path": str(source.folder), "sha256": source.digest()}},
                "spec": graph_spec(profile),
                "model": model_facts(source.spec),
                "io": {name: name for name in (*INPUTS, LOGITS)},
                "state": [tensor.to_dict() for tensor in state_tensors(source.spec)],
                "operators": operator_counts(model),
            },
        )
    return Path(out)
