"""Graph packages: one path for every form of weights, segments that depend on no value, and a lock that says where each lies."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import random_checkpoint, sparse_checkpoint
from safetensors.torch import load_file, save_file

from foldkv.artifact import read_manifest, verify_files
from foldkv.errors import ArtifactError, CheckpointError, InputError
from foldkv.export.checkpoint.reader import Checkpoint
from foldkv.export.contract.chain import CHAIN, ChainTable
from foldkv.export.contract.lock import WeightsLock
from foldkv.export.loading import decoder_from_checkpoint
from foldkv.export.model.decoder import new_state
from foldkv.export.package import KIND, export_checkpoint, read_package
from foldkv.export.roles import sources_of
from foldkv.optimize.build import build_bundles
from foldkv.runtime import Session

pytestmark = pytest.mark.slow

DATA = Path(__file__).parents[1] / "data"
FORMS = ("plain", "instruct", "base", "float16", "float32", "mixed", "stacked")
TOKENS = np.random.default_rng(3).integers(0, 256, 60).tolist()


def small_config(tiny: Path) -> dict[str, Any]:
    """Three layers, one of each kind."""
    config: dict[str, Any] = json.loads((tiny / "config.json").read_text())
    return config | {
        "num_hidden_layers": 3, "layer_types": config["layer_types"][:3], "mlp_layer_types": config["mlp_layer_types"][:3],
    }  # fmt: skip


def changed_tensors(folder: Path, change: Any) -> None:
    table: dict[str, str] = {}
    for file in folder.glob("*.safetensors"):
        tensors = change(load_file(file))
        save_file({name: value.contiguous() for name, value in tensors.items()}, file)
        table |= dict.fromkeys(tensors, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


def of_form(tiny: Path, out: Path, form: str, seed: int = 0) -> Path:
    """A random checkpoint of three layers in one of the forms that are read."""
    base = form if form in ("plain", "instruct", "base") else "instruct" if form == "mixed" else "plain"
    folder = random_checkpoint(small_config(tiny), out, base, seed)

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if form in ("float16", "float32"):
            dtype = getattr(torch, form)
            return {n: v.to(dtype) if v.is_floating_point() and v.dim() > 1 else v for n, v in tensors.items()}
        if form == "mixed":  # the experts of one layer were fine-tuned
            wide = {}
            for name, value in tensors.items():
                if re.match(r"layers\.1\.ffn\.experts\.\d+\.w\d\.scale", name):
                    continue
                if re.match(r"layers\.1\.ffn\.experts\.", name):
                    value = (torch.randn(value.shape[0], 2 * value.shape[1]) * 0.1).to(torch.bfloat16)
                wide[name] = value
            return wide
        if form == "stacked":  # as transformers saves experts
            names = [n for n in tensors if re.match(r"layers\.\d+\.ffn\.experts\.\d+\.w1\.weight", n)]
            rest = {n: v for n, v in tensors.items() if ".ffn.experts." not in n}
            for prefix in {n.rsplit(".", 3)[0] for n in names}:
                parts = [[tensors[f"{prefix}.{e}.{p}.weight"] for e in range(8)] for p in ("w1", "w3", "w2")]
                module = f"model.{prefix.replace('.ffn.', '.mlp.')}"
                rest[f"{module}.gate_up_proj"] = torch.cat([torch.stack(parts[0]), torch.stack(parts[1])], 1)
                rest[f"{module}.down_proj"] = torch.stack(parts[2])
            return rest
        return tensors

    if form != base:
        changed_tensors(folder, change)
    return folder


def expected_logits(checkpoint: Path) -> np.ndarray:
    """What the decoder in PyTorch computes with the dequantised weights."""
    decoder = decoder_from_checkpoint(Checkpoint(checkpoint))
    count = len(TOKENS)
    with torch.no_grad():
        logits, _ = decoder(
            torch.tensor([TOKENS]), torch.zeros(1, dtype=torch.int32), torch.tensor([count], dtype=torch.int32),
            torch.tensor([count]), torch.arange(count)[None], new_state(decoder.spec, count),
        )  # fmt: skip
    result: np.ndarray = logits[0].numpy()
    return result


def bundle_logits(bundle: Path, **options: Any) -> np.ndarray:
    with Session(bundle, context=64, chunk=23, threads=1, **options) as session:
        return session.forward([TOKENS], logits="all")[0]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_weights_is_exported_by_one_path_and_computes_what_pytorch_does(
    tiny_checkpoint: Path, tmp_path: Path, form: str
) -> None:
    checkpoint = of_form(tiny_checkpoint, tmp_path / "checkpoint", form)
    before = {path.name: path.stat().st_mtime_ns for path in checkpoint.iterdir()}
    graph = export_checkpoint(checkpoint, tmp_path / "graph")
    manifest = read_manifest(graph, kind=KIND)
    verify_files(graph, manifest)
    assert not list(graph.rglob("*.bin")) and not list(graph.rglob("*.safetensors")), "no weight is copied"
    package = read_package(graph)
    headers = Checkpoint(checkpoint).headers
    assert package.lock.bytes == sum(header.bytes for header in headers.values()), "every byte, once"
    assert {part.file for _, _, weight in package.lock for part in weight.parts} == package.lock.files.keys()
    expected = expected_logits(checkpoint)
    places = (True, False) if form in ("plain", "instruct") else (True,)
    for place in places:
        [result] = build_bundles(graph, tmp_path / str(place), ["cpu"], place=place).results
        assert result.status == "built", result.reason
        stacked = ChainTable.read(result.folder / CHAIN).stacked
        assert bool(stacked) is (place and form in ("instruct", "mixed")), "a second form for experts in e2m1"
        for second in (True, False) if stacked else (True,):
            np.testing.assert_allclose(bundle_logits(result.folder, place=second), expected, atol=2e-4, rtol=0)
        placed = (result.folder / "placed.bin").stat().st_size
        assert placed > 3e5 if place or form == "plain" else placed < 1e5
    assert before == {path.name: path.stat().st_mtime_ns for path in checkpoint.iterdir()}


@pytest.fixture(scope="module")
def released(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint in the released format and its package."""
    folder = tmp_path_factory.mktemp("released")
    checkpoint = of_form(tiny_checkpoint, folder / "checkpoint", "instruct")
    return checkpoint, export_checkpoint(checkpoint, folder / "graph")


