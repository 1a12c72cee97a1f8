"""The graph package: segments without weights, the table of layers, a weights lock, and what a runtime must know.

Exporting reads config.json and the headers of the weight files, and not one byte of a weight. Time and size depend on the
kinds of layers; docs/artifacts.md describes the files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from .. import __version__
from ..artifact import only_writer, read_manifest, staged
from ..errors import ArtifactError, InputError
from ..manifests import (
    CheckpointFacts,
    GraphInputs,
    GraphManifest,
    GraphNames,
    ModelFacts,
    SegmentFacts,
    WeightFacts,
    read,
    write,
)
from ..onnx_files import check_external_files
from ..packages import version_of
from ..progress import Progress, Say, silent
from .checkpoint.chat import chat_file
from .checkpoint.config_reader import spec_from_file
from .checkpoint.reader import Checkpoint, model_facts
from .checkpoint.texts import TOKENIZER, tokenizer_json
from .contract.chat import CHAT
from .contract.geometry import ModelSpec
from .contract.lock import LOCK, WeightsLock
from .contract.profiles import HF, check_profile
from .contract.state import StateTensor, state_tensors
from .locate import files_identity, find_weights
from .operators.registry import ONNX_OPSET
from .roles import Sources, inputs_of, lock_of, sources_of
from .segments import Chain, Segment, past, present, trace_chain
from .tensor_table import check_tensors
from .trace import INPUTS, LOGITS

KIND = GraphManifest.KIND
CONFIG, FOLDER = "config.json", "segments"
#: The whole graph of an injected package, with nodes given to plugins.
INJECTED = "injected.onnx"


def graph_spec(profile: str) -> dict[str, Any]:
    """Everything that changes a package, apart from the checkpoint and the tool versions."""
    return {"profile": profile, "opset": ONNX_OPSET, "recipe": 7}


def tool_versions() -> dict[str, str]:
    """Versions of the tools that make a package; without tools that are not installed."""
    tools = ("torch", "onnx", "onnx-ir", "onnxscript", "transformers")
    return {name: version for name in tools if (version := version_of(name))}


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    profile: str = HF,
    allow_unknown_keys: Sequence[str] = (),
    progress: Say = silent,
) -> Path:
    """Export a checkpoint folder to a graph package and return its path. No weight is read or copied.

    Args:
        checkpoint: folder with config.json and safetensors, in any of the spellings and formats that are read.
        out: folder of the package; an older package there is replaced once the new one is complete.
        profile: the numerics: "hf" computes what transformers computes, "served" what deployed systems compute.
        allow_unknown_keys: unknown keys of config.json to ignore instead of refusing them. The package records those that
            the file has.
        progress: called with one line per step; a :class:`~foldkv.progress.Progress` learns more.

    Raises:
        CheckpointError: the checkpoint cannot be exported; all findings are listed.
        InputError: ``out`` cannot be written or is the checkpoint, the profile is unknown, or the model does not have it.
    """
    source = Checkpoint(checkpoint, allow_unknown_keys=allow_unknown_keys)
    check_profile(profile, source.spec)
    if Path(out).resolve() == Path(checkpoint).resolve():
        raise InputError(f"{out} is the checkpoint itself; give another output folder.")
    report = Progress.of(progress)
    report(f"reading the headers of {len(source.headers)} tensors in {source.folder}")
    check_tensors(source)
    sources, facts, tokenizer = sources_of(source), model_facts(source), tokenizer_json(source.folder)
    texts, chat = source.texts_digest(), chat_file(source.folder, source.config)
    with only_writer(Path(out), report), staged(Path(out), kind=KIND) as folder:
        report(f"tracing the kinds of {source.spec.num_layers} layers")
        chain = trace_chain(source.spec, sources, profile, progress=report)
        (folder / FOLDER).mkdir()
        for name, segment in chain.segments.items():
            ir.save(segment.model, folder / FOLDER / f"{name}.onnx")
        size = sum(path.stat().st_size for path in (folder / FOLDER).iterdir())
        kinds = len(set(chain.layers))
        report(f"{len(chain.layers)} layers of {kinds} kinds; {size / 2**10:.0f} KiB of graphs")
        lock = lock_of(source, sources)
        lock.write(folder / LOCK)
        (folder / CONFIG).write_text(json.dumps(source.config, indent=2) + "\n")
        if tokenizer is not None:
            (folder / TOKENIZER).write_text(tokenizer, encoding="utf-8")
        if chat is not None:
            chat.write(folder / CHAT)
        source.check_unchanged()
        write(folder, _manifest(source, profile, chain, lock, sources, facts, texts))
    return Path(out)


def stored_as(sources: Sources) -> dict[str, int]:
    """Bytes of weights by the dtype in which the checkpoint stores them."""
    total: dict[str, int] = {}
    for roles in sources.values():
        for role, source in roles.items():
            for weight in inputs_of(role, source).values():
                total[weight.dtype] = total.get(weight.dtype, 0) + weight.bytes
    return dict(sorted(total.items()))


def _manifest(
    source: Checkpoint, profile: str, chain: Chain, lock: WeightsLock, sources: Sources, facts: ModelFacts, texts: str
) -> GraphManifest:
    checkpoint = CheckpointFacts(
        path=str(source.folder.absolute()),
        texts=texts,
        allowed_unknown_keys=tuple(source.allowed_keys),
        sha256=source.identity(),
        of="headers",
        files=files_identity({name: source.folder / name for name in lock.files}),
    )
    return GraphManifest(
        foldkv_version=__version__,
        tool_versions=tool_versions(),
        profile=profile,
        weights=WeightFacts(lock.bytes, len(lock.files), stored_as(sources)),
        inputs=GraphInputs(checkpoint),
        spec=graph_spec(profile),
        model=facts,
        io=GraphNames(**{name: name for name in (*INPUTS, LOGITS)}),
        segments={
            name: SegmentFacts(
                f"{FOLDER}/{name}.onnx", segment.arguments, segment.groups, segment.weights, segment.operators
            )
            for name, segment in chain.segments.items()
        },
        layers=chain.layers,
        operators=chain.operators,
        state=tuple(tensor.to_dict() for tensor in state_tensors(source.spec)),
    )


@dataclass(frozen=True)
class Package:
    """A graph package on disk. Its manifest was checked; its files are hashed by whoever uses them."""

    folder: Path
    manifest: GraphManifest
    lock: WeightsLock

    @property
    def spec(self) -> ModelSpec:
        """The geometry, from the package's config.json."""
        return spec_from_file(self.folder / CONFIG)

    def find_weights(self, given: Path | None = None) -> dict[str, Path]:
        """The path of every file of the lock; see :func:`foldkv.export.locate.find_weights`."""
        return find_weights(self.folder, self.lock, self.manifest.inputs.checkpoint, given)

    @property
    def layers(self) -> tuple[str, ...]:
        """The segment of every layer."""
        return self.manifest.layers

    @property
    def state(self) -> list[StateTensor]:
        """The state of the whole model, in graph order."""
        return [StateTensor(**row) for row in self.manifest.state]

    @property
    def checkpoint(self) -> Path:
        """Where the weights were when the package was made."""
        return Path(self.manifest.inputs.checkpoint.path)

    def segment(self, name: str) -> Segment:
        """Load a segment."""
        row = self.manifest.segments[name]
        model = ir.load(self.folder / row.file)
        return Segment(name, model, row.arguments, row.groups, row.weights)

    def calls(self) -> Iterator[tuple[str, str]]:
        """Owner of the weights and segment of every call that takes weights, in the order of execution."""
        yield "embed", "embed"
        for layer, name in enumerate(self.layers):
            yield f"layers.{layer}", name
        yield "head", "head"

    def own_state(self, segment: str) -> list[StateTensor]:
        """The state tensors of a kind of layer, with the names that its segment gives them."""
        rows = self.state_of(self.layers.index(segment)) if segment in self.layers else []
        return [StateTensor(**row.to_dict() | {"input": past(row.group), "output": present(row.group)}) for row in rows]

    def state_of(self, layer: int) -> list[StateTensor]:
        """The state tensors of one layer, in the order of its segment's inputs."""
        return [tensor for tensor in self.state if tensor.layer == layer]


