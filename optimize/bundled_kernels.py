"""The kernels that an injected graph launches, compiled into a bundle: ``kernels/<name>.cubin`` and the manifest's entries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..artifact import sha256_json
from ..manifests import KernelFile, Kernels, PluginUse
from ..plugins.compile import compile_kernels, compiler_identity
from ..plugins.declarations import NAMESPACE
from ..plugins.inject import Injection
from ..progress import Say, silent

KERNELS = "kernels"


@dataclass(frozen=True)
class Bundled:
    """What a bundle's manifest says about its plugins and kernels, and the number of nodes that need them."""

    plugins: tuple[PluginUse, ...] = ()
    kernels: Kernels | None = None
    nodes: int = 0

    @property
    def names(self) -> set[str]:
        """Names of the kernels."""
        return {file.name for file in self.kernels.files} if self.kernels else set()


def bundle_kernels(injection: Injection, work: Path, *, progress: Say = silent) -> Bundled:
    """Compile every kernel that the injected nodes can launch and write the cubins below ``work``.

    The library's name is a hash over the cubins, so two bundles with equal kernels share one library in a process.

    Raises:
        BuildError: a kernel does not compile or cannot run on the target.
        MissingDependencyError: Triton is not installed.
    """
    kernels = list(dict.fromkeys(kernel for given in injection.given for kernel in given.kernels))
    progress(f"compiling {len(kernels)} kernels for sm{injection.sm}")
    compiled = compile_kernels([(kernel, injection.sm) for kernel in kernels], progress=progress)
    (work / KERNELS).mkdir()
    files = []
    for one in compiled:
        name = f"{KERNELS}/{one.kernel.name}.cubin"
        (work / name).write_bytes(one.cubin)
        files.append(KernelFile(file=name, **one.facts()))
    plugins = tuple(
        PluginUse(
            name=given.plugin.operator,
            namespace=NAMESPACE,
            version=given.plugin.version,
            nodes=next(row.injected for row in injection.rows if row.operator == given.plugin.operator),
            row_formats=given.row_formats,
            layout_version=given.plugin.layout_version,
            kernels=tuple(kernel.name for kernel in given.kernels),
        )
        for given in injection.given
    )
    library = sha256_json([[file.name, file.sha256] for file in files])[:16]
    found = Kernels(library, injection.sm, compiler_identity(), tuple(files))
    return Bundled(plugins, found, injection.injected)
