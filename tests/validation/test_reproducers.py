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

from foldkv.runtime import Model
from foldkv.validation.divergence import DIVERGED
from foldkv.validation.reproducers import OUTPUTS, Reproducers


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
    run, inspect = row["commands"]
    assert (row["name"], row["not_saved"]) == ("worst-case", None) and run in (folder / "README.md").read_text()
    code, said = polygraphy(run, folder)
    assert code == 0 and "PASSED | Output: 'after'" in said, said
    code, said = polygraphy(inspect, folder)
    assert code == 0 and "{after [dtype=float32, shape=('batch', 'chunk', 4, 128)]}" in said, said
    # One more weight of the norm before attention: the layer is another one.
    tensor = next(t for t in onnx.load(folder / "segment.onnx", load_external_data=False).graph.initializer
                  if t.name == "attn_norm.weight")  # fmt: skip
    at = {entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"}
    weights = np.memmap(folder / "weights.bin", np.float32, "r+", at["offset"], (at["length"] // 4,))
    weights += 0.5
    weights.flush()
    code, said = polygraphy(run, folder)
    assert code == 1 and "FAILED | Output: 'after'" in said, said


def test_a_case_has_the_subjects_streams_and_the_references(
    case: tuple[dict[str, Any], Path], tiny_bundle: Path
) -> None:
    row, folder = case
    [given] = load_json(str(folder / "inputs.json"))
    [(name, [result])] = RunResults.load(str(folder / OUTPUTS)).items()
    [(_, expected)] = result.items()
    streams = given["streams"]
    assert name == row["reference"] and name.startswith("transformers")
    assert streams.shape == expected.shape and streams.shape[:2] == (1, row["tokens"])
    assert row["atol"] == pytest.approx(DIVERGED * float(np.sqrt(np.mean(expected**2))), rel=1e-6)
    assert given["input_ids"].shape == (1, row["tokens"]) and int(given["num_tokens"][0]) == row["tokens"]
    graph = onnx.load(folder / "segment.onnx", load_external_data=False).graph
    assert {value.name for value in graph.input} == given.keys() and len(graph.output) == 1
    assert all(t.data_location == onnx.TensorProto.EXTERNAL for t in graph.initializer if "weight" in t.name)


def test_what_is_too_large_is_named_and_not_saved(tiny_bundle: Path, tmp_path: Path) -> None:
    streams = np.ones((3, 4, 128), np.float32)
    with Model(tiny_bundle) as model:
        cases = Reproducers(tmp_path, model, largest=1000)
        cases.save(
            "large", "of a test", layer=1, tokens=[1, 2, 3], before=streams, expected=streams, reference="a test"
        )
    [row] = cases.rows
    assert row.not_saved is not None and "more than 1000 B" in row.not_saved, row.not_saved
    assert row.commands == () and row.bytes > 1000 and not list(tmp_path.iterdir())
