"""Give nodes of a graph to plugins: per target, by the plugins' own rules, with a reason for every refusal.

An injected node gets the attributes ``plugin_namespace`` and ``plugin_version``, with which TensorRT's parser takes the
registered creator, and the plugin's fields (``spec.FIELDS``). Its function body stays. ONNX Runtime does not know the
attributes and still computes the body, so one file serves every backend.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from .. import __version__
from ..artifact import MANIFEST, sha256_file, staged
from ..errors import InputError, listing
from ..export.contract.layouts import DENSE, CacheLayout, cache_layout
from ..export.contract.operators import operator_specs
from ..export.contract.rows import DENSE as DENSE_ROWS
from ..export.contract.rows import row_format_named
from ..export.operators.registry import DOMAIN
from ..export.package import INJECTED, KIND, read_package
from ..export.stitch import flat_model
from ..manifests import GraphIdentity, GraphInputs, InjectionFacts, OperatorCoverage, StateRow, write
from ..progress import Say, silent
from .declarations import BODIES, FIELDS, NAMESPACE, PLUGINS, WEIGHT_BODIES, PluginSpec
from .launch import kernels
from .plans import Kernel

NAMESPACE_ATTRIBUTE, VERSION_ATTRIBUTE, LIBRARY_ATTRIBUTE = "plugin_namespace", "plugin_version", "library"


@dataclass(frozen=True)
class Given:
    """What the nodes of one operator got: the plugin, the row formats they touch, the kernels they can launch."""

    plugin: PluginSpec
    row_formats: tuple[str, ...]
    kernels: tuple[Kernel, ...]


@dataclass(frozen=True)
class Injection:
    """The result of injection for one target."""

    target: str
    sm: int
    dtype: str
    layout: str
    rows: tuple[OperatorCoverage, ...]
    given: tuple[Given, ...] = ()

    @property
    def injected(self) -> int:
        """Nodes that got a plugin."""
        return sum(row.injected for row in self.rows)

    @property
    def nodes(self) -> int:
        """Nodes of foldkv operators in the graph."""
        return sum(row.nodes for row in self.rows)

    def facts(self) -> InjectionFacts:
        """Target and coverage, for the manifest."""
        return InjectionFacts(
            self.target, self.sm, self.dtype, self.layout, self.injected, self.nodes, operators=self.rows
        )


def inject(
    graph: Path,
    out: Path,
    *,
    target: str,
    sm: int,
    dtype: str,
    layout: str = DENSE,
    plugins: Sequence[PluginSpec] = tuple(PLUGINS.values()),
    progress: Say = silent,
) -> Injection:
    """Write a copy of a graph package in which nodes have the plugins of the target.

    Functions of layers are inlined. The package's links to a checkpoint's files are made again; the files are not copied.

    Args:
        graph: a graph package; its hashes are verified, and it is not changed.
        out: folder of the new graph package; an older one there is replaced.
        target: its name, for the manifest.
        sm: compute capability of the target.
        dtype: precision that the target computes in.
        layout: name of the engine's cache layout.
        plugins: the plugins to choose from; the default is all of this version.
        progress: called with one line.

    Raises:
        ArtifactError: the graph package is damaged.
        InputError: no node can take a plugin (the nearest miss is shown), the graph has no foldkv nodes or was already
            injected, the layout is unknown.
    """
    package = read_package(graph, verify=True)
    manifest = package.manifest
    if manifest.injection is not None:
        raise InputError(
            f"{graph} was already injected for {manifest.injection.target}. Give the graph that export wrote."
        )
    if Path(out).resolve() == Path(graph).resolve():
        raise InputError(f"{out} is the graph itself; give another output folder.")
    model = flat_model(package)
    injection = inject_nodes(
        model, manifest.state, rope_dim=package.spec.rope_dim, target=target, sm=sm, dtype=dtype, layout=layout,
        plugins=plugins,
    )  # fmt: skip
    progress(f"{injection.injected} of {injection.nodes} foldkv nodes go to plugins")
    with staged(Path(out), kind=KIND) as folder:
        for name in manifest.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(graph) / name, folder / name)
        onnx.save(model, folder / INJECTED)
        made = replace(
            manifest,
            foldkv_version=__version__,
            inputs=GraphInputs(manifest.inputs.checkpoint, GraphIdentity(sha256_file(Path(graph) / MANIFEST))),
            injection=injection.facts(),
        )
        known = {name: file.sha256 for name, file in manifest.files.items()}
        write(folder, made, known=known)
    return injection


def inject_nodes(
    model: onnx.ModelProto,
    state: Sequence[StateRow],
    *,
    rope_dim: int,
    target: str,
    sm: int,
    dtype: str,
    layout: str = DENSE,
    plugins: Sequence[PluginSpec] = tuple(PLUGINS.values()),
) -> Injection:
    """Mark, in place, the nodes of a model that a plugin takes; see :func:`inject` for other arguments and errors.

    Args:
        model: as ``foldkv export`` wrote it.
        state: the manifest's rows for state tensors.
        rope_dim: channels of a row that RoPE turns.
    """
    formats = cache_layout(layout)
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    if not nodes:
        raise InputError(f"the graph has no node of the domain {DOMAIN!r}; give a graph that `foldkv export` wrote.")
    shapes = _shapes(model)
    groups = {row["input"]: row["group"] for row in state}
    counts, taken = Counter(node.op_type for node in nodes), Counter[str]()
    refused: dict[str, Counter[str]] = {name: Counter() for name in counts}
    misses: list[tuple[int, str]] = []
    packed: list[str] = []
    found: dict[str, dict[str, Any]] = {}
    given: list[tuple[onnx.NodeProto, PluginSpec, str]] = []
    for node in nodes:
        candidates = [plugin for plugin in plugins if plugin.operator == node.op_type]
        if not candidates:
            reason = (BODIES | WEIGHT_BODIES).get(node.op_type, "no plugin for this operator")
            refused[node.op_type][reason] += 1
            if layout != DENSE and any(name in groups for name in node.input):
                packed.append(f"{node.op_type} ({node.name}): {reason}")
            continue
        row_format = _row_format(node, formats, groups)
        tried = [(plugin.refusals(sm=sm, dtype=dtype, row_format=row_format), plugin) for plugin in candidates]
        reasons, plugin = min(tried, key=lambda pair: len(pair[0]))
        launched: list[Kernel] = []
        if not reasons:
            launched, reasons = _kernels(
                node, plugin, shapes, sm=sm, dtype=dtype, row_format=row_format, rope_dim=rope_dim
            )
        if reasons and row_format_named(row_format).packed:
            packed.append(f"{node.op_type} ({node.name}): {'; '.join(reasons)}")
        if reasons:
            refused[node.op_type]["; ".join(reasons)] += 1
            misses.append((len(reasons), f"{node.op_type} ({node.name}): {'; '.join(reasons)}"))
        else:
            given.append((node, plugin, row_format))
            taken[node.op_type] += 1
            entry = found.setdefault(node.op_type, {"plugin": plugin, "row_formats": {}, "kernels": {}})
            entry["row_formats"][row_format] = None
            entry["kernels"] |= dict.fromkeys(launched)
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
    if packed:  # a function body reads dense rows only
        title = (
            f"layout {layout} needs a plugin for every operator that touches cache rows on {target} (sm{sm}, {dtype})"
        )
        raise InputError(
            listing(title, packed, "Choose another layout; `foldkv targets --coverage` shows what plugins read.")
        )
    for node, plugin, row_format in given:
        version = row_format_named(row_format).version
        fields = {"sm": sm, "dtype": dtype, "row_format": row_format, "layout_version": version, "rope_dim": rope_dim}
        marks = {NAMESPACE_ATTRIBUTE: NAMESPACE, VERSION_ATTRIBUTE: plugin.version, LIBRARY_ATTRIBUTE: "", **fields}
        # If the operator itself has an attribute with a field's name, it is already there, with the checked value.
        _mark(node, {name: value for name, value in marks.items() if name not in plugin.attributes})
    return Injection(
        target, sm, dtype, layout,
        tuple(OperatorCoverage(name, counts[name], taken[name], dict(refused[name])) for name in sorted(counts)),
        tuple(Given(e["plugin"], tuple(e["row_formats"]), tuple(e["kernels"])) for _, e in sorted(found.items())),
    )  # fmt: skip


def _mark(node: onnx.NodeProto, values: Mapping[str, Any]) -> None:
    node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in values.items())


def set_library(model: onnx.ModelProto, library: str) -> None:
    """Write the kernels' library into every injected node, in place."""
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.domain == DOMAIN and attribute.name == LIBRARY_ATTRIBUTE:
                attribute.s = library.encode()


