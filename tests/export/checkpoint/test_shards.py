"""Headers of safetensors files: what the library writes is read alike, what lies is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from foldkv.export.checkpoint.shards import read_shard
from foldkv.export.checkpoint.values import read_tensor

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.arange(5, dtype=torch.int8),
    "c": torch.ones(2, 0), "d": torch.tensor(3.0, dtype=torch.bfloat16), "e": torch.ones(3, 3).to(torch.float8_e4m3fn),
    "f": torch.ones(2).to(torch.float8_e8m0fnu), "g": torch.arange(4),
}  # fmt: skip


def test_what_safetensors_writes_is_read_back(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    shard, problems = read_shard(tmp_path / "x.safetensors")
    assert problems == []
    assert shard.tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        read = read_tensor(shard.tensors[name])
        assert read.dtype == value.dtype and read.shape == value.shape
        assert read.reshape(-1).view(torch.uint8).tolist() == value.reshape(-1).view(torch.uint8).tolist()


def write(path: Path, header: Any, data: int) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return path


def entry(start: int = 0, end: int = 4, dtype: Any = "F32", shape: Any = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "data", "finding"),
    [
        ({"a": entry()}, 3, "has 93 bytes|its header describes"),
        ({"a": entry()}, 5, "its header describes"),
        ({"a": entry(), "b": entry(2, 6)}, 6, "tensor b starts at byte"),
        ({"a": entry(), "b": entry(8, 12)}, 12, "tensor b starts at byte"),
        ({"a": entry(0, 8)}, 8, r"has 8 bytes; F32 \[1\] takes 4"),
        ({"a": entry(-4, 0)}, 4, "has offsets"),
        ({"a": entry(shape=(-1,))}, 4, "has shape"),
        ({"a": entry(shape=7)}, 4, "has shape"),
        ({"a": entry(shape=(True,))}, 4, "has shape"),
        ({"a": entry(dtype="X9")}, 4, "has dtype 'X9'"),
        ({"a": [1]}, 4, r"is \[1\]"),
        ([1], 4, "not a JSON object"),
        (b"{", 4, "is not JSON"),
        (b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), 4, "names tensor a twice"),
        (b"[" * 100_000, 4, "is not JSON"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any, data: int, finding: str) -> None:
    _, problems = read_shard(write(tmp_path / "x.safetensors", header, data))
    assert problems and pytest.importorskip("re").search(finding, problems[0])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_refused_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    path.write_bytes(content)
    shard, problems = read_shard(path)
    if not problems:  # what is accepted lies inside the file, and safetensors accepts it too or cannot name a dtype
        assert all(t.offset + t.bytes <= len(content) for t in shard.tensors.values())
        try:
            with safe_open(path, framework="pt") as file:
                assert set(file.keys()) == shard.tensors.keys()
        except (SafetensorError, UnicodeDecodeError):
            pass
