"""Give nodes of a graph to plugins: per target, by the plugins' own rules, with a reason for every refusal.

A node that is given away gets the attributes ``plugin_namespace`` and ``plugin_version``, which make
TensorRT's parser take the registered creator. Its function body stays, and ONNX Runtime, which does not
know the attributes, goes on computing it: one file serves every backend.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

import foldkv
from foldkv.artifact import MANIFEST, read_manifest, sha256_file, staged, verify_files, write_manifest
from foldkv.errors import InputError, MissingDependencyError, listing
from foldkv.export.graph import KIND, MODEL
from foldkv.export.operators.registry import DOMAIN
from foldkv.plugins.spec import NAMESPACE, PluginSpec, available_plugins

NAMESPACE_ATTRIBUTE, VERSION_ATTRIBUTE = "plugin_namespace", "plugin_version"


@dataclass(frozen=True)
class Coverage:
    """One operator of the graph: its nodes, how many got a plugin, and why the others did not."""

    operator: str
    nodes: int
    injected: int
    refusals: dict[str, int]


@dataclass(frozen=True)
class Injection:
    """What became of the graph for one target."""

    target: str
    rows: tuple[Coverage, ...]

    @property
    def injected(self) -> int:
        """Nodes that got a plugin."""
        return sum(row.injected for row in self.rows)

    @property
    def nodes(self) -> int:
        """Nodes of foldkv operators in the graph."""
        return sum(row.nodes for row in self.rows)


def inject(
    graph: Path,
    out: Path,
    *,
    target: str,
    sm: int,
    dtype: str,
    layout: str = "dense",
    plugins: Sequence[PluginSpec] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Injection:
    """Write a copy of a graph package whose nodes carry the plugins that the target has.

    Args:
        graph: a graph package, verified by hash; it is not changed.
        out: folder of the new graph package; an older one there is replaced.
        target: its name, for the manifest.
        sm: compute capability of the target.
        dtype: precision that the target computes in.
        layout: row format of the state.
        plugins: those to choose from; the default is all of this version.
        progress: called with one line per operator.

    Raises:
        ArtifactError: the graph package is damaged.
        InputError: no node can take a plugin (the nearest miss is shown), the graph has no foldkv nodes, it was
            injected before, or ``out`` cannot be written.
        MissingDependencyError: there are no plugins at all.
    """
    offered = available_plugins() if plugins is None else tuple(plugins)
    if not offered:
        raise MissingDependencyError(
            f"this version has no compressed-KV attention plugins, for {target} or any target. "
            "Build from the graph as it is, with --plugins off: engines then run the operators' function bodies."
        )
    manifest = read_manifest(graph, kind=KIND)
    verify_files(graph, manifest)
    if "injection" in manifest:
        raise InputError(
            f"{graph} was injected for {manifest['injection']['target']} already. Give the graph that export wrote."
        )
    if Path(out).resolve() == Path(graph).resolve():
        raise InputError(f"{out} is the graph itself; give another output folder.")
    model = onnx.load(Path(graph) / MODEL, load_external_data=False)
    injection = inject_nodes(model, target=target, sm=sm, dtype=dtype, layout=layout, plugins=offered)
    for row in injection.rows:
        progress(f"{row.operator}: {row.injected} of {row.nodes}")
    with staged(Path(out), kind=KIND) as folder:
        for name in manifest["files"]:
            if name != MODEL:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(graph) / name, folder / name)
        onnx.save(model, folder / MODEL)
        content = {key: value for key, value in manifest.items() if key not in ("files", "kind", "schema_version")}
        content["foldkv_version"] = foldkv.__version__
        content["inputs"] = manifest["inputs"] | {"graph": {"manifest_sha256": sha256_file(Path(graph) / MANIFEST)}}
        content["injection"] = {
            "target": target, "sm": sm, "dtype": dtype, "layout": layout, "rows": [asdict(row) for row in injection.rows]
        }  # fmt: skip
        write_manifest(folder, kind=KIND, content=content)
    return injection


def inject_nodes(
    model: onnx.ModelProto, *, target: str, sm: int, dtype: str, layout: str, plugins: Sequence[PluginSpec]
) -> Injection:
    """Mark the nodes of a model in place that a plugin takes; see :func:`inject` for arguments and errors."""
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    if not nodes:
        raise InputError(f"the graph has no node of the domain {DOMAIN!r}; give a graph that `foldkv export` wrote.")
    widths = _widths(model)
    counts, taken = Counter(node.op_type for node in nodes), Counter[str]()
    refused: dict[str, Counter[str]] = {name: Counter() for name in counts}
    misses: list[tuple[int, str]] = []
    given: list[tuple[onnx.NodeProto, PluginSpec]] = []
    for node in nodes:
        candidates = [plugin for plugin in plugins if plugin.operator == node.op_type]
        if not candidates:
            refused[node.op_type]["no plugin for this operator"] += 1
            continue
        width = widths.get(node.input[0])
        tried = [(plugin.refusals(sm=sm, dtype=dtype, layout=layout, width=width), plugin) for plugin in candidates]
        reasons, plugin = min(tried, key=lambda pair: len(pair[0]))
        if reasons:
            refused[node.op_type]["; ".join(reasons)] += 1
            misses.append((len(reasons), f"{node.op_type} ({node.name}): {'; '.join(reasons)}"))
        else:
            given.append((node, plugin))
            taken[node.op_type] += 1
    if not given:
        shown = [text for _, text in sorted(misses, key=lambda miss: miss[0])[:1]] or [
            f"there are plugins for {', '.join(sorted({plugin.operator for plugin in plugins}))} only"
        ]
        raise InputError(
            listing(
                f"0 of {len(nodes)} nodes can take a plugin on {target} (sm{sm}, {dtype}); the nearest miss", shown,
                "Build with --plugins off, or for another target.",
            )
        )  # fmt: skip
    for node, plugin in given:
        node.attribute.extend(
            [
                onnx.helper.make_attribute(NAMESPACE_ATTRIBUTE, NAMESPACE),
                onnx.helper.make_attribute(VERSION_ATTRIBUTE, plugin.version),
            ]
        )
    rows = [Coverage(name, counts[name], taken[name], dict(refused[name])) for name in sorted(counts)]
    return Injection(target, tuple(rows))


def _widths(model: onnx.ModelProto) -> dict[str, int]:
    """Size of the last axis by value name, where the graph knows it."""
    graph = model.graph
    widths = {tensor.name: tensor.dims[-1] for tensor in graph.initializer if tensor.dims}
    for value in (*graph.input, *graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if dims and dims[-1].HasField("dim_value"):
            widths[value.name] = dims[-1].dim_value
    return widths


def coverage_facts(injection: Injection) -> dict[str, Any]:
    """An injection as JSON values."""
    return {"target": injection.target, "injected": injection.injected, "nodes": injection.nodes,
            "operators": [asdict(row) for row in injection.rows]}  # fmt: skip
