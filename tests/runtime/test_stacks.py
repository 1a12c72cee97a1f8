"""Stacks of experts: made once, whole or not at all, from the checkpoint's own bytes; and what a session computes with them."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from command import run
from safetensors import safe_open

from foldkv.errors import InputError, SystemFailure
from foldkv.export.checkpoint.config_reader import spec_from_file
from foldkv.export.contract.chain import CHAIN, Bound, Call, ChainTable, Stacked, stacks_file
from foldkv.export.contract.lock import LOCK, LockedFile, Part, Weight, WeightsLock
from foldkv.export.contract.stacks import HEADER, Decoded, Stack
from foldkv.export.locate import find_weights
from foldkv.optimize.build import build_bundles
from foldkv.plan_text import Sizes, plan_on_targets
from foldkv.runtime import Model, Session, stacks
from foldkv.runtime.bundle import load_bundle
from foldkv.runtime.stacks import Stacks
from foldkv.runtime.stacks_made import made_here
from foldkv.runtime.weight_files import WeightFiles

EXPERTS, ROWS, WIDTH, LAYERS = 3, 4, 16, 4
FORM = {
    "w13": Stack("codes", (0, 2), "uint8", (EXPERTS, 2 * ROWS, WIDTH)),
    "w2": Stack("codes", (1,), "uint8", (EXPERTS, ROWS, WIDTH)),
    "w13.scales": Stack("scales", (0, 2), "float8e8m0", (EXPERTS, 2 * ROWS, 2)),
    "w2.scales": Stack("scales", (1,), "float8e8m0", (EXPERTS, ROWS, 2)),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stacks of tests are not kept, and small ones are written too."""
    monkeypatch.setenv("FOLDKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stacks, "IN_MEMORY", 0)
    return tmp_path / "cache" / "stacks"


class Source:
    """A checkpoint of two files, with the matrices of its experts in an order of their own."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(seed)
        self.paths = {name: folder / name for name in ("a", "b")}
        for path in self.paths.values():
            path.write_bytes(rng.bytes(1 << 12))
        weights: dict[str, dict[str, Weight]] = {}
        for layer in range(LAYERS):
            file, places = "ab"[layer % 2], iter(np.random.default_rng(layer).permutation(32).tolist())
            roles = {}
            for role, size in (("codes", ROWS * WIDTH), ("scales", ROWS * 2)):
                parts = tuple(Part(file, 64 * next(places), size) for _ in range(3 * EXPERTS))
                roles[role] = Weight("I8", (EXPERTS, 3 * size), parts)
            weights[f"layers.{layer}"] = roles
        self.lock = WeightsLock({name: LockedFile(1 << 12, 8, f"header of {name}") for name in self.paths}, weights)
        calls = tuple(Call(owner, "moe") for owner in weights)
        bounds = {owner: {"codes": Bound("a", False, 0, "int8", (4,))} for owner in weights}
        form = Stacked("segments/moe.stacked.onnx", FORM, ("codes", "scales"))
        self.table = ChainTable({"step": "s", "moe": "m"}, calls, bounds, {"moe": form})

    def stacks(self) -> Stacks:
        return Stacks(self.table, self.lock, self.paths, self.opened())

    def opened(self) -> WeightFiles:
        self.files = WeightFiles()
        for name, path in self.paths.items():
            self.files.open(name, path)
        return self.files

    def expected(self, owner: str, role: str) -> np.ndarray:
        """A stack, from the bytes of the files."""
        stack, weight = FORM[role], self.lock.weights[owner][FORM[role].of]
        found = np.empty(stack.shape, np.uint8)
        for expert in range(EXPERTS):
            for turn, number in enumerate(stack.parts):
                part = weight.parts[3 * expert + number]
                data = self.paths[part.file].read_bytes()[part.offset : part.offset + part.bytes]
                found[expert, turn :: len(stack.parts)] = np.frombuffer(data, np.uint8).reshape(-1, stack.shape[2])
        return found

    def check(self) -> None:
        """What was opened is what the files hold."""
        table = self.table.in_stacks()
        for owner in self.lock.weights:
            for role in FORM:
                assert np.array_equal(self.files.view(table.weights[owner][role]), self.expected(owner, role))


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path / "checkpoint")


def test_stacks_are_the_bytes_of_the_checkpoint_in_another_order(source: Source, own_cache: Path) -> None:
    lines: list[str] = []
    source.stacks().open(lines.append)
    source.check()
    [folder] = [path for path in own_cache.iterdir() if path.is_dir()]
    assert lines == [f"stacking 18.53 KiB of weights in {folder}, once for all bundles of this checkpoint"], (
        "it says what it does, once"
    )
    with safe_open(folder / "layers.2.safetensors", "np") as file:
        assert {role: tuple(file.get_slice(role).get_shape()) for role in file.keys()} == {  # noqa: SIM118 - no dict
            role: stack.shape for role, stack in FORM.items()
        }
    [made] = made_here()
    assert made.bytes == source.stacks().bytes and made.seconds > 0


def test_a_matrix_of_several_blocks_has_the_scale_of_each(tmp_path: Path) -> None:
    rng, (rows, columns) = np.random.default_rng(0), (300, 200)
    codes = rng.integers(0, 0x7F, (rows, columns), dtype=np.uint8)
    scales = np.arange(110, 116, dtype=np.uint8).reshape(3, 2)
    (tmp_path / "f").write_bytes(codes.tobytes() + scales.tobytes())
    parts = {"w": Part("f", 0, codes.size), "w.scale": Part("f", codes.size, scales.size)}
    lock = WeightsLock(
        {"f": LockedFile(codes.size + scales.size, 8, "header")},
        {"head": {"w": Weight("F8_E4M3", codes.shape, (parts["w"],)), "w.scale": Weight("F8_E8M0", scales.shape, (parts["w.scale"],))}},
    )  # fmt: skip
    form = Stacked("head.onnx", {"w": Decoded("w", "w.scale", (128, 128), (rows, columns))}, ("w", "w.scale"))
    table = ChainTable({"step": "s", "head": "h"}, (Call("head", "head"),), {"head": {}}, {"head": form})
    files = WeightFiles()
    files.open("f", tmp_path / "f")
    Stacks(table, lock, {"f": tmp_path / "f"}, files).open()
    found = (files.view(table.in_stacks().weights["head"]["w"]).astype(np.uint32) << 16).view(np.float32)
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).double().numpy()
    for row, column in np.ndindex(3, 2):
        block = (slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128))
        assert np.array_equal(found[block], expected[block] * 2.0 ** (int(scales[row, column]) - 127))


def test_a_plan_says_what_they_take_by_those_that_were_made_here(source: Source) -> None:
    spec = spec_from_file(Path(__file__).parents[1] / "data" / "deepseek-v4-flash.json")

    def planned() -> tuple[dict[str, Any], str]:
        said = plan_on_targets(
            spec, "fp4", ["cpu"], Sizes(4096, 1, 4096), None, chunk=1, profile="hf", plugins=None, max_context=False
        )
        [row] = [line for line in said.lines if line.startswith("first run, cpu")]
        return said.facts["targets"][0], row

    facts, row = planned()
    assert facts["stacking_seconds"] == {"estimate": True, "seconds": round(facts["stacked"] / 0.5e9, 1), "runs": 0}
    assert "147.97 GiB" in row and "nothing was stacked here yet" in row
    source.stacks().open()
    [made] = made_here()
    facts, row = planned()
    seconds = round(facts["stacked"] / (made.bytes / made.seconds), 1)
    assert facts["stacking_seconds"] == {"estimate": True, "seconds": seconds, "runs": 1}
    assert "estimate from 1 run on this machine" in row


def test_small_ones_are_made_in_memory(source: Source, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "IN_MEMORY", source.stacks().bytes)
    source.stacks().open()
    source.check()
    assert not own_cache.exists()


def test_all_bundles_of_a_checkpoint_share_them(source: Source, own_cache: Path) -> None:
    source.stacks().open()
    before = times(own_cache)
    lines: list[str] = []
    other = Source.__new__(Source)
    other.__dict__ |= vars(source)
    other.stacks().open(lines.append)
    other.check()
    assert times(own_cache) == before and not lines


def test_equal_headers_do_not_make_equal_weights(source: Source, tmp_path: Path, own_cache: Path) -> None:
    other = Source(tmp_path / "other", seed=1)
    assert other.lock == source.lock
    for one in (source, other):
        one.stacks().open()
        one.check()
    assert len(folders(own_cache)) == 2


def test_a_writer_that_was_killed_is_continued(source: Source, own_cache: Path) -> None:
    child = os.fork()
    if not child:
        write, count = os.fsync, 0

        def kill(descriptor: int) -> None:
            nonlocal count
            count += 1
            if count == 3:
                os._exit(9)
            write(descriptor)

        stacks._JOBS, os.fsync = 1, kill
        source.stacks().open()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    made = source.stacks()
    assert made.missing() == ["layers.2", "layers.3"]
    assert (made.folder / "layers.2.safetensors.part").exists()
    before = times(own_cache)
    made.open()
    source.check()
    after = times(own_cache)
    kept = [name for name in before if name.endswith(("layers.0.safetensors", "layers.1.safetensors"))]
    assert len(kept) == 2 and all(before[name] == after[name] for name in kept)
    assert not list(made.folder.glob("*.part")) and not made.missing()
    assert made_here() == [], "half a run is no measure"


def test_processes_do_not_write_the_same_files(source: Source, own_cache: Path) -> None:
    def slowly(owner: str, *rest: Any) -> None:
        time.sleep(0.1)
        write(owner, *rest)

    children = []
    for _ in range(2):
        if child := os.fork():
            children.append(child)
            continue
        lines: list[str] = []
        made = source.stacks()
        write, made._write_one = made._write_one, slowly  # type: ignore[method-assign]
        made.open(lines.append)
        source.check()
        os._exit(10 + sum("stacking" in line for line in lines))
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    assert codes == [10, 11], "one of them makes them, and the other finds them"


@pytest.mark.parametrize("damage", ["cut", "header", "removed"])
def test_what_is_not_whole_is_made_again(source: Source, damage: str) -> None:
    made = source.stacks()
    made.open()
    path = made.path("layers.1")
    content = bytearray(path.read_bytes())
    content[content.index(b'"w2"') + 1] ^= 1
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(bytes(content) if damage == "header" else bytes(content[:-1]))
    assert made.missing() == ["layers.1"]
    source.stacks().open()
    source.check()
    assert not made.missing() and len(made.verify()) == LAYERS


def test_a_flipped_bit_is_found_when_all_is_read(source: Source) -> None:
    made = source.stacks()
    made.open()
    path = made.path("layers.1")
    content = bytearray(path.read_bytes())
    content[HEADER + 100] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match=rf"1 found.*\n.*{path} has sha256 .*; its header says .*\nDelete these files"):
        made.verify()
    path.unlink()
    assert len(made.verify()) == LAYERS - 1


def test_a_disk_without_room_is_refused_before_anything_is_written(
    source: Source, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "free_bytes", lambda folder: 1000)
    with pytest.raises(InputError, match=r"take 18.53 KiB; .*stacks has 1000 B of room.*FOLDKV_CACHE.*--no-place"):
        source.stacks().open()
    assert not list(own_cache.rglob("*.safetensors*"))


def test_a_disk_that_becomes_full_leaves_whole_layers(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    made = source.stacks()
    with pytest.raises(SystemFailure, match=r"No space left(.|\n)*FOLDKV_CACHE") as caught:
        made.open()
    assert caught.value.reason == "ENOSPC" and len(made.missing()) == LAYERS
    assert not list(made.folder.glob("*.part"))


def test_a_cache_that_cannot_be_written_is_one_error(source: Source, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(SystemFailure, match=r"cache.*Let FOLDKV_CACHE name a folder.*--no-place"):
        source.stacks().open()


def test_stacks_of_a_checkpoint_that_was_written_again_are_removed(
    source: Source, tmp_path: Path, own_cache: Path
) -> None:
    other = Source(tmp_path / "other", seed=1)
    for one in (source, other):
        one.stacks().open()
    away = Source(tmp_path / "away", seed=2)
    away.stacks().open()
    shutil.rmtree(tmp_path / "away")  # a disk that is not there now
    old, kept = source.stacks().folder, {other.stacks().folder.name, *folders(own_cache)}
    again = Source(tmp_path / "checkpoint", seed=3)
    lines: list[str] = []
    again.stacks().open(lines.append)
    again.check()
    assert f"removing {old}: its checkpoint was written again" in lines
    assert folders(own_cache) == (kept - {old.name}) | {again.stacks().folder.name}


def folders(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if path.is_dir()}


def times(cache: Path) -> dict[str, int]:
    return {
        str(path): path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"
    }


@pytest.fixture(scope="module")
def bundle(released_graph: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model with experts in e2m1: layers with a table of experts and with a router."""
    report = build_bundles(released_graph("instruct"), tmp_path_factory.mktemp("instruct"), ["cpu"])
    assert report.exit_code == 0
    return report.results[0].folder


@pytest.mark.slow
def test_a_session_computes_the_same_with_stacks_and_without(bundle: Path, own_cache: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 256, 150).tolist()
    logits = {}
    for place in (True, False):
        with Session(bundle, context=256, chunk=64, place=place) as session:
            table = session.model._loaded.table  # type: ignore[attr-defined]
            taken = {
                role
                for roles in table.weights.values()
                for role in roles
                if ".experts." in role and "shared" not in role
            }
            assert taken == (
                {f"ffn.experts.{one}.{kind}" for one in ("w13", "w2") for kind in ("codes", "scales")} if place
                else {"ffn.experts.codes", "ffn.experts.scales", "ffn.experts.slots"}
            )  # fmt: skip
            rows = [session.prefill([tokens])[0]]
            rows += [session.decode([token])[0] for token in tokens[:12]]
            logits[place] = np.array(rows)
            assert session.ready()
            for path in own_cache.rglob("layers.1.safetensors"):
                os.utime(path)
                assert session.not_ready() == ((f"{path} was written again",) if place else ())
    spread = float(logits[False].std())
    assert np.abs(logits[True] - logits[False]).max() < 1e-4 * spread


@pytest.mark.slow
def test_stacks_of_a_real_checkpoint_give_back_its_bytes(bundle: Path, own_cache: Path) -> None:
    with Model(bundle):
        pass
    lock, loaded = WeightsLock.read(bundle / LOCK), load_bundle(bundle)
    files = find_weights(bundle, lock, loaded.manifest.inputs.checkpoint)
    table = ChainTable.read(bundle / CHAIN)
    [folder] = [path for path in own_cache.iterdir() if path.is_dir()]
    compared = 0
    for call in table.calls:
        if call.segment not in table.stacked:
            continue
        with safe_open(folder / f"{call.owner}.safetensors", "np") as found:
            for kind in ("codes", "scales"):
                both = raw(folder / f"{call.owner}.safetensors", table, call, f"ffn.experts.w13.{kind}")
                down = raw(folder / f"{call.owner}.safetensors", table, call, f"ffn.experts.w2.{kind}")
                assert f"ffn.experts.w13.{kind}" in found.keys()  # noqa: SIM118 - no dict
                parts = iter(lock.weights[call.owner][f"ffn.experts.{kind}"].parts)
                for expert in range(len(both)):
                    for matrix in (both[expert, 0::2], down[expert], both[expert, 1::2]):
                        part = next(parts)
                        with files[part.file].open("rb") as file:
                            file.seek(part.offset)
                            assert file.read(part.bytes) == matrix.tobytes()
                        compared += 1
                assert next(parts, None) is None
    assert compared == 4 * 2 * 8 * 3, "layers, codes and scales, experts, matrices"


def raw(path: Path, table: ChainTable, call: Call, role: str) -> np.ndarray:
    """A stack of a file, at the place that the table gives."""
    bound = table.in_stacks().weights[call.owner][role]
    assert bound.file == stacks_file(call.owner)
    return np.fromfile(path, np.uint8, bound.bytes, offset=bound.offset).reshape(bound.shape)


@pytest.mark.slow
def test_verify_reads_them_and_names_a_damaged_one(bundle: Path, own_cache: Path) -> None:
    with Model(bundle):
        pass
    code, out, err = run("verify", bundle)
    assert code == 0 and out.count("4 files with stacks in") == 1
    path = next(own_cache.rglob("layers.2.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    code, out, err = run("verify", bundle)
    assert code == 2 and str(path) in err and "Traceback" not in err


@pytest.mark.slow
def test_an_older_onnx_runtime_reads_the_experts_where_they_lie(
    bundle: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.31.2")
    lines: list[str] = []
    with Session(bundle, context=64, progress=lines.append) as session:
        assert np.isfinite(session.prefill([[1, 2, 3]])).all()
    assert not own_cache.exists() and ["1.31.2" in line and "1.32" in line for line in lines] == [True]


@pytest.mark.slow
def test_the_command_line_can_do_without_them(bundle: Path, own_cache: Path) -> None:
    code, out, err = run("generate", bundle, "def f(", "-n", "4", "--no-place")
    assert code == 0 and out.strip(), err
    assert not own_cache.exists()
