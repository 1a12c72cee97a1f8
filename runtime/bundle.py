"""Load a bundle folder as a :class:`Bundle`: read the manifest, check it, hash the files.

A bundle that is damaged, incomplete, changed or of another version is refused before any of it is used.
:func:`require_backend` says what is missing for the backend that a bundle needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact import MANIFEST, confined, read_manifest, sha256_json, verify_files
from ..errors import ArtifactError, MissingDependencyError, listing
from ..packages import installed, pip_line
from ..plugins.cuda import device_capability
from .buffers import StateSpec
from .plugin_check import plugin_findings

KIND = "foldkv.bundle"
ONNXRUNTIME, TENSORRT_RTX, TENSORRT = "onnxruntime", "tensorrt-rtx", "tensorrt"
#: From an engine's backend to its module, which is also the name of its distribution.
ENGINE_MODULES = {TENSORRT_RTX: "tensorrt_rtx", TENSORRT: "tensorrt"}
BACKENDS = (ONNXRUNTIME, TENSORRT_RTX, TENSORRT)
PRECISIONS = ("float32", "bfloat16")
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class ModelFacts:
    """What the runtime must know about the model."""

    architecture: str
    vocab_size: int
    num_layers: int
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class GraphNames:
    """Names of the graph's inputs and of its logits output; state tensors have their own names."""

    input_ids: str  # [B, S] int64
    positions: str  # [B] int32
    num_tokens: str  # [B] int32
    active_context: str  # [1] int64
    logit_indices: str  # [B, L] int64
    logits: str  # [B, L, V] float32

    @property
    def inputs(self) -> tuple[str, ...]:
        """The inputs that are not state."""
        return (self.input_ids, self.positions, self.num_tokens, self.active_context, self.logit_indices)


@dataclass(frozen=True)
class Bundle:
    """A checked bundle."""

    folder: Path
    manifest: dict[str, Any]
    target: str
    backend: str
    profile: str
    precision: str
    model: ModelFacts
    io: GraphNames
    state: StateSpec
    in_place: tuple[str, ...]  # state tensors that the engine updates in the buffer that it reads
    engine: Path
    tokenizer: Path | None

    def largest(self, size: str) -> int | None:
        """The largest "batch", "chunk" or "context" that an engine was built for; None for a graph, which takes any."""
        shapes = self.manifest.get("shapes") if self.backend in ENGINE_MODULES else None
        return int(shapes[size][2]) if shapes else None

    @property
    def digest(self) -> str:
        """The sha256 of the manifest's content, and so of every file it names."""
        return sha256_json(self.manifest)


def load_bundle(folder: Path, *, verify: bool = True) -> Bundle:
    """Read and check a bundle.

    Args:
        folder: a folder written by ``foldkv build``.
        verify: compare every file's sha256 with the manifest. Turn it off only to read facts, not
            to use the files.

    Raises:
        ArtifactError: the bundle is damaged, incomplete, changed or of another version.
    """
    folder = Path(folder)
    manifest = read_manifest(folder, kind=KIND)
    bundle = _checked(folder, manifest)
    _refuse_unlisted(folder, manifest)
    if verify:
        verify_files(folder, manifest)
    return bundle


def require_backend(bundle: Bundle) -> None:
    """Check that this machine can execute the bundle.

    Raises:
        MissingDependencyError: it cannot; the message lists everything that is missing.
    """
    missing: list[str] = []
    if bundle.backend == ONNXRUNTIME:
        if not installed("onnxruntime"):
            missing.append(f"the package onnxruntime: {pip_line(['onnxruntime'])}")
    else:
        module = ENGINE_MODULES[bundle.backend]
        if not installed(module):
            missing.append(
                f"the package {module}: pip install {module}=={bundle.manifest['tool_versions'][bundle.backend]}"
            )
        if not installed("cuda.bindings"):
            missing.append(f"the package cuda-bindings: {pip_line(['cuda.bindings'])}")
        wanted, found = bundle.manifest["target"].get("sm"), device_capability()
        if found is None:
            missing.append("an NVIDIA GPU with its driver (libcuda.so.1)")
        elif found != wanted:
            missing.append(f"a GPU of compute capability {wanted / 10:.1f}; the one here has {found / 10:.1f}")
    if missing:
        title = f"the bundle {bundle.folder} for {bundle.target} needs the backend {bundle.backend}, which is not usable here"
        raise MissingDependencyError(
            listing(title, missing, "Use the bundle of the target 'cpu', which runs on ONNX Runtime.")
        )


