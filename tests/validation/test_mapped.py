"""Arrays in files without a name: their values, where they are, and what is left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mappings import in_files

from foldkv.errors import SystemFailure
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
