"""Weights as engines take them, against ml_dtypes and torch, from bytes that lie anywhere in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foldkv.errors import ArtifactError
from foldkv.export.checkpoint.formats import FP8, Format
from foldkv.export.checkpoint.values import dequantised
from foldkv.export.contract.engine_set import CONVERTED, DEQUANTISED, STORED, WORDS, Taken
from foldkv.export.contract.lock import Part, Weight
from foldkv.runtime.weight_files import WeightFiles
from foldkv.runtime.weight_forms import bfloat16_bits, exact_bfloat16, load_weight

RNG = np.random.default_rng(0)


@pytest.fixture
def stored(tmp_path: Path) -> Any:
    """Store arrays one after the other, from an odd byte on; returns them as weights of a dtype, and the files."""

    def store(*rows: tuple[str, np.ndarray], parts: int = 1) -> tuple[list[Weight], WeightFiles]:
        data, weights = b"x", []
        for dtype, array in rows:
            cut = array.nbytes // parts
            pieces = tuple(Part("f", len(data) + i * cut, cut) for i in range(parts))
            weights.append(Weight(dtype, array.shape, pieces))
            data += array.tobytes()
        (tmp_path / "f").write_bytes(data)
        files = WeightFiles()
        files.open("f", tmp_path / "f")
        return weights, files

    return store


@given(st.lists(st.floats(width=32, allow_nan=True), min_size=1, max_size=50))
def test_float32_is_rounded_to_bfloat16_as_ml_dtypes_rounds(values: list[float]) -> None:
    array = np.array(values, np.float32)
    with np.errstate(over="ignore"):
        want = array.astype(ml_dtypes.bfloat16)
    have = bfloat16_bits(array).view(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(have.astype(np.float32), want.astype(np.float32))


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "I64", "I8"])
def test_what_is_taken_as_stored_has_the_bytes_of_the_file(dtype: str, parts: int, stored: Any) -> None:
    kinds = {
        "BF16": ("bfloat16", 2),
        "F16": ("float16", 2),
        "F32": ("float32", 4),
        "I64": ("int64", 8),
        "I8": ("int8", 1),
    }
    name, item = kinds[dtype]
    bytes_ = RNG.integers(0, 256, (4, 6 * item), np.uint8)
    [weight], files = stored((dtype, bytes_), parts=parts)
    weight = Weight(dtype, (4, 6), weight.parts)
    assert load_weight(Taken(STORED, name, (4, 6)), weight, files).tobytes() == bytes_.tobytes()


@pytest.mark.parametrize(("source", "kind"), [("BF16", ml_dtypes.bfloat16), ("F16", np.float16), ("F32", np.float32)])
@pytest.mark.parametrize("target", ["float32", "bfloat16"])
def test_conversions_have_the_values_of_ml_dtypes(source: str, kind: Any, target: str, stored: Any) -> None:
    values = RNG.normal(0, 100, (5, 7)).astype(kind)
    [weight], files = stored((source, values))
    made = load_weight(Taken(CONVERTED, target, (5, 7)), weight, files)
    want = values.astype(np.float32).astype({"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[target])
    np.testing.assert_array_equal(made.view(want.dtype), want)


@pytest.mark.parametrize("shape", [(256, 128), (200, 96), (1, 7)])
@pytest.mark.parametrize("block", [(128, 128), (32, 32)])
@pytest.mark.parametrize("powers", [True, False])
def test_a_matrix_in_blocks_has_the_values_that_pytorch_gives_it(
    shape: tuple[int, int], block: tuple[int, int], powers: bool, stored: Any
) -> None:
    codes = RNG.integers(0, 256, shape, np.uint8)
    codes[codes & 127 == 127] = 0
    grid = tuple(-(-size // edge) for size, edge in zip(shape, block, strict=True))
    scales = RNG.integers(0, 255, grid).astype(np.uint8) if powers else RNG.random(grid).astype(np.float32)
    [weight, scale], files = stored(("F8_E4M3", codes), ("F8_E8M0" if powers else "F32", scales))
    made = load_weight(Taken(DEQUANTISED, "float32", shape, "s", block), weight, files, scale)
    want = dequantised(
        torch.from_numpy(codes).view(torch.float8_e4m3fn),
        torch.from_numpy(scales).view(torch.float8_e8m0fnu) if powers else torch.from_numpy(scales),
        Format(FP8, block),
    )
    np.testing.assert_array_equal(made, want.numpy())


def test_rows_of_words_have_every_part_at_a_whole_word(stored: Any) -> None:
    rows = RNG.integers(0, 256, (3, 10), np.uint8)
    [weight], files = stored(("I8", rows))
    taken = Taken(WORDS, "int32", (3, 4), spans=((0, 3, 0), (3, 6, 4), (9, 1, 12)))
    made = load_weight(taken, weight, files)
    np.testing.assert_array_equal(made[:, :3], rows[:, :3])
    np.testing.assert_array_equal(made[:, 4:10], rows[:, 3:9])
    np.testing.assert_array_equal(made[:, 12], rows[:, 9])
    assert not made[:, [3, 10, 11, 13, 14, 15]].any()


def test_a_form_that_the_bytes_cannot_have_is_refused(stored: Any) -> None:
    [weight, scale], files = stored(("F8_E4M3", np.zeros((4, 4), np.uint8)), ("F8_E8M0", np.zeros((1, 1), np.uint8)))
    for taken, scales in (
        (Taken(STORED, "float32", (4, 4)), None), (Taken(DEQUANTISED, "float32", (4, 4), "s", (4, 4)), None),
        (Taken(DEQUANTISED, "int8", (4, 4), "s", (4, 4)), scale), (Taken(CONVERTED, "int64", (4, 4)), None),
    ):  # fmt: skip
        with pytest.raises(ArtifactError, match="cannot be taken as"):
            load_weight(taken, weight, files, scales)
    beyond = Weight("F32", (9, 9), (Part("f", 0, 324),))
    with pytest.raises(ArtifactError, match="a weight ends at 324"):
        load_weight(Taken(STORED, "float32", (9, 9)), beyond, files)


@pytest.mark.parametrize("shape", [(256, 256), (130, 200), (3, 5)])
def test_e4m3_in_blocks_is_exact_in_bfloat16(shape: tuple[int, int]) -> None:
    codes = RNG.integers(0, 256, shape, dtype=np.uint8)  # not a number too
    scales = RNG.integers(127 - 100, 127 + 100, (-(-shape[0] // 128), -(-shape[1] // 128)), dtype=np.uint8)
    found = exact_bfloat16(codes, scales, (128, 128)).view(ml_dtypes.bfloat16).astype(np.float32)
    kinds = (torch.float8_e4m3fn, torch.float8_e8m0fnu)
    expected = dequantised(
        *(torch.from_numpy(array).view(kind) for array, kind in zip((codes, scales), kinds, strict=True)),
        Format(FP8, (128, 128)),
    )
    np.testing.assert_array_equal(found, expected.numpy())


def test_what_bfloat16_cannot_hold_is_refused() -> None:
    codes = np.full((1, 1), 0b1111, np.uint8)  # 15/512, with all bits of the mantissa
    assert exact_bfloat16(codes, np.full((1, 1), 10, np.uint8), (128, 128)).size
    with pytest.raises(ValueError, match="too small"):
        exact_bfloat16(codes, np.full((1, 1), 0, np.uint8), (128, 128))
