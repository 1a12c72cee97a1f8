"""Layers that a report saves are run by Polygraphy itself, from the lines that the report gives."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from polygraphy import tools
from polygraphy.comparator import RunResults
from polygraphy.json import load_json
from saved_layers import SavedLayer

from foldkv.export.checkpoint.reader import Checkpoint
from foldkv.export.roles import lock_of, sources_of
from foldkv.runtime import Model
from foldkv.runtime.engine_model import library_logger
from foldkv.runtime.weight_files import WeightFiles
from foldkv.validation.divergence import DIVERGED, Streams
from foldkv.validation.layer_graph import Experts
from foldkv.validation.layer_weights import LayerWeights
from foldkv.validation.reproducers import OUTPUTS, Reproducer, Reproducers
from foldkv.validation.runners import SessionRunner


@pytest.fixture
def polygraphy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str, Path], tuple[int, str]]:
    """Runs a line of a report as its command would, without another process; gives the exit code and what it prints."""

    def run(line: str, folder: Path) -> tuple[int, str]:
        monkeypatch.chdir(folder)
        program, *arguments = shlex.split(line)
        assert program == "polygraphy"
        return tools.main(arguments), capsys.readouterr().out

    return run


@pytest.fixture
def case(tiny_report: Path, tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """The worst case of the tiny report, and a copy of its folder."""
    [row] = json.loads((tiny_report / "report.json").read_text())["reproducers"]
    return row, shutil.copytree(tiny_report / "reproducers" / row["name"], tmp_path / "case")


# Polygraphy asks importlib in a way that it will lose.
@pytest.mark.filterwarnings("ignore:SelectableGroups:DeprecationWarning")
def test_polygraphy_runs_what_a_report_saves_and_finds_damage(
    case: tuple[dict[str, Any], Path], polygraphy: Callable[[str, Path], tuple[int, str]]
) -> None:
    row, folder = case
    run, same, inspect = row["commands"]
    assert (row["name"], row["not_saved"]) == ("worst-case", None) and run in (folder / "README.md").read_text()
    code, said = polygraphy(run, folder)
    assert code == 0 and "PASSED | Output: 'after'" in said, said
    code, said = polygraphy(same, folder)
    assert code == 0 and "PASSED | Output: 'after'" in said, said
    code, said = polygraphy(inspect, folder)
    assert code == 0 and f"{{after [dtype=float32, shape=(1, {row['tokens']}, 4, 128)]}}" in said, said
    # One more weight of the norm before attention: the layer is another one.
    tensor = next(t for t in onnx.load(folder / "segment.onnx", load_external_data=False).graph.initializer
                  if t.name == "attn_norm.weight")  # fmt: skip
    at = {entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"}
    weights = np.memmap(folder / "weights.bin", np.float32, "r+", at["offset"], (at["length"] // 4,))
    weights += 0.5
    weights.flush()
    code, said = polygraphy(run, folder)
    assert code == 1 and "FAILED | Output: 'after'" in said, said


def test_a_case_has_the_subjects_streams_and_the_references(case: tuple[dict[str, Any], Path]) -> None:
    row, folder = case
    [given] = load_json(str(folder / "inputs.json"))
    [(name, [result])] = RunResults.load(str(folder / OUTPUTS)).items()
    [(_, expected)] = result.items()
    assert given.keys() == {"streams"} and given["streams"].shape == expected.shape
    assert name == row["reference"] and name.startswith("transformers") and expected.shape[1] == row["tokens"]
    assert row["atol"] == pytest.approx(DIVERGED * float(np.sqrt(np.mean(expected**2))), rel=1e-6)
    graph = onnx.load(folder / "segment.onnx", load_external_data=False).graph
    assert [value.name for value in graph.input] == ["streams"] and len(graph.output) == 1
    assert all(t.data_location == onnx.TensorProto.EXTERNAL for t in graph.initializer if "weight" in t.name)
    assert row["bytes"] == (folder / "weights.bin").stat().st_size


def save(model: Model, checkpoint: Path, folder: Path, layer: int, **options: Any) -> tuple[Reproducer, Streams]:
    """A case of some layer whose reference is the bundle itself, and its compared outputs."""
    tokens = list(b"It is a text, and it goes on until it ends.")
    with SessionRunner(model, context=64, chunk=64) as runner:
        look = runner.look(tokens)
    streams = look.streams[layer]
    cases = Reproducers(folder, model, Checkpoint(checkpoint), **options)
    errors = np.zeros_like(streams)
    errors[-1] = 1.0
    cases.save(
        f"layer-{layer}", "of a test", layer=layer, tokens=tokens, before=look.before(layer), expected=streams + errors, actual=streams,
        reference="a test",
    )  # fmt: skip
    return cases.rows[0], streams


def is_standard(model: onnx.ModelProto) -> bool:
    """Whether a model has no function and no operator of another domain than that of ONNX."""
    return (
        not model.functions
        and [one.domain for one in model.opset_import] == [""]
        and not any(n.domain for n in model.graph.node)
    )


def check(folder: Path, streams: Streams, *, inside: float = 5e-5) -> onnx.ModelProto:
    """Check that a saved layer is a whole standard model which TensorRT's parser takes, and that it computes what the bundle did."""
    file = folder / "segment.onnx"
    onnx.checker.check_model(str(file), full_check=True)
    layer = SavedLayer.of(folder)
    kept = layer.bundle
    assert layer.apart(kept) < inside * np.sqrt(np.mean(kept**2))
    rows = [int(np.abs(streams - row).max(axis=(1, 2)).argmin()) for row in kept[0]]
    assert rows == sorted(rows) and np.array_equal(streams[rows], kept[0])
    assert refusals(file) == []
    model = onnx.load(file, load_external_data=False)
    assert is_standard(model)
    return model


