"""Weight files that are hashed while they are read for something else."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from foldkv.cli import main
from foldkv.errors import InputError
from foldkv.export.contract.lock import LOCK, WeightsLock
from foldkv.export.pack import pack
from foldkv.runtime import Model, Session
from foldkv.runtime.weight_check import WeightCheck
from foldkv.runtime.weight_files import WeightFiles


@pytest.mark.slow
def test_a_cpu_bundle_is_verified_before_it_is_used(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be verified(.|\n)*model\.safetensors(.|\n)*pack --with-weights"):
        Model(tiny_bundle, verify=True)
    pack(tiny_bundle, tmp_path / "packed")
    with Model(tmp_path / "packed", verify=True) as model:
        with pytest.raises(InputError, match="verify, place, matrices, signature and public_key belong to the model"):
            Session(model, verify=True)
        assert model.changes() == ()
    file = tmp_path / "packed" / "weights" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()  # it may be the checkpoint's own file, linked
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors has sha256 .*; the lock says"):
        Model(tmp_path / "packed", verify=True)
    result = CliRunner().invoke(main, ["generate", str(tmp_path / "packed"), "x", "-n", "1", "--verify"])
    assert result.exit_code == 2 and "Fetch these files again" in result.output


@pytest.mark.slow
def test_a_check_that_is_given_up_ends_its_threads(tiny_bundle: Path, tmp_path: Path) -> None:
    pack(tiny_bundle, tmp_path / "packed")
    lock = WeightsLock.read(tmp_path / "packed" / LOCK)
    paths = {name: tmp_path / "packed" / "weights" / name for name in lock.files}
    files = WeightFiles()
    for name, path in paths.items():
        files.open(name, path, lock.files[name])
    with WeightCheck(files, lock.files, paths) as check:
        assert check.finish() == {name: lock.files[name].sha256 for name in lock.files}
    check = WeightCheck(files, lock.files, paths, threads=1)
    check.close()
    check.close()
    with pytest.raises(RuntimeError):
        check._pool.submit(print)
