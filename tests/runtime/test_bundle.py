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
from foldkv.optimize.build import build_bundles
from foldkv.runtime import bundle as bundle_module
from foldkv.runtime.bundle import load_bundle
from foldkv.runtime.chain import ChainModel
from foldkv.runtime.session import Session
from foldkv.runtime.tokenizer import Tokenizer
from foldkv.validation.inside import GraphChoices


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
    (folder / "placed.bin").rename(folder.parent / "elsewhere.bin")
    (folder / "placed.bin").symlink_to("../elsewhere.bin")
    return folder


def link_to_others(folder: Path) -> None:
    link_out(folder)
    flip("elsewhere.bin")(folder.parent)


def listed_again(folder: Path, name: str) -> None:
    """Write a file's new digest into the manifest, as someone does who changed it on purpose."""
    content = (folder / name).read_bytes()
    facts = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    edit(lambda m: m["files"].update({name: facts}))(folder)


def other_weights(name: str) -> Callable[[Path], None]:
    """A segment that reads a constant from a file without a digest."""

    def apply(folder: Path) -> None:
        segment = folder / "segments" / "head.onnx"
        model = onnx.load(segment)
        tensor = model.graph.initializer.add(name="evil", data_type=onnx.TensorProto.FLOAT, dims=[1])
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=name)
        onnx.save(model, segment)
        listed_again(folder, "segments/head.onnx")

    return apply


def other_table(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A table of the chain that was changed on purpose."""

    def apply(folder: Path) -> None:
        table = json.loads((folder / "chain.json").read_text())
        change(table)
        (folder / "chain.json").write_text(json.dumps(table))
        listed_again(folder, "chain.json")

    return apply


def move_file(manifest: dict[str, Any]) -> None:
    manifest["files"]["../placed.bin"] = manifest["files"].pop("placed.bin")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "cannot be read"),
    "manifest is not JSON": (lambda f: (f / "manifest.json").write_text("{"), "is not JSON"),
    "manifest is a list": (lambda f: (f / "manifest.json").write_text("[]"), "has kind 'list'"),
    "another kind": (edit(lambda m: m.update(kind="foldkv.graph")), "has kind 'foldkv.graph'"),
    "a newer schema": (edit(lambda m: m.update(schema_version=2)), "schema_version 2"),
    "nothing about state in place": (
        edit(lambda m: m.pop("in_place")),
        "in_place is missing; expected a list",
    ),
    "state in place that is not there": (
        edit(lambda m: m.update(in_place=["9.window"])),
        "in_place names '9.window', which is not a state tensor",
    ),
    "no ids that end a text": (
        edit(lambda m: m["model"].pop("eos_token_ids")),
        "model.eos_token_ids is missing; expected a list",
    ),
    "no segment": (lambda f: (f / "segments/head.onnx").unlink(), "head.onnx is missing"),
    "cut segment": (lambda f: (f / "segments/head.onnx").write_bytes(b"short"), "has 5 bytes"),
    "flipped bit in a segment": (flip("segments/csa-moe.onnx"), "changed after it was made"),
    "flipped bit in placed weights": (flip("placed.bin"), "changed after it was made"),
    "flipped bit in the tokenizer": (flip("tokenizer.json"), "changed after it was made"),
    "path out of the folder": (edit(move_file), "leads out of the artifact"),
    "a link to other weights": (link_to_others, "changed after it was made"),
    "a link to nothing": (lambda f: link_out(f) and (f.parent / "elsewhere.bin").unlink(), "which is missing"),
    "weights that are not listed": (other_weights("evil.bin"), "'evil.bin'"),
    "weights by another spelling": (other_weights("./weights.bin"), "'./weights.bin'"),
    "weights outside": (other_weights("../evil.bin"), "'../evil.bin'"),
    "weights in memory": (other_weights("*/_ORT_MEM_ADDR_/*"), "_ORT_MEM_ADDR_"),
    "one graph, as older bundles": (
        edit(lambda m: m["engine"].update(file="segments/head.onnx")),
        "expected 'chain.json'",
    ),
    "a table that is no table": (other_table(lambda t: t.pop("calls")), "is no table of a chain"),
    "a segment that is not listed": (other_table(lambda t: t["segments"].update(head="evil.onnx")), "evil.onnx"),
    "a segment in another format": (other_table(lambda t: t["segments"].update(head="placed.bin")), "placed.bin"),
    "placed weights that are not listed": (
        other_table(lambda t: t["weights"]["head"]["norm.weight"].__setitem__(slice(0, 2), ["evil.bin", True])),
        "evil.bin",
    ),
    "weights of another layer's kind": (
        other_table(lambda t: t["weights"].update({"layers.1": t["weights"]["layers.2"]})),
        "csa-moe takes 'attn.indexer",
    ),
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
    tokens = list(range(40, 120))
    expected, found = (
        GraphChoices(ChainModel(load_bundle(folder), threads=1), (1, 3)).chosen(tokens)
        for folder in (tiny_bundle, snapshot)
    )
    assert expected.keys() == {1, 3} and all(np.array_equal(expected[layer], found[layer]) for layer in expected)


def test_a_session_tells_when_its_weights_are_written_again(
    tiny_graph: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    [built] = build_bundles(tiny_graph, tmp_path / "b", ["cpu"], weights_from=checkpoint).results
    with Session(built.folder, context=64, weights_from=checkpoint) as session:
        assert session.ready()
        flip("model.safetensors")(checkpoint)
        assert session.not_ready() == (f"{checkpoint / 'model.safetensors'} was written again",)


def test_a_session_tells_when_the_files_under_it_are_no_longer_those_that_it_opened(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    folder = as_copied(tiny_bundle, tmp_path)
    with Session(folder, context=64) as session:
        assert session.ready() and session.not_ready() == ()
        flip("tokenizer.json")(folder)  # a session does not read it, but the tokenizer may be opened later
        assert not session.ready() and session.not_ready() == (f"{folder / 'tokenizer.json'} was written again",)
        shutil.copyfile(tiny_bundle / "placed.bin", folder / "placed.bin")  # in place: the mapped bytes change
        shutil.copyfile(tiny_bundle / "chain.json", tmp_path / "new")
        (tmp_path / "new").replace(folder / "chain.json")
        assert [reason.removeprefix(f"{folder}/") for reason in session.not_ready()] == [
            "chain.json was replaced", "placed.bin was written again", "tokenizer.json was written again",
        ]  # fmt: skip
        shutil.rmtree(folder)
        assert all("is gone" in reason for reason in session.not_ready()) and len(session.not_ready()) == 11
    assert session.not_ready()[0] == "the session is closed"


def test_a_bundle_that_changes_while_it_is_opened_is_refused(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, check = as_copied(tiny_bundle, tmp_path), bundle_module.verify_files

    def checked_too_early(*arguments: Any) -> None:
        check(*arguments)
        (folder / "placed.bin").write_bytes((tiny_bundle / "placed.bin").read_bytes())

    monkeypatch.setattr(bundle_module, "verify_files", checked_too_early)
    with pytest.raises(ArtifactError, match=r"(?s)was changed while it was opened .*placed\.bin was written again"):
        Session(folder, context=64)


@given(st.text(max_size=60))
def test_text_comes_back_from_its_tokens_one_by_one_or_at_once(tiny_bundle: Path, text: str) -> None:
    tokenizer = Tokenizer.from_bundle(load_bundle(tiny_bundle, verify=False))
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    stream = tokenizer.stream()
    assert "".join([*(stream.push(token) for token in tokens), stream.finish()]) == text
