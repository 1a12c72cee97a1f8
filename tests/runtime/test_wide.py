"""Matrices in float32 in memory: values are exact, and the choice is made by memory."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from foldkv.errors import InputError
from foldkv.export.contract.chain import STEP, Bound, Call, ChainTable, Stacked
from foldkv.export.contract.stacks import RowBlocks
from foldkv.progress import BYTES, Progress, _Lines
from foldkv.runtime import Model, wide
from foldkv.runtime.bundle import load_bundle
from foldkv.runtime.chain import ChainModel
from foldkv.runtime.host_memory import available_memory
from foldkv.runtime.weight_files import WeightFiles
from foldkv.validation.inside import GraphChoices

SHAPES = {"wq": (5, 7), "wo": (3, 4)}


def chain(dtype: str) -> ChainTable:
    """Two layers, each with two matrices, whose values lie one after the other."""
    weights: dict[str, dict[str, Bound]] = {}
    at = 0
    for owner in ("layers.0", "layers.1"):
        weights[owner] = {"norm": Bound("file", False, 0, "float32", (2,))}
        for role, shape in SHAPES.items():
            weights[owner][role] = Bound("file", False, at, dtype, shape)
            at += weights[owner][role].bytes
    form = Stacked("a.stacked.onnx", {}, (), {"wq": RowBlocks(5, 2), "wo": RowBlocks(3, 3)}, "a.wide.onnx")
    calls = (Call("layers.0", "a"), Call("layers.1", "a"))
    return ChainTable({STEP: "step.onnx", "a": "a.onnx"}, calls, weights, {"a": form})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_value_is_the_same_in_float32(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(wide, "_PART", 8)  # so that matrices are widened in several parts
    table, files, count = chain(dtype), WeightFiles(), 2 * (5 * 7 + 3 * 4)
    bits = np.random.default_rng(3).integers(0, 1 << 16, count).astype(np.uint16)
    stored = torch.from_numpy(bits.view(np.int16).copy()).view(getattr(torch, dtype))
    files.hold("file", bits.view(np.uint8))
    seen: list[tuple[float, float]] = []
    said: list[str] = []

    class Seen(_Lines):
        def steps(self, part: str, done: float, total: float, unit: str) -> None:
            assert unit == BYTES
            seen.append((done, total))

    wide.widen(table, files, Progress(Seen(said.append)))
    assert said == ["widening 376 B of matrices to float32, in memory"]
    assert wide.wide_bytes(table) == 4 * count and seen[-1] == (4 * count, 4 * count)
    third, at = table.in_stacks(wide=True).weights, 0
    for owner in ("layers.0", "layers.1"):
        for role, shape in SHAPES.items():
            expected = stored[at : at + np.prod(shape)].float().numpy().reshape(shape)
            made = files.view(third[owner][role])
            np.testing.assert_array_equal(made, expected)
            assert made.ctypes.data % 64 == 0
            at += int(np.prod(shape))
        assert third[owner]["norm"] == table.weights[owner]["norm"]


def test_float32_is_taken_where_memory_is_ample(monkeypatch: pytest.MonkeyPatch) -> None:
    table = chain("bfloat16")
    size = wide.wide_bytes(table)
    for free, expected in ((2 * size, True), (2 * size - 1, False), (0, False)):
        monkeypatch.setattr(wide, "available_memory", lambda free=free: free)
        assert wide.takes_float32(table, "auto") is expected
        assert not wide.takes_float32(table, "bfloat16")
    # Where the system does not say, whoever asks gets it.
    assert wide.takes_float32(table, "float32")
    monkeypatch.setattr(wide, "available_memory", lambda: size)
    assert wide.takes_float32(table, "float32")
    monkeypatch.setattr(wide, "available_memory", lambda: 2 * size + 100)
    assert wide.takes_float32(table, "auto", 100) and not wide.takes_float32(table, "auto", 101)
    with pytest.raises(InputError, match="376 B in float32 and the state 500 B, and 852 B of memory are free"):
        wide.takes_float32(table, "float32", 500)
    monkeypatch.setattr(wide, "available_memory", lambda: size - 1)
    with pytest.raises(InputError, match=r"the matrices take 376 B in float32, and 375 B .*`--matrices bfloat16"):
        wide.takes_float32(table, "float32")


@pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc are Linux's")
def test_matrices_are_memory_of_this_process_and_a_lack_of_it_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def anonymous() -> int:
        [line] = [one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("RssAnon")]
        return int(line.split()[1]) << 10

    before, room = anonymous(), wide._room(32 << 20)
    room[:] = 1
    assert anonymous() - before > 24 << 20
    table, files, lines = chain("bfloat16"), WeightFiles(), list[str]()

    def refused(size: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(wide, "_room", refused)
    with pytest.raises(InputError, match=r"gives no 376 B of memory .*Cannot allocate memory.*`--matrices bfloat16`"):
        wide.widen(table, files)
    assert not wide.widen(table, files, lines.append, must=False) and not files._files
    assert lines == [
        "the system gives no 376 B of memory for matrices in float32 ([Errno 12] Cannot allocate memory): they are read in bfloat16"
    ]


@pytest.mark.slow
def test_matrices_in_memory_are_freed_with_the_model_and_shared_by_tools_that_look_inside(large_bundle: Path) -> None:
    model = ChainModel(load_bundle(large_bundle), matrices="float32")
    held = weakref.ref(model.files._files["wide/layers.1"].bytes)
    bound = model.table.weights["layers.1"]["attn.wq_a.weight"]
    inside = GraphChoices(model, [1])
    assert inside._model.files is model.files and inside._model.way == model.way
    assert held() is not None and model.files.view(bound).dtype == np.float32
    expected = inside.chosen(list(range(70)))
    inside.close()
    assert model.files.view(bound).any(), "what it shares is not its to free"
    model.close()
    del inside, model
    gc.collect()
    assert held() is None
    other = ChainModel(load_bundle(large_bundle), matrices="bfloat16")
    inside = GraphChoices(other, [1])
    found = inside.chosen(list(range(70)))
    assert np.array_equal(found[1], expected[1])
    inside.close()
    other.close()


def test_a_small_model_has_no_third_form(tiny_bundle: Path) -> None:
    with Model(tiny_bundle, matrices="float32") as model:
        assert model.matrices == "auto" and model.chain is not None and "matrices" not in model.chain.way


def test_wrong_or_contradicting_choices_are_refused(tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="matrices must be one of 'auto', 'float32', 'bfloat16'; got 'fp8'"):
        Model(tiny_bundle, matrices="fp8")
    with pytest.raises(InputError, match=r"matrices in float32 are made from copies, and place=False .* makes none"):
        Model(tiny_bundle, matrices="float32", place=False)


def test_memory_is_what_the_system_and_the_control_groups_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert available_memory() > 0
    from foldkv.runtime import host_memory

    meminfo, cgroup, groups = tmp_path / "meminfo", tmp_path / "cgroup", tmp_path / "groups"
    meminfo.write_text("MemTotal:       2000 kB\nMemAvailable:       1000 kB\n")
    monkeypatch.setattr(host_memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(host_memory, "_CGROUP", cgroup)
    monkeypatch.setattr(host_memory, "_CGROUPS", groups)
    assert available_memory() == 1000 << 10, "no control groups"
    for name, limit in (("outer", "700000"), ("outer/inner", "max")):
        folder = groups / name
        folder.mkdir(parents=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("500000\n")
        (folder / "memory.stat").write_text("anon 300000\ninactive_file 100000\nactive_file 50000\n")
    cgroup.write_text("0::/outer/inner\n")
    assert available_memory() == 700000 - 500000 + 150000
    (groups / "outer" / "inner" / "memory.high").write_text("600000\n")
    assert available_memory() == 600000 - 500000 + 150000, "beyond it every allocation is slowed down"
    cgroup.write_text("0::/outer\n")
    (groups / "outer" / "memory.max").write_text("100\n")
    assert available_memory() == 0, "more is taken than the limit"
    # Version 1, in a container: the path of the group is not mounted, its own files are at the root.
    (groups / "memory").mkdir()
    (groups / "memory" / "memory.limit_in_bytes").write_text("400000\n")
    (groups / "memory" / "memory.usage_in_bytes").write_text("300000\n")
    (groups / "memory" / "memory.stat").write_text("cache 9\ntotal_inactive_file 1000\ntotal_active_file 500\n")
    cgroup.write_text("4:memory:/docker/0a\n3:cpu,cpuacct:/docker/0a\n0::/\n")
    assert available_memory() == 100000 + 1500
    meminfo.write_text("MemTotal: 2000 kB\n")
    assert available_memory() == 0, "the system does not say"
