"""A bundle whose plugins or kernels are not those of its manifest is refused before its engine is opened."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foldkv.artifact import write_manifest
from foldkv.errors import ArtifactError
from foldkv.manifests import BundleManifest, parse
from foldkv.plugins.declarations import PLUGINS
from foldkv.runtime.bundle import load_bundle
from foldkv.runtime.plugin_check import bundle_kernels, plugin_findings

SPARSE = PLUGINS["FoldkvSparseAttention"]


def with_plugin(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle, with a plugin planted in it."""
    kernel = dict.fromkeys(("shared", "registers", "stack", "spills", "tensor_memory"), 0)
    kernel |= {"name": "k", "file": "kernels/k.cubin", "sm": 80, "sha256": "ab" * 32, "bytes": 4, "entry": "k"}
    content = json.loads((folder / "manifest.json").read_text())
    content["files"]["kernels/k.cubin"] = {"sha256": "ab" * 32, "bytes": 4}
    content["target"] |= {"name": "a100", "sm": 80}
    content["engine"] = {"file": "engines.json", "plugin_layers": 2}
    content["plugins"] = [
        {
            "name": SPARSE.operator, "namespace": "foldkv", "version": SPARSE.version, "nodes": 2, "row_formats": ["dense"],
            "layout_version": SPARSE.layout_version, "kernels": ["k"],
        }
    ]  # fmt: skip
    content["kernels"] = {"library": "0123", "sm": 80, "compiler": "triton", "files": [kernel | {"threads": 128}]}
    return content  # type: ignore[no-any-return]


def found(content: dict[str, Any]) -> list[str]:
    return plugin_findings(parse(BundleManifest, content))


def test_a_bundle_that_agrees_with_this_version_is_taken(tiny_bundle: Path) -> None:
    content = with_plugin(tiny_bundle)
    assert found(content) == []
    assert found(content | {"plugins": [], "kernels": None}) == []


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(content: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        place: Any = content
        for part in parents:
            place = place[int(part) if part.isdigit() else part]
        place[last] = value

    return apply


@pytest.mark.parametrize(
    ("path", "value", "finding"),
    [
        ("plugins/0/name", "FoldkvOther", "not known to this version"),
        ("plugins/0/version", "99", "version '99'; this version has '1'"),
        ("plugins/0/layout_version", 7, "layout_version 7; this version has 1"),
        ("plugins/0/namespace", "theirs", "namespace 'theirs'"),
        ("plugins/0/row_formats", ["nvfp4"], "its kernels read dense, fp8_ds_mla"),
        ("plugins/0/kernels", ["k", "other"], "kernel other is launched by a plugin but is not in the bundle"),
        ("plugins/0/nodes", 3, "the engine has 2 plugin layers; the plugins listed have 3"),
        ("plugins", [], "listed without a plugin"),
        ("kernels", None, "kernels is missing"),
        ("kernels/sm", 89, "kernels are for sm89; the target is sm80"),
        ("kernels/files/0/sha256", "cd" * 32, "its file has abababab"),
        ("kernels/files/0/file", "elsewhere.cubin", "its file has None"),
    ],
)
def test_every_disagreement_is_found(tiny_bundle: Path, path: str, value: Any, finding: str) -> None:
    content = with_plugin(tiny_bundle)
    change(path, value)(content)
    assert any(finding in text for text in found(content)), found(content)


def test_a_bundle_is_refused_with_every_finding(tiny_bundle: Path, tmp_path: Path) -> None:
    content = json.loads((tiny_bundle / "manifest.json").read_text())
    for name in content["files"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((tiny_bundle / name).read_bytes())
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "k.cubin").write_bytes(b"\x7fELF")
    rest = {key: value for key, value in content.items() if key not in ("schema_version", "kind", "files")}
    planted = with_plugin(tiny_bundle)
    planted["plugins"][0]["version"] = "2"
    rest |= {"plugins": planted["plugins"], "kernels": planted["kernels"]}
    write_manifest(tmp_path, kind="foldkv.bundle", content=rest)
    with pytest.raises(ArtifactError) as error:
        load_bundle(tmp_path)
    for finding in ("version '2'", "kernels are for sm80", "its file has", "Make the bundle again"):
        assert finding in str(error.value)


def test_kernels_are_read_from_the_files_of_the_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "k.cubin").write_bytes(b"\x7fELF")
    content = with_plugin(tiny_bundle)
    [image] = bundle_kernels(tmp_path, parse(BundleManifest, content).kernels)
    assert (image.name, image.threads, image.cubin) == ("k", 128, b"\x7fELF")
    content["kernels"]["files"][0]["file"] = "../k.cubin"
    with pytest.raises(ArtifactError, match="leads out of the artifact"):
        bundle_kernels(tmp_path, parse(BundleManifest, content).kernels)