def _refuse_unlisted(folder: Path, manifest: dict[str, Any]) -> None:
    # A graph names its weight file itself, so it must not be able to reach a file that has no hash.
    listed = {MANIFEST, *manifest["files"]}
    present = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    }
    extra = sorted(present - listed)
    if extra:
        raise ArtifactError(
            listing(f"{folder} contains files that its manifest does not list", [repr(name) for name in extra],
                    "Remove them, or make the bundle again.")
        )  # fmt: skip


class _Table:
    """One table of the manifest; collects what is wrong with it instead of stopping at the first."""

    def __init__(self, value: Any, path: str, findings: list[str]) -> None:
        self._path, self._findings = path, findings
        self._value: dict[str, Any] = value if isinstance(value, dict) else {}
        if not isinstance(value, dict):
            findings.append(f"{path or 'the manifest'} is {type(value).__name__}; expected a table")

    def _report(self, key: str, expected: str) -> None:
        name = f"{self._path}.{key}" if self._path else key
        found = f"is {self._value[key]!r}" if key in self._value else "is missing"
        self._findings.append(f"{name} {found}; expected {expected}")

    def table(self, key: str) -> _Table:
        return _Table(self._value.get(key), f"{self._path}.{key}" if self._path else key, self._findings)

    def text(self, key: str, among: tuple[str, ...] = ()) -> str:
        value = self._value.get(key)
        if not isinstance(value, str) or not value or (among and value not in among):
            self._report(key, f"one of {', '.join(among)}" if among else "a text")
            return ""
        return value

    def integer(self, key: str, least: int) -> int:
        value = self._value.get(key)
        if type(value) is not int or value < least:
            self._report(key, f"an integer of {least} or more")
            return least
        return value

    def names(self, key: str) -> tuple[str, ...]:
        value = self._value.get(key)
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            self._report(key, "a list of names")
            return ()
        return tuple(value)

    def token(self, key: str) -> int | None:
        return None if self._value.get(key) is None else self.integer(key, 0)

    def tokens(self, key: str) -> tuple[int, ...]:
        value = self._value.get(key)
        if not isinstance(value, list) or not all(type(token) is int and token >= 0 for token in value):
            self._report(key, "a list of token ids")
            return ()
        return tuple(value)


def _checked(folder: Path, manifest: dict[str, Any]) -> Bundle:
    where = str(folder / MANIFEST)
    findings: list[str] = []
    root = _Table(manifest, "", findings)
    model, io = root.table("model"), root.table("io")
    facts = ModelFacts(
        architecture=model.text("architecture"),
        vocab_size=model.integer("vocab_size", 1),
        num_layers=model.integer("num_layers", 1),
        max_position_embeddings=model.integer("max_position_embeddings", 1),
        bos_token_id=model.token("bos_token_id"),
        eos_token_ids=model.tokens("eos_token_ids"),
    )
    names = GraphNames(**{key: io.text(key) for key in GraphNames.__dataclass_fields__})
    target, backend = root.table("target").text("name"), root.text("backend", BACKENDS)
    profile, precision = root.text("profile"), root.text("precision", PRECISIONS)
    in_place = root.names("in_place")
    engine = root.table("engine").text("file")
    files = manifest["files"]
    if engine and engine not in files:
        findings.append(f"engine.file is {engine!r}, which is not among the files of the manifest")
    if "state" not in manifest:
        findings.append("state is missing; expected a list")
    if not findings:
        findings += plugin_findings(manifest)
    state = None if findings else StateSpec.from_manifest(manifest["state"], where=where)
    if state is not None:
        known = {tensor.name for tensor in state.tensors}
        findings += [f"in_place names {name!r}, which is not a state tensor" for name in in_place if name not in known]
    if findings or state is None:
        raise ArtifactError(listing(f"{where} does not describe a bundle", findings, "Make the bundle again."))
    return Bundle(
        folder=folder,
        manifest=manifest,
        target=target,
        backend=backend,
        profile=profile,
        precision=precision,
        model=facts,
        io=names,
        state=state,
        in_place=in_place,
        engine=confined(folder, engine),
        tokenizer=confined(folder, TOKENIZER) if TOKENIZER in files else None,
    )
