"""Load a bundle folder as a :class:`Bundle`: read the manifest, check it, hash the files.

A bundle that is damaged, incomplete, changed or of another version is refused before any of it is used.
:func:`require_backend` says what is missing for the backend that a bundle needs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..artifact import MANIFEST, confined, read_manifest, sha256_json, verify_files
from ..backends import BACKENDS, Backend
from ..errors import ArtifactError, MissingDependencyError, listing, system_failure
from ..export.contract.chain import CHAIN
from ..export.contract.chat import CHAT
from ..export.contract.engine_set import ENGINES
from ..inputs import OpenedFiles
from ..manifests import BundleManifest, GraphNames, ModelFacts, parse
from ..onnx_files import check_external_files
from ..packages import has_package, installed, package_of, pip_line, version_of
from ..plugins.cuda import device_capability, device_name
from .buffers import StateSpec
from .plugin_check import plugin_findings

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class StateMeaning:
    """What rows of the state mean. Rows can move between bundles that agree in it, whatever machines these are for.

    Attributes:
        weights: digest of the checkpoint: its config and headers, and who its files were when it was exported.
        profile: the numerics.
        foldkv: the version of foldkv that made the bundle.
        rows: the layout, the types of rows, and a digest of the whole table of the state.
    """

    weights: str
    profile: str
    foldkv: str
    rows: str


@dataclass(frozen=True)
class Bundle:
    """A checked bundle."""

    folder: Path
    manifest: BundleManifest
    digest: str  # sha256 of the manifest's content, and so of every file it names
    backend: Backend
    state: StateSpec
    in_place: tuple[str, ...]  # state tensors that the engine updates in the buffer that it reads
    engine: Path
    tokenizer: Path | None
    chat: Path | None  # which chat encoding it has
    opened: OpenedFiles = field(compare=False)

    @property
    def target(self) -> str:
        """Name of the machine that it is for."""
        return self.manifest.target.name

    @property
    def profile(self) -> str:
        """The numerics."""
        return self.manifest.profile

    @property
    def precision(self) -> str:
        """Of the matrices."""
        return self.manifest.precision

    @property
    def model(self) -> ModelFacts:
        """What a service must know about the model."""
        return self.manifest.model

    @property
    def io(self) -> GraphNames:
        """Names of the graph's inputs and of its logits."""
        return self.manifest.io

    @functools.cached_property
    def meaning(self) -> StateMeaning:
        """What the rows of its state mean."""
        made = self.manifest.inputs.checkpoint
        table = [[t.name, t.num_rows, t.ratio, t.width, t.dtype] for t in self.state.tensors]
        types = ", ".join(dict.fromkeys(tensor.dtype for tensor in self.state.tensors))
        return StateMeaning(
            weights=sha256_json([made.sha256, made.files])[:16],
            profile=self.profile,
            foldkv=self.manifest.foldkv_version,
            rows=f"{self.manifest.layout} ({types}; {sha256_json(table)[:16]})",
        )

    def largest(self, size: str) -> int | None:
        """The largest "batch", "chunk" or "context" that an engine was built for; None for a graph, which takes any."""
        return int(getattr(self.manifest.shapes, size)[2]) if self.backend.engine else None

    def smallest(self, size: str) -> int:
        """The smallest "batch", "chunk" or "context" that it takes."""
        return int(getattr(self.manifest.shapes, size)[0]) if self.backend.engine else 1


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
    table = read_manifest(folder, kind=BundleManifest.KIND)
    bundle = _checked(folder, table)
    if verify:
        verify_files(folder, table)
        for name in bundle.manifest.files:
            if name.endswith(".onnx"):  # a model names the files of its weights itself
                check_external_files(folder, bundle.manifest.files, name)
    return bundle


def require_backend(bundle: Bundle) -> None:
    """Check that this machine can execute the bundle.

    Raises:
        MissingDependencyError: it cannot; the message lists everything that is missing.
    """
    if missing := missing_here(bundle):
        title = f"the bundle {bundle.folder} for {bundle.target} needs the backend {bundle.backend.name}, which is not usable here"
        raise MissingDependencyError(
            listing(title, missing, "Use the bundle of the target 'cpu', which runs on ONNX Runtime.")
        )


def missing_here(bundle: Bundle) -> list[str]:
    """What this machine lacks to execute the bundle: packages, the driver, a GPU that it was built for."""
    backend = bundle.backend
    return missing_for(backend, bundle.manifest.target.sm or 0, bundle.manifest.tool_versions.get(backend.name, ""))


def missing_for(backend: Backend, sm: int, version: str = "") -> list[str]:
    """What this machine lacks to execute bundles of a backend.

    Args:
        backend: of the bundle.
        sm: compute capability that it is built for, 0 for none.
        version: of the library that built it, where it is built; engines need the same.
    """
    missing = list[str]()
    if backend.package and not has_package(backend.package):
        line = pip_line([backend.package])
        if here := version_of(backend.module):  # of the other package; they overwrite each other's files
            other = package_of(backend.module)
            line = f"{other} {here} is here instead: pip uninstall -y {other} && {line}"
        missing.append(f"the package {backend.package}: {line}")
    elif not installed(backend.module):
        # An engine is only read by the version that built it.
        line = f"pip install {backend.module}=={version}" if backend.engine and version else pip_line([backend.module])
        missing.append(f"the package {backend.module}: {line}")
    if backend.gpu:
        if not installed("cuda.bindings"):
            missing.append(f"the package cuda-bindings: {pip_line(['cuda.bindings'])}")
        capability = device_capability()
        kind = f" of compute capability {sm / 10:.1f}" if backend.one_gpu else ""
        if capability is None:
            missing.append(f"an NVIDIA GPU{kind} with its driver (libcuda.so.1); none was found")
        elif backend.one_gpu and capability != sm:
            name = f" ({found})" if (found := device_name()) else ""
            missing.append(f"a GPU{kind}; the one here has {capability / 10:.1f}{name}")
    return missing


def _checked(folder: Path, content: dict[str, Any]) -> Bundle:
    where = folder / MANIFEST
    manifest = parse(BundleManifest, content, where=where)
    findings, engine = plugin_findings(manifest), manifest.engine.file
    if engine not in manifest.files:
        findings.append(f"engine.file is {engine!r}, which is not among the files of the manifest")
    table = ENGINES if BACKENDS[manifest.backend].engine else CHAIN
    if engine != table:
        findings.append(
            f"engine.file is {engine!r}; expected {table!r}. Bundles of older versions have one whole graph or engine"
        )
    state = None if findings else StateSpec.from_manifest(list(manifest.state), where=str(where))
    if state is not None:
        known = {tensor.name for tensor in state.tensors}
        findings += [
            f"in_place names {name!r}, which is not a state tensor" for name in manifest.in_place if name not in known
        ]
    if findings or state is None:
        raise ArtifactError(listing(f"{where} does not describe a bundle", findings, manifest.AGAIN))
    return Bundle(
        folder=folder,
        manifest=manifest,
        digest=sha256_json(content),
        backend=BACKENDS[manifest.backend],
        state=state,
        in_place=manifest.in_place,
        engine=confined(folder, engine),
        opened=_opened(folder, content["files"]),
        tokenizer=confined(folder, TOKENIZER) if TOKENIZER in manifest.files else None,
        chat=confined(folder, CHAT) if CHAT in manifest.files else None,
    )


def _opened(folder: Path, files: dict[str, Any]) -> OpenedFiles:
    try:
        return OpenedFiles([folder / MANIFEST, *(confined(folder, name) for name in files)])
    except OSError as error:
        raise system_failure(error, folder) from None
