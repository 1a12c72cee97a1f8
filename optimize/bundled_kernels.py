"""The kernels that an injected graph launches, compiled into a bundle: ``kernels/<name>.cubin`` and the manifest's entries."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..artifact import sha256_json
from ..plugins.compile import compile_kernels, compiler_identity
from ..plugins.declarations import NAMESPACE
from ..plugins.inject import Injection
from ..progress import Say, silent

KERNELS = "kernels"


@dataclass(frozen=True)
class Bundled:
    """What a bundle's manifest says about its plugins and kernels, and the number of nodes that need them."""

    plugins: list[dict[str, Any]] = field(default_factory=list)
    kernels: dict[str, Any] | None = None
    nodes: int = 0

    @property
    def names(self) -> set[str]:
        """Names of the kernels."""
        return {row["name"] for row in self.kernels["files"]} if self.kernels else set()


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
        files.append({"file": name, **one.facts()})
    plugins = [
        {
            "name": given.plugin.operator, "namespace": NAMESPACE, "version": given.plugin.version,
            "nodes": next(row.injected for row in injection.rows if row.operator == given.plugin.operator),
            "rows": list(given.rows), "layout_version": given.plugin.layout_version,
            "kernels": [kernel.name for kernel in given.kernels],
        }
        for given in injection.given
    ]  # fmt: skip
    library = sha256_json([[row["name"], row["sha256"]] for row in files])[:16]
    table = {"library": library, "sm": injection.sm, "compiler": compiler_identity(), "files": files}
    return Bundled(plugins, table, injection.injected)
