"""Trends over reports: what is joined was measured alike, by date, per gate and target."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from foldkv.cli import main
from foldkv.errors import EXIT_BAD_INPUT, EXIT_OK, InputError
from foldkv.validation.trends import Point, Series, plot, read_trends

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def releases(tiny_report: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes copies of the tiny report, each a day later than the one before, changed by functions by name."""
    content = json.loads((tiny_report / "report.json").read_text())

    def write(**changes: Change) -> Path:
        for day, (name, change) in enumerate(changes.items(), 1):
            made = copy.deepcopy(content)
            made["provenance"]["date"] = f"2026-11-{day:02}T00:00:00+00:00"
            change(made)
            (tmp_path / "all" / name).mkdir(parents=True)
            (tmp_path / "all" / name / "report.json").write_text(json.dumps(made))
        return tmp_path / "all"

    return write


def kl(value: float | str | None, verdict: str = "holds") -> Change:
    def change(content: dict[str, Any]) -> None:
        gate = next(gate for gate in content["gates"] if gate["name"] == "kl-mean")
        gate["value"], gate["verdict"] = value, verdict

    return change


def about(**facts: Any) -> Change:
    return lambda content: content["provenance"].update(facts)


def same(_: object) -> None:
    """No change."""


def test_points_are_by_date_and_compared_where_they_were_measured_alike(releases: Callable[..., Path]) -> None:
    folder = releases(
        z_first=kl(1e-8), y_half=kl(5e-9), other_text=about(text_sha256="0" * 64), failing=kl("inf", "fails"),
        gpu=about(target="a100", backend="tensorrt-rtx 1.7.1"),
        older=lambda content: content.update(schema_version=3), nothing=kl(None, "not informative"),
    )  # fmt: skip
    trends = read_trends(folder)
    assert [row["folder"] for row in trends.reports] == ["z_first", "y_half", "other_text", "failing", "gpu", "nothing"]
    assert list(trends.left_out) == ["older"] and "report of version 3" in trends.left_out["older"]
    assert list(trends.targets) == ["a100, tensorrt-rtx", "cpu, onnxruntime"]
    series = {one.gate: one for one in trends.targets["cpu, onnxruntime"]}
    told = CliRunner().invoke(main, ["trends", str(folder)])
    [line] = [line for line in told.output.splitlines() if "cpu" in line and " kl-mean " in line]
    assert line.split()[-2:] == ["nothing", "∞"], "values on another text than the newest ones are not beside them"
    points = series["kl-mean"].points
    assert [point.report for point in points] == [0, 1, 2, 3, 5]
    assert [point.value for point in (*points[:2], points[3], points[4])] == [1e-8, 5e-9, float("inf"), None]
    assert [point.unlike for point in points] == [None, None, "another text", "another text", None]
    # Retrieval reads no text, so another one changes nothing.
    assert all(point.unlike is None for point in series["retrieval"].points)
    told = CliRunner().invoke(main, ["trends", str(folder), "--json"])
    assert told.exit_code == EXIT_OK
    facts = json.loads(told.stdout)
    found = next(one for one in facts["targets"]["cpu, onnxruntime"] if one["gate"] == "kl-mean")
    assert [point["value"] for point in found["points"]][3:] == ["inf", None] and facts["reports"][4][
        "target"
    ] == "a100"


def test_the_page_is_whole_and_needs_nothing_else(releases: Callable[..., Path], tmp_path: Path) -> None:
    folder = releases(first=kl(1e-8), second=kl(2e-8), third=kl(1e-3, "fails"))
    (folder / "third").rename(folder / "a <b> & c")
    done = CliRunner().invoke(main, ["trends", str(folder), "-o", str(tmp_path / "trends.html")])
    assert done.exit_code == EXIT_OK, done.output
    line = next(line for line in done.output.splitlines() if " kl-mean " in line)
    assert "fails" in line and "1.0e-03" not in line.split("1e-03")[0] and line.index("2.0e-08") < line.index("1.0e-08")
    page = (tmp_path / "trends.html").read_text(encoding="utf-8")
    assert "http://" not in page and "https://" not in page and "src=" not in page and "<b>" not in page
    assert 'href="all/a%20%3Cb%3E%20%26%20c/report.html"' in page
    assert page.count("<svg") == len(json.loads((folder / "first" / "report.json").read_text())["gates"])
    row = re.search(r"<code>kl-mean</code></td>.*", page)
    assert row and ">fails<" in row[0] and ">50,000<" in row[0], "50,000 times as large as before"


def test_reports_of_several_models_or_of_none_are_refused(releases: Callable[..., Path], tmp_path: Path) -> None:
    folder = releases(one=same, other=about(checkpoint_sha256="1" * 64))
    with pytest.raises(InputError, match=r"(?s)reports of 2 checkpoints.*one.*111111111111\.\.\.: other"):
        read_trends(folder)
    (tmp_path / "empty").mkdir()
    refused = CliRunner().invoke(main, ["trends", str(tmp_path / "empty"), "-o", str(tmp_path / "page.html")])
    assert refused.exit_code == EXIT_BAD_INPUT and "no report that can be read" in refused.output
    assert not (tmp_path / "page.html").exists()


def test_a_plot_has_its_thresholds_and_only_true_lines() -> None:
    points = (
        Point(0, 1e-8, 1e-6, "holds", None), Point(1, 1e-4, 1e-6, "fails", None), Point(2, float("inf"), 1e-6, "fails", None),
        Point(3, 1e-9, 1e-6, "holds", "another text"), Point(4, None, 1e-6, "not informative", None),
    )  # fmt: skip
    drawn = plot(Series("kl-mean", "kl_mean", "<=", points))
    ys = [mark["y"] for mark in drawn["marks"]]
    assert len(ys) == 4 and ys[2] == drawn["top"] and ys[3] == drawn["bottom"], "1e-9 is the lowest decade"
    assert ys[0] > drawn["thresholds"][0][2] > ys[1], "the threshold lies between what holds and what fails"
    assert len(drawn["lines"]) == 2 and len(drawn["thresholds"]) == 5
    assert all(mark["x"] <= drawn["width"] for mark in drawn["marks"])
    for single in ((Point(0, 1.0, 1.0, "holds", None),), (Point(0, 0.0, 0.0, "holds", None),)):
        for comparison in ("<=", ">="):
            [mark] = plot(Series("finite", "not_finite", comparison, single))["marks"]
            assert drawn["top"] <= mark["y"] <= drawn["bottom"]
