"""The wheel holds everything that the code reads, and a service that embeds the runtime loads nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the tracked sources, unpacked."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    skip = shutil.ignore_patterns(".*", "build", "*.egg-info", "demo", "tests", "examples", "__pycache__")
    shutil.copytree(ROOT, source, ignore=skip)
    script = f"from setuptools import build_meta; print(build_meta.build_wheel({str(work)!r}))"
    subprocess.run([sys.executable, "-c", script], cwd=source, check=True, capture_output=True)
    (path,) = work.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(work / "unpacked")
    return work / "unpacked"


def test_every_module_and_data_file_is_in_the_wheel(wheel: Path) -> None:
    packages = ("export", "optimize", "plugins", "runtime", "validation")
    kinds = {".py", ".toml", ".json", ".j2", ".css", ".html", ".typed"}
    wanted = {path.relative_to(ROOT) for path in ROOT.glob("*.py")} | {Path("py.typed")}
    for package in packages:
        wanted |= {p.relative_to(ROOT) for p in (ROOT / package).rglob("*") if p.suffix in kinds}
    held = {path.relative_to(wheel / "foldkv") for path in (wheel / "foldkv").rglob("*") if path.is_file()}
    assert held == wanted


def test_the_runtime_loads_neither_torch_nor_onnx_nor_triton_nor_what_makes_bundles(
    wheel: Path, tiny_bundle: Path
) -> None:
    script = f"""
import sys
sys.path.insert(0, {str(wheel)!r})
import foldkv
assert foldkv.__file__.startswith({str(wheel)!r}), foldkv.__file__
import foldkv.runtime.engine
from foldkv.runtime.session import Session
with Session({str(tiny_bundle)!r}, context=64) as session:
    session.generate([[72, 105]], max_new_tokens=3)
heavy = (
    "torch", "onnx", "onnx_ir", "onnxscript", "transformers", "safetensors", "pydantic", "click", "jinja2", "triton",
)
# The contract, where weights lie, plain declarations, and what launches kernels.
own = ["foldkv.export", "foldkv.export.locate", "foldkv.export.weight_digests", "foldkv.plugins"] + [name for name in sys.modules if name.startswith("foldkv.export.contract")]
own += [f"foldkv.plugins.{{name}}" for name in ("cuda", "declarations", "launch", "launch_experts", "launch_sublayers", "plans", "tensorrt")]
made = tuple(f"foldkv.{{name}}" for name in ("export", "plugins", "optimize", "validation", "cli"))
print([name for name in sys.modules if name in heavy or name.startswith(made) and name not in own])
"""
    # -P and an empty folder: the checkout must not be what is imported.
    run = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False, cwd="/")
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


def test_inside_the_package_imports_are_relative() -> None:
    """The package is the repository's root, so only relative imports show its structure to readers of a checkout."""
    folders = ("export", "optimize", "plugins", "runtime", "validation")
    files = [*ROOT.glob("*.py"), *(file for folder in folders for file in (ROOT / folder).rglob("*.py"))]
    assert len(files) > 50
    absolute = re.compile(r"^\s*(from|import) foldkv\b", re.MULTILINE)
    assert [file for file in files if absolute.search(file.read_text())] == []
