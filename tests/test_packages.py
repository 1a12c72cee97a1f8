"""The table of packages says what the commands import, and everybody says the same of what is missing."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
from checkpoints import small_checkpoint
from command import run
from keys import write_keys

from foldkv import doctor, packages
from foldkv.errors import EXIT_ENVIRONMENT

ROOT = Path(__file__).parents[1]
# What is in the table, and what else foldkv's extras bring.
OPTIONAL = [
    *(module.split(".")[0] for module in packages.modules()),
    "jsonschema",
]
WATCHED = """
import sys
from foldkv.cli import main
try:
    main(sys.argv[2:])
finally:
    print("missing:", [name for name in sys.argv[1].split(",") if name not in sys.modules], file=sys.stderr)
"""


def only(feature: str, *arguments: object, looked_for: tuple[str, ...] = ()) -> None:
    """Run a command that finds what the table names and nothing else, and see that it imports all of that.

    ``looked_for`` names modules that must be installed, though the command does not import them.
    """
    needed = [module.split(".")[0] for module in packages.FEATURES[feature].modules] if feature else []
    hide = [module for module in OPTIONAL if module not in needed]
    code, _, err = run(",".join(needed) or "sys", *arguments, hide=hide, code=WATCHED)
    assert code == 0, err
    assert f"missing: {list(looked_for)}" in err, err


def test_plan_targets_and_inspect_need_no_package(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    only("", "plan", tiny_checkpoint, "--target", "a100")
    only("", "targets", "--coverage", tiny_checkpoint)
    only("", "inspect", tiny_bundle)
    only("inspect checkpoints", "inspect", tiny_checkpoint)


@pytest.mark.slow
def test_commands_need_what_the_table_says_and_no_more(
    tiny_checkpoint: Path, tiny_graph: Path, tiny_bundle: Path, tiny_report: Path, tmp_path: Path
) -> None:
    only("inject", "inject", tiny_graph, "-o", tmp_path / "injected", "--target", "a100")
    only("build cpu", "build", tiny_graph, "-o", tmp_path / "bundles", "--target", "cpu")
    only("generate", "generate", tiny_bundle, "def", "-n", 2)
    only("trends", "trends", tiny_report, "-o", tmp_path / "trends.html")
    key, _ = write_keys(tmp_path / "keys")
    only("evidence", "evidence", tiny_bundle, tiny_report, "-o", tmp_path / "evidence", "--key", key)


@pytest.mark.slow
def test_export_needs_what_the_table_says_and_no_more(quick_checkpoint: Path, tmp_path: Path) -> None:
    small_checkpoint(quick_checkpoint, tmp_path / "checkpoint")
    # transformers looks for safetensors when it is imported.
    command = ("export", tmp_path / "checkpoint", "-o", tmp_path / "graph")
    only("export", *command, looked_for=("safetensors",))


@pytest.mark.slow
def test_run_and_validate_need_what_the_table_says_and_no_more(
    tiny_checkpoint: Path, tiny_graph: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_graph, tmp_path / "out" / "graph")
    shutil.copytree(tiny_bundle, tmp_path / "out" / "bundles" / "cpu")
    text = f'version = 1\ncheckpoint = "{tiny_checkpoint}"\noutput = "out"\n[validate]\n'
    (tmp_path / "run.toml").write_text(text + "enabled = false\n")
    # The bundle is unchanged, so that ONNX Runtime is asked for its version and not imported.
    needed = [module.split(".")[0] for module in packages.FEATURES["run, beside its stages"].modules]
    hide = [module for module in OPTIONAL if module not in (*needed, "onnxruntime")]
    code, _, err = run(",".join(needed), "run", tmp_path / "run.toml", hide=hide, code=WATCHED)
    assert code == 0 and "missing: []" in err, err


BUILD = ("build", "GRAPH", "-o", "OUT", "--target")
CASES = [
    ("export", ("export", "CHECKPOINT", "-o", "OUT"), ("torch", "onnxscript"), "foldkv[export]"),
    ("inject", ("inject", "GRAPH", "-o", "OUT", "--target", "a100"), ("onnx", "onnx_ir"), "foldkv[export]"),
    ("build cpu", (*BUILD, "cpu"), ("onnxruntime",), "foldkv[cpu]"),
    ("build cpu", (*BUILD, "cpu"), ("torch", "onnxscript"), "foldkv[export]"),
    ("build TensorRT-RTX engines with plugins", (*BUILD, "a100"), ("tensorrt_rtx", "triton"), "foldkv[rtx,plugins]"),
    ("generate", ("generate", "BUNDLE", "x"), ("onnxruntime",), "foldkv[cpu]"),
    ("generate", ("generate", "BUNDLE", "x"), ("tokenizers", "numpy"), "numpy>="),
    ("serve", ("serve", "BUNDLE"), ("starlette", "uvicorn", "prometheus_client"), "foldkv[serve]"),
    (
        "validate",
        ("validate", "BUNDLE", "--reference", "CHECKPOINT", "--report", "OUT"),
        ("jinja2", "transformers"),
        "foldkv[export,validation]",
    ),
    ("run, beside its stages", ("run", "PIPELINE"), ("pydantic",), "pydantic>="),
    ("validate", ("run", "PIPELINE"), ("jinja2",), "foldkv[validation]"),
    ("inspect checkpoints", ("inspect", "CHECKPOINT"), ("torch",), "foldkv[export]"),
]


@pytest.mark.parametrize(("feature", "arguments", "hide", "install"), CASES, ids=[f"{c[0]}: {c[2][0]}" for c in CASES])
def test_a_missing_package_is_exit_3_with_the_line_that_installs_it(
    tiny_checkpoint: Path, tiny_graph: Path, tiny_bundle: Path, tmp_path: Path,
    feature: str, arguments: tuple[str, ...], hide: tuple[str, ...], install: str,
) -> None:  # fmt: skip
    (tmp_path / "run.toml").write_text(f'version = 1\ncheckpoint = "{tiny_checkpoint}"\noutput = "out"\n')
    places = {
        "CHECKPOINT": tiny_checkpoint, "GRAPH": tiny_graph, "BUNDLE": tiny_bundle, "OUT": tmp_path / "out",
        "PIPELINE": tmp_path / "run.toml",
    }  # fmt: skip
    code, out, err = run(*(places.get(argument, argument) for argument in arguments), "--json", hide=hide)
    assert code == EXIT_ENVIRONMENT, err
    error = json.loads(out)["error"]
    assert error["exit_code"] == EXIT_ENVIRONMENT and error["type"] == "MissingDependencyError"
    assert f"pip install '{install}" in error["message"]
    assert {packages.package_of(module) for module in hide} <= set(error.get("packages") or hide)
    assert err.count("error:") == 1 and "Traceback" not in err
    assert not (tmp_path / "out").exists()
    table = packages.FEATURES[feature].modules
    assert set(hide) <= set(table)


def test_doctor_says_of_missing_and_broken_packages_what_commands_say(tiny_bundle: Path, tmp_path: Path) -> None:
    broken = tmp_path / "onnxruntime"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('libgomp.so.1: cannot open shared object file')\n")
    ends = tmp_path / "triton"
    ends.mkdir()
    (ends / "__init__.py").write_text("import os\nos.abort()\n")
    hide = ("torch", "transformers", "onnxscript", "tensorrt_rtx", "accelerate", "onnx_ir")  # and the check is fast
    code, out, err = run("doctor", "--json", hide=hide, front=tmp_path)
    assert code == 0, err
    facts = json.loads(out)
    rows = {row["package"]: row for row in facts["packages"]}
    assert rows["torch"]["version"] is None and "libgomp" in rows["onnxruntime"]["problem"]
    assert "SIGABRT" in rows["triton"]["problem"] and not rows["tokenizers"]["problem"]
    assert facts["can"]["generate"] is False and facts["can"]["export"] is False
    assert facts["lacks"]["generate"] == {"what": ["onnxruntime, which cannot be imported"], "install": ""}
    assert facts["lacks"]["export"]["install"] == "pip install 'foldkv[export]'"
    assert facts["can"].keys() == packages.FEATURES.keys()
    code, _, err = run("generate", tiny_bundle, "x", hide=hide, front=tmp_path)
    assert code == EXIT_ENVIRONMENT
    assert "onnxruntime" in err and "cannot be used: ImportError: libgomp" in err and "--force-reinstall" in err
    text = run("doctor", hide=hide, front=tmp_path)[1]
    assert "export: no, needs torch" in text and "pip install 'foldkv[export]'" in text


def add_package(folder: Path, name: str, version: str) -> None:
    """Put the metadata of a package into a folder."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_doctor_tells_of_two_packages_that_overwrite_each_other(tmp_path: Path) -> None:
    hide = ("torch", "transformers", "onnxscript", "tensorrt_rtx", "triton")
    facts = json.loads(run("doctor", "--json", hide=hide)[1])
    assert facts["overwritten"] == {}
    # Here is onnxruntime: it builds these bundles, and another package runs them.
    assert "onnxruntime-gpu" in facts["lacks"]["generate with ONNX Runtime CUDA"]["what"]
    assert facts["lacks"]["generate with ONNX Runtime CUDA"]["install"] == "pip install 'foldkv[cuda]'"
    add_package(tmp_path, "onnxruntime-gpu", "1.31.1")
    facts = json.loads(run("doctor", "--json", hide=hide, front=tmp_path)[1])
    said = facts["overwritten"]["onnxruntime"]
    assert "`pip uninstall -y onnxruntime onnxruntime-gpu`" in said
    assert "`pip install 'foldkv[cpu]'` for the cpu or `pip install 'foldkv[cuda]'` for GPUs" in said
    assert "onnxruntime-gpu" not in facts["lacks"]["generate with ONNX Runtime CUDA"]["what"]
    assert said in run("doctor", hide=hide, front=tmp_path)[1]


