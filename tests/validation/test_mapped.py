"""Arrays in files without a name: their values, where they are, and what is left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mappings import in_files

from foldkv.errors import SystemFailure
from foldkv.validation.jobs import Job
from foldkv.validation.layered_files import Kept
from foldkv.validation.mapped import Gathered, mapped


def test_parts_are_one_array_that_a_file_holds_as_long_as_somebody_has_it(tmp_path: Path) -> None:
    parts = [np.random.default_rng(seed).random((size, 3, 5), np.float32) for seed, size in enumerate((4, 0, 300))]
    for folder in (tmp_path / "made" / "here", None):
        gathered = Gathered(folder)
        for part in parts:
            given = part.copy()
            gathered.add(given)
            given[:] = 7  # a buffer that is used again
        found = gathered.array()
        assert np.array_equal(found, np.concatenate(parts)) and found.dtype == np.float32
        assert in_files(found, tmp_path) is (folder is not None)
    assert list((tmp_path / "made" / "here").iterdir()) == []
    assert in_files(mapped(parts[2], tmp_path), tmp_path) and mapped(parts[2], None) is parts[2]
    assert mapped(parts[1], tmp_path) is parts[1], "nothing can be mapped"
    strided = np.arange(12.0).reshape(3, 4)[:, ::2]
    assert np.array_equal(mapped(strided, tmp_path), strided)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemFailure, match="file"):
        mapped(np.ones(3), tmp_path / "file")


def test_mapped_arrays_keep_no_file_open(tmp_path: Path) -> None:
    def opened() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    first, before = mapped(np.arange(3), tmp_path), opened()
    found = [mapped(np.full((2, 3), number, np.float16), tmp_path) for number in range(200)]
    assert opened() == before and list(tmp_path.iterdir()) == []
    assert first.tolist() == [0, 1, 2]
    assert all(one.dtype == np.float16 and (one == number).all() for number, one in enumerate(found))
    assert all(in_files(one, tmp_path) for one in found[::50])


def test_layers_that_are_kept_keep_no_file_open(tmp_path: Path) -> None:
    job, kept = Job([1, 2], keep_streams=True), Kept(tmp_path, "0" * 64)
    opened = []
    for layer in range(20):
        job.streams.append(np.full((2, 4, 8), layer, np.float32))
        kept.write(layer, [job], [torch.zeros(2, 4, 8)])
        opened.append(len(list(Path("/proc/self/fd").iterdir())))
    assert len(set(opened)) == 1
    assert [one.max() for one in job.streams] == list(range(20)) and in_files(job.streams[0], tmp_path)


def test_rows_without_values_are_an_empty_array(tmp_path: Path) -> None:
    gathered = Gathered(tmp_path)
    gathered.add(np.ones((0, 3), np.float32))
    assert gathered.array().shape == (0, 3)
