"""Check a bundle's plugins against those of this version, before an engine is deserialised.

An engine calls plugins by name and launches kernels from the bundle. Both must be exactly those that the manifest was
written for. Otherwise the engine would compute something else, or run code that has no hash.
"""

from __future__ import annotations

from pathlib import Path

from ..artifact import confined
from ..export.contract.rows import DENSE
from ..manifests import BundleManifest, Kernels, PluginUse
from ..plugins.cuda import KernelImage
from ..plugins.declarations import NAMESPACE, PLUGINS


def plugin_findings(manifest: BundleManifest) -> list[str]:
    """Everything that is wrong with the plugins and kernels of a bundle."""
    plugins, kernels = manifest.plugins, manifest.kernels
    if not plugins:
        return [] if kernels is None else ["kernels are listed without a plugin that launches them"]
    findings = [finding for plugin in plugins for finding in _plugin_findings(plugin)]
    if kernels is None:
        return [*findings, "kernels is missing; expected a table with the compiled kernels"]
    sm = manifest.target.sm
    if kernels.sm != sm:
        findings.append(f"kernels are for sm{kernels.sm}; the target is sm{sm}")
    for kernel in kernels.files:
        listed = manifest.files.get(kernel.file)
        hashed = listed.sha256 if listed else None
        if hashed != kernel.sha256:
            findings.append(f"kernel {kernel.name} has sha256 {kernel.sha256[:16]}; its file has {str(hashed)[:16]}")
    names, wanted = {kernel.name for kernel in kernels.files}, {name for plugin in plugins for name in plugin.kernels}
    findings += [f"kernel {name} is launched by a plugin but is not in the bundle" for name in sorted(wanted - names)]
    layers, nodes = manifest.engine.plugin_layers, sum(plugin.nodes for plugin in plugins)
    if layers != nodes:
        findings.append(f"the engine has {layers} plugin layers; the plugins listed have {nodes}")
    return findings


def _plugin_findings(plugin: PluginUse) -> list[str]:
    name, spec = plugin.name, PLUGINS.get(plugin.name)
    if spec is None:
        return [f"plugin {name!r} is not known to this version, which has {', '.join(PLUGINS)}"]
    findings = [
        f"plugin {name} has {key} {found!r}; this version has {expected!r}"
        for key, found, expected in (
            ("namespace", plugin.namespace, NAMESPACE),
            ("version", plugin.version, spec.version),
            ("layout_version", plugin.layout_version, spec.layout_version),
        )
        if found != expected
    ]
    known = spec.row_formats or {DENSE}
    if not set(plugin.row_formats) <= known:
        findings.append(
            f"plugin {name} has rows {list(plugin.row_formats)!r}; its kernels read {', '.join(sorted(known))}"
        )
    return findings


def bundle_kernels(folder: Path, kernels: Kernels | None) -> list[KernelImage]:
    """The kernels of a checked bundle, read from its files."""
    return [
        KernelImage(one.name, one.entry, one.threads, one.shared, confined(folder, one.file).read_bytes())
        for one in (kernels.files if kernels else ())
    ]
