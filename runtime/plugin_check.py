"""Check a bundle's plugins against those of this version, before an engine is deserialised.

An engine calls plugins by name and launches kernels from the bundle. Both must be exactly those that the manifest was
written for. Otherwise the engine would compute something else, or run code that has no hash.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..artifact import confined
from ..export.contract.rows import DENSE
from ..plugins.cuda import KernelImage
from ..plugins.declarations import NAMESPACE, PLUGINS


def plugin_findings(manifest: Mapping[str, Any]) -> list[str]:
    """Everything that is wrong with the tables ``plugins`` and ``kernels`` of a bundle's manifest."""
    plugins, kernels = manifest.get("plugins", []), manifest.get("kernels")
    if not isinstance(plugins, list) or not all(isinstance(row, dict) for row in plugins):
        return ["plugins is not a list of tables"]
    if not plugins:
        return [] if kernels is None else ["kernels are listed without a plugin that launches them"]
    findings = [finding for row in plugins for finding in _plugin_findings(row)]
    if not isinstance(kernels, dict) or not isinstance(kernels.get("files"), list):
        return [*findings, "kernels is missing; expected a table with the compiled kernels"]
    sm = manifest.get("target", {}).get("sm")
    if kernels.get("sm") != sm:
        findings.append(f"kernels are for sm{kernels.get('sm')}; the target is sm{sm}")
    if not isinstance(kernels.get("library"), str) or not kernels["library"]:
        findings.append("kernels.library is missing; expected a name")
    names = set()
    for row in kernels["files"]:
        if not isinstance(row, dict) or not all(type(row.get(key)) is type_ for key, type_ in _KERNEL_KEYS.items()):
            findings.append(f"kernels.files has a row without {', '.join(_KERNEL_KEYS)}: {str(row)[:100]}")
            continue
        names.add(row["name"])
        hashed = manifest["files"].get(row["file"], {}).get("sha256")
        if hashed != row["sha256"]:
            findings.append(f"kernel {row['name']} has sha256 {row['sha256'][:16]}; its file has {str(hashed)[:16]}")
    wanted = {name for row in plugins if isinstance(row.get("kernels"), list) for name in row["kernels"]}
    findings += [f"kernel {name} is launched by a plugin but is not in the bundle" for name in sorted(wanted - names)]
    layers = manifest.get("engine", {}).get("plugin_layers")
    nodes = sum(row["nodes"] for row in plugins if type(row.get("nodes")) is int)
    if layers != nodes:
        findings.append(f"the engine has {layers} plugin layers; the plugins listed have {nodes}")
    return findings


_KERNEL_KEYS: dict[str, type] = {"name": str, "file": str, "sha256": str, "entry": str, "threads": int, "shared": int}


def _plugin_findings(row: Mapping[str, Any]) -> list[str]:
    name = row.get("name")
    spec = PLUGINS.get(name) if isinstance(name, str) else None
    if spec is None:
        return [f"plugin {name!r} is not known to this version, which has {', '.join(PLUGINS)}"]
    findings = []
    for key, expected in (
        ("namespace", NAMESPACE), ("version", spec.version), ("layout_version", spec.layout_version),
    ):  # fmt: skip
        if row.get(key) != expected:
            findings.append(f"plugin {name} has {key} {row.get(key)!r}; this version has {expected!r}")
    rows = row.get("rows")
    known = spec.rows or {DENSE}
    if not isinstance(rows, list) or not set(rows) <= known:
        findings.append(f"plugin {name} has rows {rows!r}; its kernels read {', '.join(sorted(known))}")
    if not isinstance(row.get("kernels"), list):
        findings.append(f"plugin {name} lists no kernels")
    return findings


def bundle_kernels(folder: Path, manifest: Mapping[str, Any]) -> list[KernelImage]:
    """The kernels of a checked bundle, read from its files."""
    table = manifest.get("kernels") or {"files": []}
    return [
        KernelImage(
            row["name"], row["entry"], row["threads"], row["shared"], confined(folder, row["file"]).read_bytes()
        )
        for row in table["files"]
    ]
