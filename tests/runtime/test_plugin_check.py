"""A bundle whose plugins or kernels are not those of its manifest is refused before its engine is opened."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foldkv.artifact import write_manifest
from foldkv.errors import ArtifactError
from foldkv.plugins.declarations import PLUGINS
from foldkv.runtime.bundle import load_bundle
from foldkv.runtime.plugin_check import bundle_kernels, plugin_findings

SPARSE = PLUGINS["FoldkvSparseAttention"]


def manifest() -> dict[str, Any]:
    """What a bundle with one plugin says of it."""
    return {
        "files": {"kernels/k.cubin": {"sha256": "ab" * 32, "bytes": 4}},
        "target": {"name": "a100", "sm": 80},
        "engine": {"file": "engine.plan", "plugin_layers": 2},
        "plugins": [
            {
                "name": SPARSE.operator, "namespace": "foldkv", "version": SPARSE.version, "nodes": 2, "rows": ["dense"],
                "layout_version": SPARSE.layout_version, "kernels": ["k"],
            }
        ],
        "kernels": {
            "library": "0123", "sm": 80, "compiler": "triton",
            "files": [
                {"name": "k", "file": "kernels/k.cubin", "sha256": "ab" * 32, "entry": "k", "threads": 128, "shared": 0}
            ],
        },
    }  # fmt: skip


def test_a_bundle_that_agrees_with_this_version_is_taken() -> None:
    assert plugin_findings(manifest()) == []
    assert plugin_findings({"files": {}, "plugins": []}) == []


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
        ("plugins/0/rows", ["nvfp4"], "its kernels read dense, fp8_ds_mla"),
        ("plugins/0/kernels", ["k", "other"], "kernel other is launched by a plugin but is not in the bundle"),
        ("plugins/0/kernels", None, "lists no kernels"),
        ("plugins/0/nodes", 3, "the engine has 2 plugin layers; the plugins listed have 3"),
        ("plugins", "none", "not a list of tables"),
        ("plugins", [], "listed without a plugin"),
        ("kernels", None, "kernels is missing"),
        ("kernels/sm", 89, "kernels are for sm89; the target is sm80"),
        ("kernels/library", "", "kernels.library is missing"),
        ("kernels/files", [{"name": "k"}], "has a row without"),
        ("kernels/files/0/sha256", "cd" * 32, "its file has abababab"),
        ("kernels/files/0/file", "elsewhere.cubin", "its file has None"),
    ],
)
def test_every_disagreement_is_found(path: str, value: Any, finding: str) -> None:
    content = copy.deepcopy(manifest())
    change(path, value)(content)
    assert any(finding in text for text in plugin_findings(content)), plugin_findings(content)


def test_a_bundle_is_refused_with_every_finding(tiny_bundle: Path, tmp_path: Path) -> None:
    import json

    content = json.loads((tiny_bundle / "manifest.json").read_text())
    for name in content["files"]:
        (tmp_path / name).write_bytes((tiny_bundle / name).read_bytes())
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "k.cubin").write_bytes(b"\x7fELF")
    rest = {key: value for key, value in content.items() if key not in ("schema_version", "kind", "files")}
    planted = manifest()
    planted["plugins"][0]["version"] = "2"
    rest |= {"plugins": planted["plugins"], "kernels": planted["kernels"]}
    write_manifest(tmp_path, kind="foldkv.bundle", content=rest)
    with pytest.raises(ArtifactError) as error:
        load_bundle(tmp_path)
    for finding in ("version '2'", "kernels are for sm80", "its file has", "Make the bundle again"):
        assert finding in str(error.value)


def test_kernels_are_read_from_the_files_of_the_bundle(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "k.cubin").write_bytes(b"\x7fELF")
    [image] = bundle_kernels(tmp_path, manifest())
    assert (image.name, image.threads, image.cubin) == ("k", 128, b"\x7fELF")
    content = manifest()
    content["kernels"]["files"][0]["file"] = "../k.cubin"
    with pytest.raises(ArtifactError, match="leads out of the artifact"):
        bundle_kernels(tmp_path, content)
