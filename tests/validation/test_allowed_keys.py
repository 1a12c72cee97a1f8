"""What an export was allowed to ignore, its bundle allows validation to ignore."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from foldkv.errors import CheckpointError, InputError
from foldkv.validation.validate import validate


def test_validation_reads_the_checkpoint_as_the_export_did(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle", copy_function=shutil.copyfile)
    reference = tmp_path / "checkpoint"
    reference.mkdir()
    shutil.copy(tiny_checkpoint / "model.safetensors", reference)
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    (reference / "config.json").write_text(json.dumps(config | {"my_router": 1}))
    with pytest.raises(CheckpointError, match="unknown key 'my_router'"):
        validate(bundle, reference, tmp_path / "report")
    # The reference was read where its weights are found to be another checkpoint's: this config.json is not the bundle's.
    with pytest.raises(InputError, match="made from another checkpoint"):
        validate(bundle, reference, tmp_path / "report", allow_unknown_keys=["my_router"])
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["inputs"]["checkpoint"]["allowed_unknown_keys"] = ["my_router"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="made from another checkpoint"):
        validate(bundle, reference, tmp_path / "report")