def strip_injection(model: onnx.ModelProto) -> None:
    """Remove, in place, everything that injection wrote into the nodes."""
    added = {NAMESPACE_ATTRIBUTE, VERSION_ATTRIBUTE, *FIELDS}
    for node in model.graph.node:
        # Operators also have attributes with names of fields. Nodes that were not injected keep all; a plugin keeps its own.
        if node.domain == DOMAIN and any(attribute.name == NAMESPACE_ATTRIBUTE for attribute in node.attribute):
            own = PLUGINS[node.op_type].attributes if node.op_type in PLUGINS else {}
            kept = [attribute for attribute in node.attribute if attribute.name not in added or attribute.name in own]
            del node.attribute[:]
            node.attribute.extend(kept)


def _row_format(node: onnx.NodeProto, layout: CacheLayout, groups: Mapping[str, str]) -> str:
    """The format of the rows that a node touches."""
    spec = operator_specs().get(node.op_type)
    if spec is None or not spec.state:
        return DENSE_ROWS
    # Compression and the window have the state itself as an input; the others read their outputs, always of one group.
    first = spec.state[0]
    group = groups.get(node.input[spec.inputs.index(first)], first.groups[0])
    return layout.format_of(group) or DENSE_ROWS


def updated_in_place(model: onnx.ModelProto, state: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the state tensors that plugins of an injected model update in the buffer that they read, in their order.

    Function bodies write the others, and need a second buffer.

    Args:
        model: injected, see :func:`inject_nodes`.
        state: the manifest's rows for state tensors.
    """
    inputs = {row["input"]: row["name"] for row in state}
    outputs = {row["output"]: row["name"] for row in state}
    found = set()
    for node in model.graph.node:
        spec = PLUGINS.get(node.op_type) if node.domain == DOMAIN else None
        if spec is None or not any(attribute.name == NAMESPACE_ATTRIBUTE for attribute in node.attribute):
            continue
        for out, given in spec.aliases.items():
            name = outputs.get(node.output[out])
            if name is not None and inputs.get(node.input[given]) == name:
                found.add(name)
    return [row["name"] for row in state if row["name"] in found]


def _kernels(
    node: onnx.NodeProto, plugin: PluginSpec, shapes: Mapping[str, list[int | str]], *, sm: int, dtype: str, row_format: str,
    rope_dim: int,
) -> tuple[list[Kernel], list[str]]:  # fmt: skip
    """The kernels that a node can launch, or why there are none for its sizes."""
    spec = PLUGINS.get(plugin.operator)
    if spec is None:
        return [], [f"this version has no kernels for {plugin.operator}"]
    attributes = {a.name: _attribute(a) for a in node.attribute if a.name in spec.attributes}
    sizes: dict[str, int] = {}
    try:
        for tensor, name in zip(spec.inputs, node.input, strict=True):
            for symbol, size in tensor.sized(shapes[name]) if name in shapes else ():
                if isinstance(symbol, str) and isinstance(size, int):
                    sizes[symbol] = size
                elif isinstance(symbol, str) and "+" in symbol and (fixed := re.search(r"\b\d+\b", str(size))):
                    sizes[symbol.split("+")[0].strip()] = int(fixed[0])  # "W + S" is written "chunk + 128"
        if row_format_named(row_format).packed:
            sizes["ROW"] = row_format_named(row_format).row_bytes(sizes["D"], rope_dim)
        return kernels(
            plugin.operator, sizes, attributes, sm=sm, dtype=dtype, row_format=row_format, rope_dim=rope_dim
        ), []
    except (ValueError, InputError) as error:
        return [], [str(error)]
    except KeyError as error:
        return [], [f"the graph does not say how large {error} is"]


def _attribute(attribute: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    return tuple(value) if attribute.type == onnx.AttributeProto.INTS else value


def _shapes(model: onnx.ModelProto) -> dict[str, list[int | str]]:
    """Shapes by value name, as far as the graph has them."""
    graph = model.graph
    shapes: dict[str, list[int | str]] = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.tensor_type.HasField("shape"):
            shapes[value.name] = [
                dim.dim_value if dim.HasField("dim_value") else dim.dim_param
                for dim in value.type.tensor_type.shape.dim
            ]
    return shapes
