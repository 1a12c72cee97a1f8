"""The manifests of graph packages, bundles, reports and evidence: what each key holds, and their only writer and reader.

A key is a field here and nowhere else; docs/artifacts.md explains them for people. :mod:`artifact` writes and checks the
files beside a manifest and the table of them. Standard library only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from . import __version__
from .artifact import MANIFEST, artifact_kind, read_manifest, verify_files, write_manifest
from .artifact import reason_to_replace as reason_without_artifact
from .backends import BACKENDS
from .errors import ArtifactError
from .records import Name, Natural, OrAbsent, Positive, from_json, one_of, to_json

PRECISIONS = ("float32", "bfloat16")
#: A row of ``state``: the fields of a state tensor, which the contract declares and the runtime checks.
StateRow = dict[str, Any]


@dataclass(frozen=True)
class File:
    """A file of the artifact."""

    sha256: str
    bytes: Natural


@dataclass(frozen=True)
class LinkedFile:
    """Someone else's file that the artifact links, too large to hash: its size, the sha256 of its first bytes, and which
    file it was when it was linked (inputs.py)."""

    head_sha256: str
    head_bytes: Natural
    bytes: Natural
    file: dict[str, Any]


@dataclass(frozen=True)
class ModelFacts:
    """What a service must know about the model."""

    architecture: Name
    vocab_size: Positive
    num_layers: Positive
    hidden_size: Positive
    layer_types: tuple[str, ...]
    sliding_window: Positive
    index_topk: Natural
    max_position_embeddings: Positive
    bos_token_id: Natural | None
    eos_token_ids: tuple[Natural, ...]


@dataclass(frozen=True)
class GraphNames:
    """Names of the graph's inputs and of its logits output; state tensors have their own names."""

    input_ids: Name  # [B, S] int64
    positions: Name  # [B] int32
    num_tokens: Name  # [B] int32
    active_context: Name  # [1] int64
    logit_indices: Name  # [B, L] int64
    logits: Name  # [B, L, V] float32

    @property
    def inputs(self) -> tuple[str, ...]:
        """The inputs that are not state."""
        return (self.input_ids, self.positions, self.num_tokens, self.active_context, self.logit_indices)


@dataclass(frozen=True)
class CheckpointFacts:
    """The checkpoint that a graph was made from.

    Attributes:
        path: its folder, when it was exported.
        texts: sha256 over the files of tokenizer and chat, and generation_config.json.
        allowed_unknown_keys: keys of config.json that were ignored.
        sha256: over everything, or over what ``of`` says.
        of: "headers" if no weights were read, else left out.
        files: sha256 over who the weight files were (inputs.py), where they were not read.
    """

    path: str
    texts: str
    allowed_unknown_keys: tuple[str, ...]
    sha256: str
    of: OrAbsent[str] = None
    files: OrAbsent[str] = None


@dataclass(frozen=True)
class GraphIdentity:
    """The graph package that something was made from."""

    manifest_sha256: str


@dataclass(frozen=True)
class GraphInputs:
    """What a graph was made from; an injected one also from another graph."""

    checkpoint: CheckpointFacts
    graph: OrAbsent[GraphIdentity] = None


@dataclass(frozen=True)
class OperatorCoverage:
    """One operator of the graph: its nodes, how many got a plugin, and why the others did not."""

    operator: str
    nodes: int
    injected: int
    refusals: dict[str, int]


@dataclass(frozen=True)
class InjectionFacts:
    """The target that a graph was injected for, and what got a plugin."""

    target: str
    sm: int
    dtype: str
    layout: str
    injected: int
    nodes: int
    operators: tuple[OperatorCoverage, ...]


@dataclass(frozen=True, kw_only=True)
class _Manifest:
    """What every artifact has. ``files`` and ``linked`` are filled in when it is written."""

    KIND: ClassVar[str]
    #: What to do with an artifact whose manifest is damaged.
    AGAIN: ClassVar[str]

    foldkv_version: str
    files: dict[str, File] = field(default_factory=dict)
    linked: OrAbsent[dict[str, LinkedFile]] = None

    @property
    def linked_files(self) -> Mapping[str, LinkedFile]:
        """``linked``, empty if there are none."""
        return self.linked or {}

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file, linked ones too."""
        return {name: file.bytes for table in (self.files, self.linked_files) for name, file in table.items()}

    def content(self) -> dict[str, Any]:
        """What it says, as JSON values, without the tables of files."""
        return {key: value for key, value in to_json(self).items() if key not in ("files", "linked")}


M = TypeVar("M", bound=_Manifest)


@dataclass(frozen=True)
class WeightFacts:
    """The weights that a lock names: their bytes, the number of their files, and bytes by safetensors' dtype."""

    bytes: Natural
    files: Natural
    stored: dict[str, int]