def segments(graph: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((graph / "segments").iterdir())}


def test_segments_do_not_depend_on_any_value_or_on_how_files_are_cut(
    released: tuple[Path, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint, graph = released
    other = of_form(tiny_checkpoint, tmp_path / "other", "instruct", seed=1)
    assert segments(export_checkpoint(other, tmp_path / "graph")) == segments(graph)
    # Experts over several files, in another order.
    cut = shutil.copytree(checkpoint, tmp_path / "cut")
    tensors: dict[str, torch.Tensor] = {}
    for file in cut.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    table = {}
    numbers = dict(zip(sorted(tensors), np.random.default_rng(0).integers(0, 4, len(tensors)), strict=True))
    for number in range(4):
        part = {name: value for name, value in tensors.items() if numbers[name] == number}
        save_file(part, cut / f"part-{number}.safetensors")
        table |= dict.fromkeys(part, f"part-{number}.safetensors")
    (cut / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    again = export_checkpoint(cut, tmp_path / "again")
    assert segments(again) == segments(graph)
    assert len({part.file for part in read_package(again).lock.weights["layers.1"]["ffn.experts.codes"].parts}) == 4
    found: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for package in (graph, again):
        [result] = build_bundles(package, tmp_path / package.parent.name / package.name / "b", ["cpu"]).results
        assert result.status == "built", result.reason
        for place, logits in found.items():
            logits.append(bundle_logits(result.folder, place=place))
    for one, other in found.values():
        np.testing.assert_array_equal(one, other)


def test_an_export_is_reproducible(released: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, graph = released
    again = export_checkpoint(checkpoint, tmp_path / "graph")
    assert read_manifest(again, kind=KIND) == read_manifest(graph, kind=KIND)


def test_checkpoint_package_and_bundle_can_be_moved(released: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, graph = (shutil.copytree(path, tmp_path / name) for path, name in zip(released, "cg", strict=True))
    [result] = build_bundles(graph, tmp_path / "b", ["cpu"], weights_from=checkpoint).results
    expected = bundle_logits(result.folder)
    moved = checkpoint.rename(tmp_path / "moved")
    bundle = shutil.move(result.folder, tmp_path / "bundle")
    np.testing.assert_array_equal(bundle_logits(bundle, weights_from=moved), expected)
    manifest = json.loads((Path(bundle) / "manifest.json").read_text())
    manifest["inputs"]["checkpoint"]["path"] = str(tmp_path / "nowhere")
    (Path(bundle) / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"weights are missing(.|\n)*--weights-from"):
        bundle_logits(bundle)
    with pytest.raises(InputError, match="weights are missing"):
        build_bundles(graph, tmp_path / "c", ["cpu"], weights_from=tmp_path / "nowhere")
    assert not (tmp_path / "c").exists()


def edited(graph: Path, out: Path, change: Any) -> Path:
    shutil.copytree(graph, out)
    manifest = json.loads((out / "manifest.json").read_text())
    change(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


def test_a_table_of_layers_that_does_not_fit_the_lock_is_refused(released: tuple[Path, Path], tmp_path: Path) -> None:
    _, graph = released
    for number, (change, finding) in enumerate([
        (lambda m: m["layers"].reverse(), "takes other weights than the lock"),
        (lambda m: m["layers"].pop(), "the table has 2 layers; the model has 3"),
        (lambda m: m.update(layers=["x", *m["layers"][1:]]), "'x', which does not exist"),
        (lambda m: m["state"].pop(), "has the state"),
        (lambda m: m.pop("segments"), r"older form, without segments.*foldkv export"),
    ]):  # fmt: skip
        with pytest.raises(ArtifactError, match=finding):
            read_package(edited(graph, tmp_path / str(number), change))


def test_forms_that_no_graph_reads_are_all_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = of_form(tiny_checkpoint, tmp_path / "checkpoint", "plain")

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name in ("layers.0.ffn.experts.3.w2.weight", "layers.2.ffn.experts.0.w1.weight"):
            if name in tensors:
                tensors[name] = tensors[name].to(torch.float32)
        return tensors

    changed_tensors(folder, change)
    with pytest.raises(CheckpointError, match="2 found") as caught:
        sources_of(Checkpoint(folder))
    assert "layers.0.ffn.experts have several dtypes: BF16, F32" in str(caught.value)


def test_a_full_size_checkpoint_is_exported_without_reading_a_weight(tmp_path: Path) -> None:
    folder = sparse_checkpoint(DATA / "deepseek-v4-pro.json", tmp_path / "checkpoint")
    code = (
        "import resource, sys; from pathlib import Path; from foldkv.export.package import export_checkpoint\n"
        "export_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "read = int(next(l for l in open('/proc/self/io') if l.startswith('rchar')).split()[1])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, read)"
    )
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path / "graph")], capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak, read = map(int, found.stdout.split()[-2:])
    size = sum(path.stat().st_size for path in (tmp_path / "graph").rglob("*") if path.is_file())
    seconds = after.ru_utime + after.ru_stime - start.ru_utime - start.ru_stime
    assert peak < 1.5 * 2**30 and size < 20 * 2**20 and seconds < 120, (peak, size, seconds)
    headers = sum(
        facts.header_bytes for facts in WeightsLock.read(tmp_path / "graph" / "weights.lock.json").files.values()
    )
    assert read < headers * 3 + (1 << 30), "no weight is read"
