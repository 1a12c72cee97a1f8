"""The plot: the figures that it draws, that it needs no network, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from foldkv.errors import InputError
from foldkv.export.checkpoint.config_reader import spec_from_file
from foldkv.export.contract.geometry import ModelSpec
from foldkv.export.memory import plan_memory
from foldkv.export.plot import CONTEXTS, memory_curves, released_specs, write_plot

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def tiny(tiny_checkpoint: Path) -> ModelSpec:
    return spec_from_file(tiny_checkpoint)


def test_the_curves_are_the_planners_figures(tiny: ModelSpec) -> None:
    curves = {curve.name: dict(curve.points) for curve in memory_curves({"tiny": tiny}, batch=3, layout="fp8")}
    assert list(curves) == ["V4-Flash", "V4-Pro", "tiny", "V3.2 (fp8)"]
    for name, spec in {**released_specs(), "tiny": tiny}.items():
        assert curves[name] == {c: plan_memory(spec, context=c, batch=3, layout="fp8").total for c in CONTEXTS}
    assert curves["V3.2 (fp8)"][1 << 20] == 3 * (1 << 20) * 61 * (656 + 132)


def test_a_model_that_is_drawn_already_is_drawn_once() -> None:
    again = memory_curves({"again": released_specs()["V4-Flash"]}, batch=1, layout="fp8+fp4")
    assert [curve.name for curve in again] == ["V4-Flash", "V4-Pro", "V3.2 (fp8)"]


def test_a_picture_is_whole_and_higher_means_more(tiny: ModelSpec, tmp_path: Path) -> None:
    path = tmp_path / "plot.svg"
    write_plot(
        path, {"<tiny & co>": tiny}, batch=1, layout="fp8+fp4", limits={"a": 1 << 33, "b": 1 << 33, "c": 1 << 38}
    )
    root = ElementTree.fromstring(path.read_text())
    texts = [text.text or "" for text in root.iter(f"{SVG}text")]
    assert any(text.startswith("<tiny & co>") for text in texts)
    assert "one a or b: 8 GiB" in texts and "one c: 256 GiB" in texts
    lines = [line.get("points", "") for line in root.iter(f"{SVG}polyline")]
    assert len(lines) == 4
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    for line in lines:
        places = [tuple(map(float, place.split(","))) for place in line.split()]
        assert len(places) == len(CONTEXTS)
        assert all(0 < x < width and 0 < y < height for x, y in places)
        assert places == sorted(places, key=lambda place: (place[0], -place[1]))  # to the right and upwards


@pytest.mark.parametrize("suffix", [".html", ".svg"])
def test_nothing_comes_from_the_network(tiny: ModelSpec, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"plot{suffix}"
    write_plot(path, {"tiny": tiny}, batch=1, layout="bf16")
    text = path.read_text()
    # The name of SVG's namespace is no address that anything fetches; a page does not need it.
    allowed = {'"http://www.w3.org/2000/svg"'} if suffix == ".svg" else set()
    assert set(re.findall(r'"?\w+://[^\s"]*"?', text)) == allowed
    assert not re.search(r"<(script|link|img|iframe|object|use|image)\b|@import|url\(|\bsrc=|href=", text)


@pytest.mark.parametrize(
    ("name", "finding"), [("x.png", "ends in '.png'"), ("x", "ends in 'nothing'"), ("no/x.svg", "cannot be written")]
)
def test_a_file_that_cannot_be_is_refused(tmp_path: Path, name: str, finding: str) -> None:
    with pytest.raises(InputError, match=finding):
        write_plot(tmp_path / name, {}, batch=1, layout="fp8")
    assert not list(tmp_path.iterdir())


def test_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'int3' is not known"):
        write_plot(tmp_path / "x.svg", {}, batch=1, layout="int3")