@dataclass(frozen=True)
class SegmentFacts:
    """One graph of a chain.

    Attributes:
        file: its name.
        arguments: inputs that other segments give.
        groups: state groups; its inputs are ``past.{group}``, its outputs ``present.{group}``.
        weights: inputs that are weights, by role.
        operators: nodes of each foldkv operator.
    """

    file: Name
    arguments: tuple[str, ...]
    groups: tuple[str, ...]
    weights: tuple[str, ...]
    operators: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class GraphManifest(_Manifest):
    """A graph package.

    Attributes:
        tool_versions: what made it.
        profile: the numerics.
        weights: how large they are, and how they are stored.
        inputs: what it was made from.
        spec: everything else that changes the graph (``export.package.graph_spec``).
        model: what a runtime must know.
        io: names in the graph.
        state: one row per cache tensor.
        operators: nodes of each foldkv operator.
        segments: the graphs, by name.
        layers: the segment of every layer.
        injection: left out if there was none.
    """

    KIND: ClassVar[str] = "foldkv.graph"
    AGAIN: ClassVar[str] = "Export the checkpoint again."

    tool_versions: dict[str, str]
    profile: Name
    weights: WeightFacts
    inputs: GraphInputs
    spec: dict[str, Any]
    model: ModelFacts
    io: GraphNames
    state: tuple[StateRow, ...]
    segments: dict[str, SegmentFacts]
    layers: tuple[str, ...]
    operators: dict[str, int]
    injection: OrAbsent[InjectionFacts] = None


@dataclass(frozen=True)
class TargetFacts:
    """A machine: compute capability, memory (GiB), bandwidth (GB/s), backends in order of preference."""

    name: Name
    backends: tuple[str, ...]
    precision: str
    sm: Positive | None = None
    memory_gib: Positive | None = None
    bandwidth_gb_s: Positive | None = None


@dataclass(frozen=True)
class ShapeRanges:
    """Sizes that an engine is built for, each (smallest, typical, largest)."""

    batch: tuple[Positive, Positive, Positive] = (1, 1, 4)
    chunk: tuple[Positive, Positive, Positive] = (1, 1, 256)
    context: tuple[Positive, Positive, Positive] = (256, 4096, 65536)


@dataclass(frozen=True)
class BundleInputs:
    """What a bundle was made from."""

    graph: GraphIdentity
    checkpoint: CheckpointFacts


@dataclass(frozen=True)
class BuildFacts:
    """What the bundle depends on and no other key of its manifest says."""

    graph_sha256: str
    weights_sha256: str
    plugins: bool
    kernel_compiler: str
    place: bool
    recipe: int


@dataclass(frozen=True)
class PluginUse:
    """A plugin that an engine calls: its nodes, the row formats they touch, the kernels they can launch."""

    name: str
    namespace: str
    version: str
    nodes: Natural
    row_formats: tuple[str, ...]
    layout_version: int
    kernels: tuple[str, ...]


@dataclass(frozen=True)
class KernelFile:
    """A compiled kernel: its file, what a launcher needs to know, and the resources that it takes."""

    file: str
    name: str
    sm: int
    sha256: str
    bytes: Natural
    entry: str
    shared: Natural
    registers: Natural
    stack: Natural
    spills: Natural
    tensor_memory: Natural
    threads: Positive


@dataclass(frozen=True)
class Kernels:
    """The kernels of a bundle. ``library`` is the name under which the engine's plugins find them."""

    library: Name
    sm: int
    compiler: str
    files: tuple[KernelFile, ...]


@dataclass(frozen=True)
class SegmentEngine:
    """A plan.

    Attributes:
        layers: of its network.
        plugins: how many of them are plugins, by operator.
        header: of the plan.
        capture: whether steps can be captured in CUDA graphs: all state is in place, and there is no loop.
        reused: whether it was in the cache of plans.
    """

    layers: Natural
    plugins: dict[str, Natural]
    header: dict[str, Any]
    capture: bool
    reused: bool


@dataclass(frozen=True)
class EngineFacts:
    """The table to load. Of graphs, the nodes of every segment before and after optimization; of engines, every plan, and the
    plugin layers of all calls together."""

    file: Name
    nodes: OrAbsent[dict[str, dict[str, int]]] = None
    segments: OrAbsent[dict[str, SegmentEngine]] = None
    plugin_layers: OrAbsent[Natural] = None


@dataclass(frozen=True)
class BuildCost:
    """What the build took, and what the builder warned of."""

    peak_rss_bytes: Natural
    warnings: OrAbsent[tuple[str, ...]] = None
    seconds: OrAbsent[float] = None