def read_package(folder: Path, *, verify: bool = False) -> Package:
    """Read the manifest and the lock of a graph package, and check that they fit each other.

    Args:
        folder: of the package.
        verify: compare the sha256 of every file with the manifest.

    Raises:
        ArtifactError: it is not a package, is of the older form, or its table and its lock disagree; all findings are named.
    """
    folder = Path(folder)
    table = read_manifest(folder, kind=KIND)
    if "segments" not in table or LOCK not in table["files"]:
        raise ArtifactError(
            f"{folder} is a graph package of an older form, without segments. Export the checkpoint again: "
            f"`foldkv export CHECKPOINT -o {folder}`."
        )
    manifest = read(GraphManifest, folder, verify=verify)
    package = Package(folder, manifest, WeightsLock.read(folder / LOCK))
    _check(package)
    for row in manifest.segments.values():
        check_external_files(folder, manifest.files, row.file)
    return package


def _check(package: Package) -> None:
    """The table of layers names segments, and the lock has exactly the weights that each call takes."""
    segments = package.manifest.segments
    where = package.folder / "manifest.json"
    kinds = package.manifest.model.layer_types
    if len(package.layers) != len(kinds):
        raise ArtifactError(
            f"{where}: the table has {len(package.layers)} layers; the model has {len(kinds)}. Export it again."
        )
    for owner, name in package.calls():
        if name not in segments:
            raise ArtifactError(f"{where}: {owner} is of the segment {name!r}, which does not exist. Export it again.")
        wanted, found = set(segments[name].weights), set(package.lock.weights.get(owner, {}))
        if wanted != found:
            missing, extra = sorted(wanted - found), sorted(found - wanted)
            raise ArtifactError(
                f"{where}: {owner} is of the segment {name}, which takes other weights than the lock has for it: missing "
                f"{missing[:3]}, unexpected {extra[:3]}. Export the checkpoint again."
            )
        if owner.startswith("layers."):
            groups = [tensor.group for tensor in package.state_of(int(owner.removeprefix("layers.")))]
            if groups != list(segments[name].groups):
                raise ArtifactError(
                    f"{where}: {owner} has the state {groups}; the segment {name} takes {list(segments[name].groups)}. "
                    "Export the checkpoint again."
                )
