"""Damaged bundles: each is one clear error before anything is loaded."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from disks import hub_cache, local_download
from hypothesis import given
from hypothesis import strategies as st

from foldkv.errors import ArtifactError, FoldkvError
from foldkv.runtime import bundle as bundle_module
from foldkv.runtime.bundle import load_bundle
from foldkv.runtime.session import Session
from foldkv.runtime.tokenizer import Tokenizer
from foldkv.validation.divergence import Taps


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


def link_out(folder: Path) -> Path:
    """Weights on another disk, with a link to them."""
    (folder / "weights.bin").rename(folder.parent / "elsewhere.bin")
    (folder / "weights.bin").symlink_to("../elsewhere.bin")
    return folder


def link_to_others(folder: Path) -> None:
    link_out(folder)
    flip("elsewhere.bin")(folder.parent)


def listed_again(folder: Path) -> None:
    """Write the model's new digest into the manifest, as someone does who changed the model on purpose."""
    content = (folder / "model.onnx").read_bytes()
    facts = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    edit(lambda m: m["files"].update({"model.onnx": facts}))(folder)


def other_weights(name: str) -> Callable[[Path], None]:
    """A model that reads its weights from a file without a digest."""

    def apply(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        shutil.copyfile(folder / "weights.bin", folder / "evil.bin")
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location" and tensor.name == "embed.weight":
                    entry.value = name
        onnx.save(model, folder / "model.onnx")
        listed_again(folder)

    return apply


def other_format(folder: Path) -> None:
    (folder / "model.onnx").rename(folder / "m.ort")
    edit(lambda m: m["files"].update({"m.ort": m["files"].pop("model.onnx")}))(folder)
    edit(lambda m: m["engine"].update(file="m.ort"))(folder)


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
    "a link to other weights": (link_to_others, "changed after it was made"),
    "a link to nothing": (lambda f: link_out(f) and (f.parent / "elsewhere.bin").unlink(), "which is missing"),
    "weights that are not listed": (other_weights("evil.bin"), "'evil.bin'"),
    "weights by another spelling": (other_weights("./weights.bin"), "'./weights.bin'"),
    "weights outside": (other_weights("../evil.bin"), "'../evil.bin'"),
    "weights in memory": (other_weights("*/_ORT_MEM_ADDR_/*"), "_ORT_MEM_ADDR_"),
    "a model in another format": (other_format, "engine.file is 'm.ort'; expected an .onnx file"),
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
        Session(folder, context=64)
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


def as_copied(bundle: Path, tmp: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp / "bundle"))


def as_downloaded(bundle: Path, tmp: Path) -> Path:
    folder = as_copied(bundle, tmp)
    local_download(folder)
    return folder


def as_a_link(bundle: Path, tmp: Path) -> Path:
    (tmp / "link").symlink_to(bundle, target_is_directory=True)
    return tmp / "link"


LAYOUTS: dict[str, Callable[[Path, Path], Path]] = {
    "hugging face cache": lambda bundle, tmp: hub_cache(bundle, tmp / "models--x--y"),
    "hf download --local-dir": as_downloaded,
    "a link": as_a_link,
    "weights on another disk": lambda bundle, tmp: link_out(as_copied(bundle, tmp)),
    "a name with a line break": lambda bundle, tmp: as_copied(bundle, tmp).rename(tmp / "line\nbreak [*]"),
}


@pytest.mark.parametrize("lay", LAYOUTS.values(), ids=list(LAYOUTS))
def test_a_bundle_is_read_as_it_lies_on_disk(
    tiny_bundle: Path, tmp_path: Path, lay: Callable[[Path, Path], Path]
) -> None:
    folder = lay(tiny_bundle, tmp_path)
    with Session(tiny_bundle, context=64) as usual, Session(folder, context=64) as session:
        expected, found = (each.prefill([[65, 66, 67]]) for each in (usual, session))
        assert expected.tobytes() == found.tobytes()
        assert session.ready()
    assert Tokenizer.from_bundle(load_bundle(folder)).encode("text")


def test_layers_of_a_bundle_in_a_cache_can_be_compared(tiny_bundle: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(tiny_bundle, tmp_path / "models--x--y")
    expected, found = (Taps(load_bundle(folder), (), threads=1).streams([65, 66]) for folder in (tiny_bundle, snapshot))
    assert len(expected) == 4 and all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_session_tells_when_the_files_under_it_are_no_longer_those_that_it_opened(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    folder = as_copied(tiny_bundle, tmp_path)
    with Session(folder, context=64) as session:
        assert session.ready() and session.not_ready() == ()
        flip("tokenizer.json")(folder)  # a session does not read it, but the tokenizer may be opened later
        assert not session.ready() and session.not_ready() == (f"{folder / 'tokenizer.json'} was written again",)
        shutil.copyfile(tiny_bundle / "weights.bin", folder / "weights.bin")  # in place: the mapped bytes change
        shutil.copyfile(tiny_bundle / "model.onnx", tmp_path / "new")
        (tmp_path / "new").replace(folder / "model.onnx")
        assert [reason.removeprefix(f"{folder}/") for reason in session.not_ready()] == [
            "model.onnx was replaced", "tokenizer.json was written again", "weights.bin was written again",
        ]  # fmt: skip
        shutil.rmtree(folder)
        assert all("is gone" in reason for reason in session.not_ready()) and len(session.not_ready()) == 4
    assert session.not_ready()[0] == "the session is closed"


def test_a_bundle_that_changes_while_it_is_opened_is_refused(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, check = as_copied(tiny_bundle, tmp_path), bundle_module.verify_files

    def checked_too_early(*arguments: Any) -> None:
        check(*arguments)
        (folder / "weights.bin").write_bytes((tiny_bundle / "weights.bin").read_bytes())

    monkeypatch.setattr(bundle_module, "verify_files", checked_too_early)
    with pytest.raises(ArtifactError, match=r"(?s)was changed while it was opened .*weights\.bin was written again"):
        Session(folder, context=64)


@given(st.text(max_size=60))
def test_text_comes_back_from_its_tokens_one_by_one_or_at_once(tiny_bundle: Path, text: str) -> None:
    tokenizer = Tokenizer.from_bundle(load_bundle(tiny_bundle, verify=False))
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    stream = tokenizer.stream()
    assert "".join([*(stream.push(token) for token in tokens), stream.finish()]) == text