@dataclass(frozen=True, kw_only=True)
class FlatManifest(_Manifest):
    """A whole model as one ONNX file (``export --flat``); the attributes are those of :class:`GraphManifest`."""

    KIND: ClassVar[str] = "foldkv.flat"
    AGAIN: ClassVar[str] = "Export the checkpoint again."

    tool_versions: dict[str, str]
    profile: Name
    inputs: GraphInputs
    spec: dict[str, Any]
    model: ModelFacts
    io: GraphNames
    state: tuple[StateRow, ...]
    operators: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class BundleManifest(_Manifest):
    """A bundle.

    Attributes:
        tool_versions: of the backend, by its name.
        target: the machine that it is for.
        backend: name of the backend that runs it.
        profile: the numerics.
        precision: of the matrices.
        layout: of the cache rows.
        shapes: sizes that an engine is built for.
        inputs: what it was made from.
        cache_key: hash over everything that the bundle depends on.
        spec: what it depends on and no other key says.
        model: what a runtime must know.
        io: names in the graph.
        plugins: that the engine calls.
        in_place: state tensors that the plugins update in the buffer that they read.
        kernels: that the plugins launch; null without plugins.
        state: one row per cache tensor.
        engine: the file to load.
        precision_islands: of an engine, what stayed in float32.
        weights: of an engine, which formats were kept and what was widened.
        build: what the build took.
    """

    KIND: ClassVar[str] = "foldkv.bundle"
    AGAIN: ClassVar[str] = "Make the bundle again."

    tool_versions: dict[str, str]
    target: TargetFacts
    backend: Annotated[str, one_of(*BACKENDS)]
    profile: Name
    precision: Annotated[str, one_of(*PRECISIONS)]
    layout: Name
    shapes: ShapeRanges
    inputs: BundleInputs
    cache_key: str
    spec: BuildFacts
    model: ModelFacts
    io: GraphNames
    plugins: tuple[PluginUse, ...]
    in_place: tuple[str, ...]
    kernels: Kernels | None
    state: tuple[StateRow, ...]
    engine: EngineFacts
    precision_islands: OrAbsent[dict[str, Any]] = None
    weights: OrAbsent[dict[str, Any]] = None
    build: BuildCost


@dataclass(frozen=True, kw_only=True)
class ReportManifest(_Manifest):
    """A report.

    Attributes:
        passed: whether all gates hold.
        key: what the caller made it for.
        measured: digest of everything that the figures depend on.
        judged: digest of everything else that the verdicts depend on.
    """

    KIND: ClassVar[str] = "foldkv.report"
    AGAIN: ClassVar[str] = "Validate the bundle again."

    passed: bool
    key: str
    measured: str
    judged: str


@dataclass(frozen=True, kw_only=True)
class EvidenceManifest(_Manifest):
    """Evidence for a bundle (export/contract/evidence.py). The signature does not cover this manifest: it finds damage, not forgery.

    Attributes:
        passed: whether all gates of the report hold.
        signed: whether there is a signature.
        bundle_manifest_sha256: of the bundle's manifest.
    """

    KIND: ClassVar[str] = "foldkv.evidence"
    AGAIN: ClassVar[str] = "Make the evidence again with `foldkv evidence`."

    passed: bool
    signed: bool
    bundle_manifest_sha256: str


AnyManifest = GraphManifest | FlatManifest | BundleManifest | ReportManifest | EvidenceManifest
#: Every kind of artifact by name.
KINDS: dict[str, type[AnyManifest]] = {
    one.KIND: one for one in (GraphManifest, FlatManifest, BundleManifest, ReportManifest, EvidenceManifest)
}


def parse(manifest: type[M], table: Any, *, where: str | Path = MANIFEST) -> M:
    """A manifest from the JSON values of its file.

    Raises:
        ArtifactError: keys are missing, or have values of another type or out of range; the message lists all of them.
    """
    what = manifest.KIND.removeprefix("foldkv.")
    return from_json(manifest, table, title=f"{where} does not describe a {what}", step=manifest.AGAIN)


def read(manifest: type[M], folder: Path, *, verify: bool = False) -> M:
    """Read the manifest of an artifact and check that its files are there; ``verify`` also compares their hashes.

    Raises:
        ArtifactError: as :func:`parse`, or as ``artifact.read_manifest`` and ``verify_files``.
    """
    table = read_manifest(folder, kind=manifest.KIND)
    found = parse(manifest, table, where=Path(folder) / MANIFEST)
    if verify:
        verify_files(folder, table)
    return found


def read_any(folder: Path, *, verify: bool = False) -> AnyManifest:
    """As :func:`read`, for an artifact of any kind."""
    kind = artifact_kind(folder) or ""
    if kind not in KINDS:
        read_manifest(folder, kind="foldkv")  # says what is wrong
    return read(KINDS[kind], folder, verify=verify)


def write(folder: Path, manifest: M, *, known: dict[str, str] | None = None, heads: dict[str, int] | None = None) -> M:
    """Hash the files of ``folder`` and write its manifest; see ``artifact.write_manifest``. Returns it with its files."""
    table = write_manifest(folder, kind=manifest.KIND, content=manifest.content(), known=known, heads=heads)
    files = {name: File(**facts) for name, facts in table["files"].items()}
    linked = {name: LinkedFile(**facts) for name, facts in table.get("linked", {}).items()}
    return dataclasses.replace(manifest, files=files, linked=linked or None)


def reason_to_replace(manifest: type[M], folder: Path) -> tuple[str, M | None]:
    """Why a folder has no complete artifact of this version of foldkv, "" if it has one; and the manifest if it has one."""
    reason, table = reason_without_artifact(folder, kind=manifest.KIND)
    if table is None:
        return reason, None
    if (made := table.get("foldkv_version")) != __version__:
        return f"it was made by foldkv {made}; this is {__version__}", None
    try:
        return "", parse(manifest, table, where=Path(folder) / MANIFEST)
    except ArtifactError as error:
        return f"damaged: {str(error).removesuffix('.')}", None
