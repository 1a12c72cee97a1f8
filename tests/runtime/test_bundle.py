"""Damaged bundles: each is one clear error before anything is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded import Recorded

from foldkv.artifact import read_manifest
from foldkv.errors import ArtifactError, FoldkvError
from foldkv.runtime import bundle as bundle_module
from foldkv.runtime.bundle import load_bundle
from foldkv.runtime.session import Session
from foldkv.runtime.tokenizer import Tokenizer


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    return apply


def flip(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return apply


def link_out(folder: Path) -> None:
    shutil.copyfile(folder / "weights.bin", folder.parent / "elsewhere.bin")
    (folder / "weights.bin").unlink()
    (folder / "weights.bin").symlink_to(folder.parent / "elsewhere.bin")


def move_file(manifest: dict[str, Any]) -> None:
    manifest["files"]["../weights.bin"] = manifest["files"].pop("weights.bin")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "cannot be read"),
    "manifest is not JSON": (lambda f: (f / "manifest.json").write_text("{"), "is not JSON"),
    "manifest is a list": (lambda f: (f / "manifest.json").write_text("[]"), "has kind 'list'"),
    "another kind": (edit(lambda m: m.update(kind="foldkv.graph")), "has kind 'foldkv.graph'"),
    "a newer schema": (edit(lambda m: m.update(schema_version=2)), "schema_version 2"),
    "nothing about state in place": (
        edit(lambda m: m.pop("in_place")),
        "in_place is missing; expected a list of names",
    ),
    "state in place that is not there": (
        edit(lambda m: m.update(in_place=["9.window"])),
        "in_place names '9.window', which is not a state tensor",
    ),
    "no ids that end a text": (
        edit(lambda m: m["model"].pop("eos_token_ids")),
        "model.eos_token_ids is missing; expected a list",
    ),
    "no model": (lambda f: (f / "model.onnx").unlink(), "model.onnx is missing"),
    "cut model": (lambda f: (f / "model.onnx").write_bytes(b"short"), "has 5 bytes"),
    "flipped bit in the model": (flip("model.onnx"), "changed after it was made"),
    "flipped bit in the weights": (flip("weights.bin"), "changed after it was made"),
    "flipped bit in the tokenizer": (flip("tokenizer.json"), "changed after it was made"),
    "path out of the folder": (edit(move_file), "leads out of the artifact"),
    "link out of the folder": (link_out, "is a link out of the artifact"),
    "a file that is not listed": (lambda f: (f / "extra.bin").write_bytes(b"x"), "extra.bin"),
    "no state": (edit(lambda m: m.pop("state")), "state"),
    "state is text": (edit(lambda m: m.update(state="x")), "state"),
    "unknown dtype": (edit(lambda m: m["state"][0].update(dtype="float3")), "float3"),
    "negative width": (edit(lambda m: m["state"][0].update(width=-4)), "width"),
    "a name twice": (edit(lambda m: m["state"].append(m["state"][0])), "two tensors have the name"),
    "no model facts": (edit(lambda m: m.pop("model")), "model"),
    "vocabulary is text": (edit(lambda m: m["model"].update(vocab_size="x")), "vocab_size"),
    "unknown backend": (edit(lambda m: m.update(backend="abacus")), "abacus"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=list(DAMAGE))
def test_damage_is_one_error(tiny_bundle: Path, tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)
    damage(folder)
    files = sorted(path.name for path in folder.iterdir())
    with pytest.raises(ArtifactError) as error:
        load_bundle(folder)
    assert message in str(error.value)
    assert sorted(path.name for path in folder.iterdir()) == files


def test_a_manifest_that_describes_another_model_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)
    edit(lambda m: m["model"].update(vocab_size=300))(folder)
    with pytest.raises(ArtifactError, match="width 258; the manifest says 300"):
        Session(folder, context=64)


def test_a_bundle_without_a_tokenizer_runs_but_has_no_text(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)
    (folder / "tokenizer.json").unlink()
    edit(lambda m: m["files"].pop("tokenizer.json"))(folder)
    assert Session(folder, context=64).generate([[65]], max_new_tokens=2)
    with pytest.raises(FoldkvError, match="tokenizer"):
        Tokenizer.from_bundle(load_bundle(folder))


@given(st.text(max_size=60))
def test_text_comes_back_from_its_tokens_one_by_one_or_at_once(tiny_bundle: Path, text: str) -> None:
    tokenizer = Tokenizer.from_bundle(load_bundle(tiny_bundle, verify=False))
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    stream = tokenizer.stream()
    assert "".join([*(stream.push(token) for token in tokens), stream.finish()]) == text


def test_what_export_writes_of_the_model_is_what_the_runtime_reads(tiny_graph: Path, tiny_bundle: Path) -> None:
    """Every fact by its name: one that is written under another would be missed without a word."""
    written, read = read_manifest(tiny_graph, kind="foldkv.graph")["model"], asdict(load_bundle(tiny_bundle).model)
    assert {
        name: tuple(value) if isinstance(value, list) else value for name, value in written.items() if name in read
    } == read
    assert read["eos_token_ids"]


def test_every_key_that_a_session_reads_is_written_by_build(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key with a default would be missed without a word. Engines: tests/optimize/test_build.py."""
    manifest = Recorded(read_manifest(tiny_bundle, kind="foldkv.bundle"))
    monkeypatch.setattr(bundle_module, "read_manifest", lambda folder, kind: manifest)
    with Session(tiny_bundle, context=64) as session:
        session.generate([[65]], max_new_tokens=1)
        Tokenizer.from_bundle(session.bundle)
    assert manifest.missing <= {"linked"}
    assert {"model.eos_token_ids", "io.logits", "state[].width", "engine.file", "plugins", "backend"} <= manifest.read
