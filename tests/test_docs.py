"""What the documentation says is what the code does."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pages import blocks, script
from pydantic import BaseModel

from foldkv.artifact import read_manifest
from foldkv.config import load_config
from foldkv.plugins.declarations import PLUGINS

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "tiny-v4" / "README.md"]


@pytest.fixture(scope="module")
def generate() -> Any:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_of_commands_is_current(generate: Any) -> None:
    assert (ROOT / "docs" / "cli.md").read_text() == generate.reference(), "run `make docs`"


def test_the_sample_pipeline_can_be_loaded_and_shows_every_key_with_its_default(generate: Any, tmp_path: Path) -> None:
    sample = re.search(r"```toml\n(.*?)```", generate.PIPELINE, re.DOTALL)
    assert sample
    (tmp_path / "pipeline.toml").write_text(sample[1])
    config = load_config(tmp_path / "pipeline.toml")

    def check(model: Any, table: dict[str, Any], changed: set[str]) -> None:
        fields = {field.alias or name: (name, field) for name, field in type(model).model_fields.items()}
        assert table.keys() == fields.keys()
        for key, (name, field) in fields.items():
            if isinstance(table[key], dict) and isinstance(getattr(model, name), BaseModel):
                check(getattr(model, name), table[key], changed)
            elif key not in changed and not field.is_required():
                assert getattr(model, name) == field.get_default(call_default_factory=True), key

    check(
        config,
        tomllib.loads(sample[1]),
        {
            "jobs",
            "text",
            "contexts",
            "gates",
            "targets",
            "backend",
            "baseline",
            "threads",
            "devices",
            "cache",
            "ray",
            "batch",
            "chunk",
            "context",
        },
    )


def test_tables_are_what_the_results_say(generate: Any) -> None:
    for page, makers in generate.TABLES.items():
        text = page.read_text()
        assert text == generate.made_anew(text, makers), "run `make docs`"
        assert text.count("<!-- made by docs/generate.py: ") == len(makers)


def test_a_table_without_a_place_is_an_error(generate: Any) -> None:
    with pytest.raises(ValueError, match="no place for the table 'times'"):
        generate.made_anew("# A page", {"times": str})


def test_without_a_gpu_nothing_is_claimed(generate: Any) -> None:
    step = {"status": "no GPU", "date": "2026-01-01", "reasons": ["no driver"], "rows": []}
    tables = generate.result_tables
    table = tables.executed([{"device": "", "steps": {"kernels": step, "model": step, "engine": step}}])
    assert table == tables.executed([]) and table.count("**no GPU yet**") == 2 and "| **never yet** |" in table
    assert tables.times([]) == ""


def test_plugins_that_no_gpu_has_run_are_named(generate: Any) -> None:
    rows = [{"operator": name} for name in PLUGINS if name != "FoldkvHcPost"]
    step = {"status": "passed", "date": "2026-01-01", "reasons": [], "rows": rows}
    executed = generate.result_tables.executed
    assert "newer plugins `HcPost`, compiled for sm80 to sm121 | **no GPU yet**" in executed(
        [{"device": "H9", "steps": {"kernels": step}}]
    )
    step["rows"] = [*rows, {"operator": "FoldkvHcPost"}]
    assert "newer" not in executed([{"device": "H9", "steps": {"kernels": step}}])


@pytest.mark.parametrize(
    ("status", "reasons", "says"),
    [
        ("passed", [], "**H9** (d) | the `cpu` bundle |"),
        ("not finished", [], "**never yet**; tried on H9 (d): not finished"),
        (
            "failed",
            ["x: (The engine cannot run on this GPU, which has compute capability 9.0. More"],
            "H9 (compute capability 9.0) refused them (d)",
        ),
    ],
)
def test_every_outcome_of_engines_is_told(generate: Any, status: str, reasons: list[str], says: str) -> None:
    engine = {"status": status, "date": "d", "reasons": reasons, "rows": []}
    assert says in generate.result_tables.executed([{"device": "NVIDIA H9", "steps": {"engine": engine}}])


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_model_card_has_the_measured_figures() -> None:
    folder = ROOT / "examples" / "tiny-v4"
    metrics = json.loads((folder / "metrics.json").read_text())
    card = (folder / "README.md").read_text()
    for name, row in (("whole model", "retrieval"), ("window only", "retrieval_window_only")):
        line = next(line for line in card.splitlines() if line.startswith(f"| {name}") and "%" in line)
        assert [int(cell) for cell in re.findall(r"(\d+) %", line)] == [round(100 * v) for v in metrics[row].values()]
    for key in ("bits_per_byte", "bits_per_byte_window_only", "bits_per_byte_5_gram"):
        assert f"| {metrics[key]:.2f} |" in card
    for kind, (answered, cases, of_defaults, defaults) in metrics["behaviour"].items():
        cut = metrics["behaviour_window_only"][kind]
        cells = [
            f"{of_defaults} of {defaults}",
            f"{answered} of {cases}",
            f"{cut[2]} of {defaults}",
            f"{cut[0]} of {cases}",
        ]
        assert f"| {kind} | {' | '.join(cells)} |" in card


def test_every_key_of_a_manifest_is_documented(tiny_graph: Path, tiny_bundle: Path) -> None:
    text = (ROOT / "docs" / "artifacts.md").read_text()
    keys = {*read_manifest(tiny_graph, kind="foldkv.graph"), *read_manifest(tiny_bundle, kind="foldkv.bundle")}
    assert not {key for key in keys if f"`{key}`" not in text}


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_every_command_and_example_runs_as_it_stands(
    page: Path, tiny_bundle: Path, tiny_report: Path, tmp_path: Path
) -> None:
    """In a folder that looks like the checkout after `make demo`; nothing is written back to it."""
    for name in ("benchmarks", "docs", "examples", "export", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "bundles").symlink_to(tiny_bundle.parent)
    (tmp_path / "demo" / "report").symlink_to(tiny_report)
    paths = [str(Path(sys.prefix) / "bin"), os.environ["PATH"]]
    done = subprocess.run(
        ["bash", "-c", script(page)], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"PATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert done.returncode == 0, f"{page.name}: {done.stdout[-2000:]}{done.stderr[-2000:]}"


def test_what_is_not_run_says_why() -> None:
    reasons = {block.not_run for page in PAGES for block in blocks(page) if block.not_run}
    assert all(len(reason.split()) > 1 for reason in reasons)
