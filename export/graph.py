"""The graph package: an ONNX model, its weights beside it, and a manifest that describes the state."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from .. import __version__
from ..artifact import beside, landing, only_writer, sha256_json, staged
from ..errors import InputError
from ..manifests import CheckpointFacts, GraphInputs, GraphManifest, GraphNames, read, write
from ..onnx_files import check_external_files
from ..packages import version_of
from ..progress import Progress, Say, silent
from .checkpoint.reader import Checkpoint, decoder_from_checkpoint, model_facts
from .checkpoint.texts import TOKENIZER, tokenizer_json
from .contract.profiles import HF, check_profile
from .contract.state import state_tensors
from .layers import PREFIX, flat, layer_counts, layered_model, operators_of
from .operators.registry import ONNX_OPSET
from .repack import repack
from .trace import INPUTS, LOGITS, onnx_from_decoder, operator_counts
from .weights import FOLDER, referenced, repacked

KIND = GraphManifest.KIND
MODEL, WEIGHTS, CONFIG = "model.onnx", "weights.bin", "config.json"
WEIGHT_MODES = ("float32", "reference", "repack")
# Smaller tensors stay inside model.onnx, where people who open the graph can read them.
_INLINE_BYTES = 1024


def graph_spec(profile: str) -> dict[str, Any]:
    """Everything that changes an exported graph, apart from the checkpoint and the tool versions."""
    return {"profile": profile, "dtype": "float32", "opset": ONNX_OPSET, "inline_bytes": _INLINE_BYTES, "recipe": 5}


def tool_versions() -> dict[str, str]:
    """Versions of the tools that make a graph; without tools that are not installed."""
    tools = ("torch", "onnx", "onnx-ir", "onnxscript", "transformers")
    return {name: version for name in tools if (version := version_of(name))}


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    profile: str = HF,
    weights: str = "float32",
    allow_unknown_keys: Sequence[str] = (),
    progress: Say = silent,
) -> Path:
    """Export a checkpoint folder to a graph package and return its path.

    Args:
        checkpoint: folder with config.json and safetensors in any of the three spellings.
        out: folder of the package; an older package there is replaced once the new one is complete.
        profile: the numerics: "hf" computes what transformers computes, "served" what deployed systems compute.
        weights: "float32" writes every weight in float32 and every operator as a node.
            "reference" and "repack" keep weights as stored and write one function per kind of layer.
            "reference" links the checkpoint's files into the package and copies nothing. "repack" copies the weights that
            the graph reads into the package, and continues after an interruption.
        allow_unknown_keys: unknown keys of config.json to ignore instead of refusing them. The package records those that
            the file has.
        progress: called with one line per step; a :class:`~foldkv.progress.Progress` learns more.

    Raises:
        CheckpointError: the checkpoint cannot be exported in this way; all findings are listed.
        InputError: ``out`` cannot be written or is the checkpoint, the profile or ``weights`` is unknown, or the model does
            not have the profile.
    """
    if weights not in WEIGHT_MODES:
        raise InputError(f"weights {weights!r} is not known; expected one of {', '.join(WEIGHT_MODES)}.")
    source = Checkpoint(checkpoint, allow_unknown_keys=allow_unknown_keys)
    check_profile(profile, source.spec)
    if Path(out).resolve() == Path(checkpoint).resolve():
        raise InputError(f"{out} is the checkpoint itself; give another output folder.")
    source.texts_digest()  # a file that cannot be read is found before the work
    report = Progress.of(progress)
    report(f"reading {len(source.headers)} tensors from {source.folder}")
    write = _write_float32 if weights == "float32" else _write_stored
    write(source, Path(out), profile, weights, report)
    return Path(out)


def _write_float32(source: Checkpoint, out: Path, profile: str, weights: str, progress: Progress) -> None:
    decoder = decoder_from_checkpoint(source, profile)
    with staged(out, kind=KIND) as folder:
        progress(f"tracing {source.spec.num_layers} layers")
        model = onnx_from_decoder(decoder)
        progress("writing the graph and its weights")
        ir.save(model, folder / MODEL, external_data=WEIGHTS, size_threshold_bytes=_INLINE_BYTES)
        onnx.checker.check_model(str(folder / MODEL), full_check=False)
        _copy_texts(source, folder)
        source.check_unchanged()
        write(folder, _manifest(source, profile, weights, operators=operator_counts(model)))


def _write_stored(source: Checkpoint, out: Path, profile: str, weights: str, progress: Progress) -> None:
    """Write a package whose weights stay as stored. They are only read to copy them."""
    source.check()
    placed, copies = (referenced(source), []) if weights == "reference" else repacked(source)
    work = beside(landing(out), ".foldkv-repack")
    # Continue with the copies of an earlier attempt, in one process at a time.
    with only_writer(out, progress), staged(out, kind=KIND) as folder:
        progress(f"tracing the kinds of {source.spec.num_layers} layers")
        model = layered_model(source.spec, placed, profile, progress=progress)
        ir.save(model, folder / MODEL)
        layers = layer_counts(model)
        manifest = _manifest(source, profile, weights, operators=operators_of(model), layers=layers, headers=True)
        del model
        size = (folder / MODEL).stat().st_size
        progress(f"graph: {size / 2**10:.0f} KiB, {sum(layers.values())} layers of {len(layers)} kinds")
        _copy_texts(source, folder)
        known: dict[str, str] = {}
        heads: dict[str, int] = {}
        if weights == "reference":
            heads = link_files(source, folder)
        else:
            made_of = sha256_json([source.identity(), source.files_identity()])
            known = repack(copies, work, identity=made_of, progress=progress)
            (work / FOLDER).rename(folder / FOLDER)
            shutil.rmtree(work)
        source.check_unchanged()
        write(folder, manifest, known=known, heads=heads)


def flat_model(graph: Path) -> onnx.ModelProto:
    """The graph of a package with every operator as a node. Its weights stay outside and are not read.

    Raises:
        ArtifactError: the package is damaged, or the graph names a weight file that its manifest does not list.
    """
    manifest = read(GraphManifest, graph)
    check_external_files(Path(graph), {*manifest.files, *manifest.linked_files}, MODEL)
    model = onnx.load(Path(graph) / MODEL, load_external_data=False)
    if any(function.name.startswith(PREFIX) for function in model.functions):
        model = ir.to_proto(flat(ir.from_proto(model)))
    return model


def link_files(source: Checkpoint, folder: Path) -> dict[str, int]:
    """Hard links to the checkpoint's files: no byte is copied, and a copy of the package is complete.

    ONNX Runtime accepts no location outside of a graph's folder, neither through ``..`` nor through a symbolic link. Returns
    the size of each file's header, which tells the file from others.

    Raises:
        InputError: the file system, or its rules, do not allow links.
    """
    heads: dict[str, int] = {}
    for shard in source.shards:
        name = f"{FOLDER}/{shard.file.relative_to(source.folder).as_posix()}"
        link_file(
            shard.file.resolve(), folder / name,
            advice="Choose an output folder on the checkpoint's file system, or export with --weights repack.",
        )  # fmt: skip
        heads[name] = shard.header_bytes
    return heads


def link_file(source: Path, link: Path, *, advice: str) -> None:
    """Make a hard link to a file, and the folders for it.

    Raises:
        InputError: the file system, or its rules, do not allow it; the message ends with ``advice``.
    """
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, link)
    except OSError as error:
        raise InputError(f"{source} cannot be linked to {link.parent}: {error.strerror}. {advice}") from None


def _copy_texts(source: Checkpoint, folder: Path) -> None:
    (folder / CONFIG).write_text(json.dumps(source.config, indent=2) + "\n", encoding="utf-8")
    if (tokenizer := tokenizer_json(source.folder)) is not None:
        (folder / TOKENIZER).write_text(tokenizer, encoding="utf-8")


def _manifest(
    source: Checkpoint, profile: str, weights: str, *, operators: dict[str, int], layers: dict[str, int] | None = None,
    headers: bool = False,
) -> GraphManifest:  # fmt: skip
    """The manifest; ``headers`` says that the checkpoint's weights were not read."""
    checkpoint = CheckpointFacts(
        path=str(source.folder),
        texts=source.texts_digest(),
        allowed_unknown_keys=tuple(source.allowed_keys),
        sha256=source.identity() if headers else source.digest(),
        of="headers" if headers else None,
        files=source.files_identity(links_change=weights == "reference") if headers else None,
    )
    return GraphManifest(
        foldkv_version=__version__,
        tool_versions=tool_versions(),
        profile=profile,
        weights=weights,
        inputs=GraphInputs(checkpoint),
        spec=graph_spec(profile),
        model=model_facts(source),
        io=GraphNames(**{name: name for name in (*INPUTS, LOGITS)}),
        state=tuple(tensor.to_dict() for tensor in state_tensors(source.spec)),
        operators=operators,
        layers=layers,
    )
