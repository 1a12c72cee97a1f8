"""Plans of engines, built by the workers of a Ray cluster.

A task carries a lowered graph, which holds no weight, and brings its plan back. So nodes need the same packages and no shared folder, and
whatever becomes of a worker, only this machine writes the cache and the bundle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact import scratch_folder
from ..backends import Backend, backend_named
from ..cluster import Cluster, refuse_others
from ..packages import versions
from ..progress import Say, silent
from .engine_build import Ranges, build_plan


@dataclass(frozen=True)
class _Order:
    """What a worker builds: the files of the graph by name, and the arguments of ``build_plan``."""

    files: Mapping[str, bytes]
    graph: str
    backend: str
    versions: Mapping[str, str]
    options: Mapping[str, Any]


class ClusterBuilder:
    """``build_plan`` on the workers of a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        """Give plans to this cluster."""
        self._cluster = cluster

    def __call__(
        self, graph: Path, plan: Path, *, sm: int | None, ranges: Sequence[Ranges], context: Sequence[int], backend: Backend,
        plugins: int, capture: bool, progress: Say = silent,
    ) -> dict[str, Any]:  # fmt: skip
        """As :func:`~foldkv.optimize.engine_build.build_plan`, of a graph whose folder has its files and nothing else.

        Raises:
            InputError: a worker has other packages.
            MissingDependencyError: the cluster lost the plan again and again, or a worker cannot run foldkv.
        """
        progress("building on a worker of the Ray cluster")
        order = _Order(
            {file.name: file.read_bytes() for file in graph.parent.iterdir()}, graph.name, backend.name, _versions(backend),
            {"sm": sm, "ranges": list(ranges), "context": list(context), "plugins": plugins, "capture": capture},
        )  # fmt: skip
        [task] = self._cluster.give(_build, order)
        facts, content = self._cluster.wait(task, f"the plan {plan.stem}")
        plan.write_bytes(content)
        found: dict[str, Any] = facts
        return found


def _versions(backend: Backend) -> dict[str, str]:
    """What a plan depends on beside its graph."""
    return versions([backend.module])


def _build(order: _Order) -> tuple[dict[str, Any], bytes]:
    """In a worker: what is known of the plan, and the plan."""
    backend = backend_named(order.backend)
    refuse_others(order.versions, _versions(backend), step="Give all nodes of the Ray cluster the same packages.")
    with scratch_folder("order") as folder:
        for name, content in order.files.items():
            (folder / name).write_bytes(content)
        plan = folder / "built.plan"
        facts = build_plan(folder / order.graph, plan, backend=backend, **order.options)
        return facts, plan.read_bytes()