def test_the_version_of_a_module_is_that_of_whichever_package_has_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    add_package(tmp_path, "onnxruntime-gpu", "1.31.1")
    monkeypatch.syspath_prepend(tmp_path)
    here = packages.importlib.metadata.version

    def without(name: str) -> str:
        if name == "onnxruntime":
            raise packages.importlib.metadata.PackageNotFoundError
        return here(name)

    monkeypatch.setattr(packages.importlib.metadata, "version", without)
    assert packages.version_of("onnxruntime") == "1.31.1" and packages.version_of("nothing_of_ours") is None
    assert packages.has_package("onnxruntime-gpu") and not packages.has_package("onnxruntime")
    assert packages.overwritten() == {}


def test_extras_and_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for module in packages.modules():
        package = packages.package_of(module)
        extras = {
            name for name, lines in project["optional-dependencies"].items() if name != "dev"
            for line in lines if re.match(r"[\w-]+", packages._normalised(line))[0] == package  # type: ignore[index]
        }  # fmt: skip
        line = packages.pip_line([module])
        assert any(f"foldkv[{extra}]" in line for extra in extras) or (not extras and f"'{package}>=" in line), line


#: Modules of packages that come with one that the project asks for.
COMES_WITH = {
    "google": "in-toto-attestation", "huggingface_hub": "transformers", "markupsafe": "jinja2",
    "packageurl": "cyclonedx-python-lib", "pydantic_core": "pydantic",
}  # fmt: skip
#: Not on every platform, and not needed by a test.
NOT_ASKED_FOR = {"onnxruntime_genai"}