def refusals(file: Path) -> list[str]:
    """What TensorRT-RTX's parser refuses; it takes no GPU."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    builder = trt.Builder(library_logger(trt))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, library_logger(trt))
    parser.parse_from_file(str(file))
    return [f"{parser.get_error(i).node_name()}: {parser.get_error(i).desc()}" for i in range(parser.num_errors)]


def test_every_kind_of_layer_is_saved_in_operators_that_tensorrt_takes(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with Model(tiny_bundle) as model:
        assert [call.segment for call in model.chain.table.calls[1:4]] == ["sliding-hash", "csa-moe", "hca-moe"]
        for layer in range(3):
            row, streams = save(model, tiny_checkpoint, tmp_path, layer)
            assert row.not_saved is None
            check(tmp_path / "reproducers" / row.name, streams)


def test_large_models_keep_the_experts_of_the_tokens_with_the_largest_errors(
    large_bundle: Path, released_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """A bundle whose experts go to QMoE, and whose matrices are in blocks: what is saved has decoded values."""
    with Model(large_bundle) as model:
        for layer in range(3):
            row, streams = save(model, released_checkpoint("instruct"), tmp_path, layer, largest=700_000)
            folder = tmp_path / "reproducers" / row.name
            made = check(folder, streams)
            [kept] = [one.dims[0] for one in made.graph.initializer if one.name == "experts.w1.stored"]
            count = made.graph.output[0].type.tensor_type.shape.dim[1].dim_value
            assert kept in (2, 3) and 1 <= count < row.tokens == len(streams)
            assert row.bytes < 700_000 + (100 << 10) and f" {row.tokens - 1}\n" in (folder / "README.md").read_text()


def test_packed_rows_are_saved_in_a_type_that_tensorrt_takes_as_a_constant(
    served_bundles: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with Model(served_bundles["fp8+fp4"]) as model:
        row, streams = save(model, tiny_checkpoint, tmp_path, 1)
    made = check(tmp_path / "reproducers" / row.name, streams)
    types = {one.data_type for one in made.graph.initializer}
    types |= {a.i for node in made.graph.node if node.op_type == "Cast" for a in node.attribute}
    narrow = {onnx.TensorProto.BFLOAT16}  # weights
    assert types <= narrow | {
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.INT32,
        onnx.TensorProto.INT64,
        onnx.TensorProto.BOOL,
    }


@pytest.mark.parametrize("form", ["instruct", "base", "bfloat16"])
def test_experts_of_every_form_are_decoded(
    released_checkpoint: Callable[[str], Path], tiny_checkpoint: Path, form: str
) -> None:
    checkpoint = Checkpoint(tiny_checkpoint if form == "bfloat16" else released_checkpoint(form))
    sources, files = sources_of(checkpoint), WeightFiles()
    lock = lock_of(checkpoint, sources)
    for name, facts in lock.files.items():
        files.open(name, checkpoint.folder / name, facts)
    experts = Experts(files, lock.weights["layers.1"], sources["layers.1"])
    w13, w2 = LayerWeights(checkpoint).experts(1, 0, 8)
    numbers = [5, 2]
    found = experts.read(numbers)
    both = np.concatenate([found["w1"], found["w3"]], axis=2).transpose(0, 2, 1)
    assert np.array_equal(both, w13[numbers].numpy()) and np.array_equal(
        found["w2"].transpose(0, 2, 1), w2[numbers].numpy()
    )
    assert experts.bytes == sum(array[0].size for array in found.values()) * 2


def test_what_is_too_large_is_named_and_not_saved(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with Model(tiny_bundle) as model:
        row, _ = save(model, tiny_checkpoint, tmp_path, 1, largest=1000)
    assert row.not_saved is not None and "more than 1000 B" in row.not_saved, row.not_saved
    assert row.commands == () and row.bytes == 0 and not list(tmp_path.iterdir())
