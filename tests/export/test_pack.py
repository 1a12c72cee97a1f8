"""Shipping an artifact with its weights, and verifying them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from foldkv.cli import main
from foldkv.errors import ArtifactError, InputError
from foldkv.export.contract.lock import LOCK, WeightsLock
from foldkv.export.pack import pack, read_locked
from foldkv.export.weight_digests import refuse_others, verify_weights
from foldkv.runtime import Session


def test_a_packed_bundle_needs_nothing_else_and_its_lock_has_the_digests(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    ways, rows = pack(tiny_bundle, tmp_path / "packed", weights_from=source)
    assert set(ways) == {"model.safetensors"} and [row.name for row in rows] == ["model.safetensors"]
    shutil.rmtree(source)
    _, lock = read_locked(tmp_path / "packed")
    assert (
        lock.verified
        and lock.files["model.safetensors"].sha256
        == hashlib.sha256((tiny_checkpoint / "model.safetensors").read_bytes()).hexdigest()
    )
    manifest = json.loads((tmp_path / "packed" / "manifest.json").read_text())
    manifest["inputs"]["checkpoint"]["path"] = "/nowhere"
    (tmp_path / "packed" / "manifest.json").write_text(json.dumps(manifest))
    prompt = [list(range(40, 90))]
    with Session(tmp_path / "packed", context=64) as packed, Session(tiny_bundle, context=64) as plain:
        np.testing.assert_array_equal(packed.prefill(prompt), plain.prefill(prompt))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed"]


def test_verify_finds_one_changed_byte_and_says_what_nobody_hashed(
    tiny_graph: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    result = CliRunner().invoke(main, ["verify", str(tiny_graph)])
    assert result.exit_code == 0 and "GB/s" in result.output
    assert "files as its manifest says" in result.output and "were read and compared with nothing" in result.output
    pack(tiny_graph, tmp_path / "packed")
    facts = json.loads(CliRunner().invoke(main, ["verify", str(tmp_path / "packed"), "--json"]).stdout)
    assert facts["unknown"] == [] and facts["bytes"] == (tiny_checkpoint / "model.safetensors").stat().st_size
    held = tmp_path / "packed" / "weights" / "model.safetensors"
    content = bytearray(held.read_bytes())
    held.unlink()  # it may be the checkpoint's own file, linked
    content[-1] ^= 1
    held.write_bytes(content)
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "packed")])
    assert result.exit_code == 2 and "model.safetensors has sha256" in result.output
    # In the cache of the hub a file's name is its digest.
    lock, blobs = WeightsLock.read(tiny_graph / LOCK), tmp_path / "blobs"
    blobs.mkdir()
    for wrong in (False, True):
        name = "0" * 64 if wrong else hashlib.sha256((tiny_checkpoint / "model.safetensors").read_bytes()).hexdigest()
        shutil.copyfile(tiny_checkpoint / "model.safetensors", blobs / name)
        link = tmp_path / f"link-{wrong}"
        link.symlink_to(blobs / name)
        rows = verify_weights(lock, {"model.safetensors": link})
        assert rows[0].source == "cache" and rows[0].holds == (not wrong)
        if wrong:
            with pytest.raises(InputError, match="the cache says 0000"):
                refuse_others(rows)


def test_what_has_no_lock_is_refused(tmp_path: Path, tiny_bundle: Path) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["files"][LOCK]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    (bundle / LOCK).unlink()
    for folder, finding in ((bundle, "expected a graph package or a bundle"), (tmp_path / "nothing", "cannot be read")):
        with pytest.raises(ArtifactError, match=finding):
            read_locked(folder)
    with pytest.raises(InputError, match="is the artifact itself"):
        pack(tiny_bundle, tiny_bundle)
