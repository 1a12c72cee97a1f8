"""The ONNX bodies of quantising and packing against rows.py, bit by bit, in ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnxscript import FLOAT, INT8, script
from torch import Tensor

from foldkv.export.contract.rows import FP8_DS_MLA, INDEX_FP4
from foldkv.export.operators.quantize import (
    FoldkvPackFp4,
    FoldkvPackFp8,
    FoldkvQuantizeFp4,
    FoldkvQuantizeFp8,
    FoldkvUnpackFp4,
    FoldkvUnpackFp8,
    quantize_fp4,
    quantize_fp8,
)
from foldkv.export.operators.row_formats import pack, unpack

ROTARY, WIDTH = 16, 128


@script()
def quantize_main(x: FLOAT[...]) -> FLOAT[...]:
    return FoldkvQuantizeFp8(x, rope_dim=16)


@script()
def quantize_index(x: FLOAT[...]) -> FLOAT[...]:
    return FoldkvQuantizeFp4(x)


@script()
def pack_main(x: FLOAT[...]) -> INT8[...]:
    return FoldkvPackFp8(x, rope_dim=16)


@script()
def pack_index(x: FLOAT[...]) -> INT8[...]:
    return FoldkvPackFp4(x)


@script()
def unpack_main(rows: INT8[...]) -> FLOAT[...]:
    return FoldkvUnpackFp8(rows, width=128, rope_dim=16)


@script()
def unpack_index(rows: INT8[...]) -> FLOAT[...]:
    return FoldkvUnpackFp4(rows, width=128)


def run(function: Any, value: Tensor) -> Tensor:
    model = function.to_model_proto()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: value.numpy()})[0])


def bits(value: Tensor) -> Tensor:
    return value.contiguous().view(torch.int32 if value.dtype == torch.float32 else value.dtype)


def hard_rows(width: int = WIDTH) -> Tensor:
    """Rows of all sizes, with zeros of both signs, codes, ties between codes, edges of scales and tiny values."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(400, width, generator=generator) * 10.0 ** torch.randint(-9, 9, (400, 1), generator=generator)
    uneven = torch.where(torch.rand(spread.shape, generator=generator) < 0.3, (spread * 64).round() / 64, spread)
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    known = codes[codes.isfinite()].abs().unique()
    points = torch.cat((known, (known[1:] + known[:-1]) / 2))
    points = torch.cat([points, np_next(points, 9e9), np_next(points, -9e9)])
    points = points[points <= 448]
    ties = torch.zeros(len(points), width)
    ties[:, 0], ties[:, 1], ties[:, width // 2] = 448.0, points, -points
    fp4 = torch.zeros(4000, width)
    fp4[:, 0], fp4[:, 32] = 6.0, 6.0
    fp4[:, 1] = torch.linspace(-6, 6, 4000)
    fp4[:, 33] = (torch.arange(4000) % 49 - 24) / 4
    edges = torch.zeros(300, width)
    powers = torch.exp2(torch.arange(-24, 76).float()).repeat(3)
    edges[:, 3] = powers * torch.tensor([448.0, 6.0, 1.0]).repeat_interleave(100)
    edges = torch.cat((edges, np_next(edges, 0.0), np_next(edges, 3e38)))
    signs = torch.stack((torch.zeros(width), -torch.zeros(width), torch.full((width,), -1e-30)))
    subnormal = torch.full((2, width), 1e-39) * torch.tensor([[1.0], [-1.0]])
    return torch.cat((uneven, ties, fp4, edges, signs, subnormal))


def np_next(value: Tensor, towards: float) -> Tensor:
    return torch.from_numpy(np.nextafter(value.numpy(), np.float32(towards)))


@pytest.mark.parametrize("width", [64, 128])
def test_quantised_rows_are_those_that_packing_gives_back(width: int) -> None:
    values = hard_rows(width)
    main, index = quantize_fp8(values, ROTARY), quantize_fp4(values)
    assert torch.equal(bits(main), bits(unpack(pack(values, FP8_DS_MLA, ROTARY), FP8_DS_MLA, width, ROTARY)))
    assert torch.equal(bits(run(quantize_main, values)), bits(main))
    assert torch.equal(bits(run(quantize_index, values)), bits(index))


def test_rounding_what_was_rounded_changes_nothing() -> None:
    """Where a window plugin packs rows that the graph has rounded: scales may differ, values may not."""
    main, index = quantize_fp8(hard_rows(), ROTARY), quantize_fp4(hard_rows())
    assert torch.equal(bits(quantize_fp8(main, ROTARY)), bits(main))
    assert torch.equal(bits(quantize_fp4(index)), bits(index))
    assert not torch.equal(pack(main, FP8_DS_MLA, ROTARY), pack(hard_rows(), FP8_DS_MLA, ROTARY))


@pytest.mark.parametrize("shape", [(7, WIDTH), (2, 3, WIDTH), (2, 3, 5, WIDTH), (1, WIDTH)])
def test_any_number_of_axes_is_taken(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(run(quantize_main, values), quantize_fp8(values, ROTARY))
    assert torch.equal(run(quantize_index, values), quantize_fp4(values))
    assert torch.equal(run(pack_main, values), pack(values, FP8_DS_MLA, ROTARY))
    assert torch.equal(run(pack_index, values), pack(values, INDEX_FP4))


@pytest.mark.parametrize("width", [64, 128])
def test_packed_bytes_are_those_of_the_definition(width: int) -> None:
    values = hard_rows(width)
    assert torch.equal(run(pack_main, values), pack(values, FP8_DS_MLA, ROTARY))
    assert torch.equal(run(pack_index, values), pack(values, INDEX_FP4))


def test_every_byte_is_read_as_the_definition_reads_it() -> None:
    generator = torch.Generator().manual_seed(2)
    size = pack(torch.zeros(WIDTH), FP8_DS_MLA, ROTARY).shape[-1]
    main = torch.randint(-128, 128, (3000, size), dtype=torch.int8, generator=generator)
    index = torch.randint(-128, 128, (3000, WIDTH // 2 + WIDTH // 32), dtype=torch.int8, generator=generator)
    for function, rows, format_, rope_dim in (
        (unpack_main, main, FP8_DS_MLA, ROTARY), (unpack_index, index, INDEX_FP4, 0),
    ):  # fmt: skip
        read, expected = run(function, rows), unpack(rows, format_, WIDTH, rope_dim)
        assert torch.equal(read.isnan(), expected.isnan())
        assert torch.equal(read.nan_to_num(7.0), expected.nan_to_num(7.0))