def test_every_package_that_code_imports_is_asked_for() -> None:
    # One that was left from an older requirement, or that comes with another today, is missing on a fresh machine.
    files = [path for path in ROOT.rglob("*.py") if not {".venv", ".typing"} & set(path.relative_to(ROOT).parts)]
    trees = {path: ast.parse(path.read_text()) for path in files}
    imported = {
        name.split(".")[0]: path
        for path, tree in trees.items() for node in ast.walk(tree) for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        )
    }  # fmt: skip
    ours = {"foldkv", *(path.stem for path in files)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    asked = {packages._normalised(re.match(r"[\w.-]+", line)[0]) for line in lines}  # type: ignore[index]
    distributions = importlib.metadata.packages_distributions()
    missing = {
        module: path
        for module, path in imported.items()
        if module not in sys.stdlib_module_names and module not in ours | NOT_ASKED_FOR
        and not {packages._normalised(name) for name in (
            [*distributions.get(module, []), COMES_WITH.get(module, module), packages.package_of(module)]
        )} & asked
    }  # fmt: skip
    assert len(imported) > 50 and not missing


def test_a_checkout_that_was_not_installed_knows_its_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = packages._requirements()

    def gone(_: str) -> list[str]:
        raise packages.importlib.metadata.PackageNotFoundError

    packages._requirements.cache_clear()
    monkeypatch.setattr(packages.importlib.metadata, "requires", gone)
    found = packages._requirements()
    packages._requirements.cache_clear()
    assert found.keys() == installed.keys() and {k: v[0] for k, v in found.items()} == {
        k: v[0] for k, v in installed.items()
    }


def test_what_an_error_says_of_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = packages.installed
    monkeypatch.setattr(packages, "installed", lambda module: module != "accelerate" and here(module))
    in_words = ImportError("Loading an FP8 quantized model requires accelerate (`pip install accelerate`)")
    found = packages.explain(in_words, "validate")
    assert found is not None and found.packages == ("accelerate",) and "foldkv[export]" in found.install
    assert packages.explain(ImportError("no module named nothing_of_ours", name="nothing_of_ours"), "run") is None
    assert packages.explain(ValueError("torch"), "run") is None
    # A package that is here and whose import fails, for whatever reason.
    (tmp_path / "jinja2").mkdir()
    (tmp_path / "jinja2" / "__init__.py").write_text("open('/nowhere/lib.so')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "jinja2"]:
        monkeypatch.delitem(sys.modules, name)
    try:
        import jinja2  # noqa: F401
    except OSError as error:
        unusable = packages.explain(error, "validate")
    assert unusable is not None and "cannot be used: FileNotFoundError" in str(unusable)
    assert unusable.packages == ("jinja2",)


def test_doctor_imports_in_another_process(capfd: pytest.CaptureFixture[str]) -> None:
    assert doctor.import_problems(["json", "no_such_module_here"]) == {
        "no_such_module_here": "ModuleNotFoundError: No module named 'no_such_module_here'"
    }
    assert capfd.readouterr().out == ""
