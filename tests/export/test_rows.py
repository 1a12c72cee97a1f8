"""Packed rows against ml_dtypes' own e4m3, e2m1 and bfloat16, and against what their formats promise."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foldkv.errors import InputError
from foldkv.export.contract.rows import DENSE, FP8_DS_MLA, INDEX_FP4, INDEX_FP8, row_format_named
from foldkv.export.operators.row_formats import pack, unpack

FORMATS = [(FP8_DS_MLA, 64), (INDEX_FP8, 0), (INDEX_FP4, 0)]
#: Channels that share a scale, largest code, half a step relative to a value, and half a step at zero.
E4M3, E2M1 = (448.0, 2.0**-4, 2.0**-10), (6.0, 2.0**-2, 0.25)


def tiles(values: np.ndarray, size: int) -> np.ndarray:
    return values.reshape(*values.shape[:-1], -1, size)


def scales(values: np.ndarray, size: int, largest: float) -> np.ndarray:
    """The smallest power of two of every tile that keeps its codes in range, found by trying them in double."""
    reach = np.maximum(np.abs(tiles(values, size)).max(-1), np.float32(1e-4)).astype(np.float64)
    powers = 2.0 ** np.arange(-40, 129)
    return powers[(reach[..., None] > largest * powers).sum(-1)]


def reference(values: Tensor, format_: str, rope_dim: int) -> Tensor:
    """What the rows stand for, by ml_dtypes."""
    data = values.numpy()
    plain = data.shape[-1] - (rope_dim if format_ == FP8_DS_MLA else 0)
    size = {FP8_DS_MLA: 64, INDEX_FP8: plain, INDEX_FP4: 32}[format_]
    kind, largest = (ml_dtypes.float4_e2m1fn, 6.0) if format_ == INDEX_FP4 else (ml_dtypes.float8_e4m3fn, 448.0)
    scale = scales(data[..., :plain], size, largest)[..., None]
    codes = (tiles(data[..., :plain], size) / scale).astype(np.float32).astype(kind)
    read = (codes.astype(np.float64) * scale).reshape(*data.shape[:-1], plain)
    turned = data[..., plain:].astype(ml_dtypes.bfloat16).astype(np.float64)
    return torch.from_numpy(np.concatenate((read, turned), axis=-1))


def uneven(*shape: int) -> Tensor:
    values = torch.randn(*shape) * 10.0 ** torch.randint(-9, 9, (*shape[:-1], 1))
    return torch.where(torch.rand(shape) < 0.2, (values * 64).round() / 64, values)


@pytest.mark.parametrize(("format_", "rope_dim"), FORMATS)
def test_values_are_those_of_ml_dtypes(format_: str, rope_dim: int) -> None:
    torch.manual_seed(0)
    values = uneven(200, 128)
    values[0], values[1] = 0.0, -0.0
    read = unpack(pack(values, format_, rope_dim), format_, 128, rope_dim)
    assert torch.equal(read.double(), reference(values, format_, rope_dim))
    assert torch.equal(read[1].signbit(), torch.ones(128, dtype=torch.bool)), "zeros keep their sign"


@pytest.mark.parametrize("format_", [INDEX_FP8, INDEX_FP4])
def test_every_code_and_every_tie_between_codes(format_: str) -> None:
    kind = ml_dtypes.float4_e2m1fn if format_ == INDEX_FP4 else ml_dtypes.float8_e4m3fn
    codes = np.arange(16 if format_ == INDEX_FP4 else 256, dtype=np.uint8).view(kind).astype(np.float32)
    known = np.unique(codes[np.isfinite(codes)])
    points = np.concatenate((known, (known[1:] + known[:-1]) / 2))
    around = np.concatenate((points, np.nextafter(points, np.float32(9e9)), np.nextafter(points, np.float32(-9e9))))
    around = around[np.abs(around) <= known.max()]
    for value in around:  # one value a row, beside the largest code, which makes the scale one
        row = torch.zeros(32)
        row[0], row[1] = float(known.max()), float(value)
        read = unpack(pack(row, format_), format_, 32)
        assert float(read[1]) == float(np.float32(value).astype(kind))


def test_a_nibble_in_the_lower_half_is_the_even_channel() -> None:
    row = torch.zeros(32)
    row[0], row[1] = 6.0, -1.5
    data = pack(row, INDEX_FP4).view(torch.uint8)
    assert data[0] == 0x7 | (0xB << 4)
    assert data[16] == 127


@pytest.mark.parametrize(("format_", "largest"), [(FP8_DS_MLA, 448.0), (INDEX_FP8, 448.0), (INDEX_FP4, 6.0)])
@pytest.mark.parametrize("power", [-22, -20, -8, -1, 0, 1, 17, 110])
def test_a_scale_is_the_smallest_that_fits(format_: str, largest: float, power: int) -> None:
    edge = np.float32(largest * 2.0**power)
    place = {FP8_DS_MLA: 64, INDEX_FP8: 64, INDEX_FP4: 32}[format_]
    for value, steps in ((edge, 0), (np.nextafter(edge, np.float32(0)), 0), (np.nextafter(edge, np.float32(3e38)), 1)):
        row = torch.zeros(64)
        row[3] = float(value)
        data = pack(row, format_).view(torch.uint8)
        byte = int(data[place]) if format_ != INDEX_FP8 else int(data[64:].view(torch.float32).log2()) + 127
        floor = {448.0: -22, 6.0: -15}[largest]  # of magnitudes counted as 1e-4
        assert byte - 127 == max(power + steps, floor)


@pytest.mark.parametrize(
    ("format_", "width", "rope_dim", "size"),
    [(FP8_DS_MLA, 512, 64, 584), (INDEX_FP8, 128, 64, 132), (INDEX_FP4, 128, 64, 68), (FP8_DS_MLA, 64, 16, 88)],
)
def test_row_sizes(format_: str, width: int, rope_dim: int, size: int) -> None:
    data = pack(torch.randn(3, 5, width), format_, rope_dim)
    assert data.shape == (3, 5, size) and data.dtype == torch.int8
    assert row_format_named(format_).row_bytes(width, rope_dim) == size
    assert row_format_named(DENSE).row_bytes(width, rope_dim) == 2 * width


def test_bytes_without_a_meaning_are_zero() -> None:
    data = pack(torch.full((512,), 3.0), FP8_DS_MLA, 64)
    assert data[448 + 128 + 7 :].eq(0).all() and data[448 + 128 + 6] != 0


def test_channels_that_do_not_fill_a_row_are_refused() -> None:
    for format_, width, rope_dim in ((INDEX_FP4, 48, 0), (FP8_DS_MLA, 15, 2), (FP8_DS_MLA, 16, 32)):
        with pytest.raises(InputError, match="cannot be stored"):
            pack(torch.zeros(width), format_, rope_dim)


rows_of_floats = st.lists(
    st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), min_size=64, max_size=64
).map(torch.tensor)


@pytest.mark.parametrize(("format_", "rope_dim"), [(FP8_DS_MLA, 16), (INDEX_FP8, 0), (INDEX_FP4, 0)])
@given(values=rows_of_floats)
@settings(max_examples=60, deadline=None)
def test_what_was_read_is_packed_to_itself(format_: str, rope_dim: int, values: Tensor) -> None:
    read = unpack(pack(values, format_, rope_dim), format_, 64, rope_dim)
    assert torch.equal(unpack(pack(read, format_, rope_dim), format_, 64, rope_dim), read)


@pytest.mark.parametrize(("format_", "rope_dim"), [(FP8_DS_MLA, 16), (INDEX_FP8, 0), (INDEX_FP4, 0)])
@given(values=rows_of_floats)
@settings(max_examples=60, deadline=None)
def test_the_error_is_half_a_step(format_: str, rope_dim: int, values: Tensor) -> None:
    """Half a step of a value's own code, or of the smallest code, whose scale is below 2 * largest magnitude / largest code."""
    plain = 64 - (rope_dim if format_ == FP8_DS_MLA else 0)
    largest, relative, absolute = E2M1 if format_ == INDEX_FP4 else E4M3
    read = unpack(pack(values, format_, rope_dim), format_, 64, rope_dim).double()
    exact = values.double()
    size = 32 if format_ == INDEX_FP4 else plain
    reach = exact[:plain].abs().unflatten(0, (-1, size)).amax(-1).clamp(min=1e-4).repeat_interleave(size)
    bound = torch.maximum(relative * exact[:plain].abs(), absolute * 2 * reach / largest)
    assert ((read - exact).abs()[:plain] <= bound).all()
    assert ((read - exact).abs()[plain:] <= 2.0**-8 * exact[plain:].abs()).all()


@pytest.mark.parametrize("lead", [(1,), (1, 1), (2, 3)])
@pytest.mark.parametrize(
    ("format_", "width", "rope_dim"), [(FP8_DS_MLA, 32, 8), (INDEX_FP8, 33, 0), (INDEX_FP4, 32, 0)]
)
def test_rows_are_read_at_any_byte(format_: str, width: int, rope_dim: int, lead: tuple[int, ...]) -> None:
    rows = pack(torch.randn(*lead, width), format_, rope_dim)
    longer = torch.zeros(*lead, rows.shape[-1] + 7, dtype=torch.int8)
    longer[..., 3 : 3 + rows.shape[-1]] = rows
    found = unpack(longer[..., 3 : 3 + rows.shape[-1]], format_, width, rope_dim)
    assert torch.equal(found, unpack(rows, format_, width, rope_dim))
