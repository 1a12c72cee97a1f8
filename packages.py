"""The packages that foldkv uses: which are installed, which command needs which, and how to install the missing ones.

The commands, ``doctor`` and the command line's last error handler use one table, so all of them say the same. Extras and
versions of packages are read from foldkv's own metadata. Standard library only.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import platform
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from . import __version__
from .backends import BACKENDS, ONNX_RUNTIME, Backend
from .errors import FoldkvError, MissingDependencyError, system_failure

_EXPORT = ("numpy", "torch", "onnx", "onnx_ir", "onnxscript", "ml_dtypes")


@dataclass(frozen=True)
class Feature:
    """Something that foldkv does: the modules that it imports, the command that does it, and whether it needs a GPU.

    ``package`` must be installed where another package has one of the modules too.
    """

    modules: tuple[str, ...]
    command: str = ""
    gpu: bool = False
    package: str = ""


def _to_run(backend: Backend) -> tuple[str, ...]:
    if backend.gpu:
        return ("numpy", "tokenizers", "cuda.bindings", backend.module)
    return ("numpy", backend.module, "tokenizers")


def _builds() -> dict[str, Feature]:
    return {
        backend.build_feature(plugins): Feature(
            (*_EXPORT, backend.module, *(("triton",) if plugins else ())), "build", gpu=not backend.builds_without_gpu
        )
        for backend in BACKENDS.values()
        for plugins in ((False, True) if backend.takes_plugins else (False,))
    }


_VALIDATE = (*_to_run(ONNX_RUNTIME), *_EXPORT, "transformers", "safetensors", "jinja2", "jsonschema", "polygraphy")
_SERVE = ("starlette", "uvicorn", "prometheus_client")
#: model-signing imports pyOpenSSL and does not ask for it.
_SIGN = ("model_signing", "OpenSSL", "cryptography", "pydantic")
#: What is not listed needs only click: `plan`, `targets`, `inspect` of artifacts.
FEATURES = {
    "inspect checkpoints": Feature(_EXPORT),
    "export": Feature((*_EXPORT, "transformers", "tokenizers", "safetensors"), "export"),
    "inject": Feature(_EXPORT, "inject"),
    **_builds(),
    **{one.run_feature: Feature(_to_run(one), "generate", one.gpu, one.package) for one in BACKENDS.values()},
    "serve": Feature(("numpy", "tokenizers", "pydantic", *_SERVE), "serve"),
    "validate": Feature(_VALIDATE, "validate"),
    "evidence": Feature(("numpy", "jsonschema", "cyclonedx", "in_toto_attestation", *_SIGN), "evidence"),
    "verify signatures": Feature(_SIGN),
    "build with Ray": Feature(("ray",)),
    "validate with Ray": Feature(("ray",)),
    "trends": Feature(("jinja2", "jsonschema"), "trends"),
    "chat templates": Feature(("jinja2",)),
    "prefixes on disk": Feature(("safetensors",)),
    "structured output": Feature(("llguidance",)),
    "run, beside its stages": Feature((*_EXPORT, "pydantic"), "run"),
}
#: Packages that the table above does not list, and their uses.
_ALSO = {"accelerate": "validate, with quantised checkpoints", "rich": "bars on a terminal"}
#: Modules whose package has another name.
_PACKAGES = {"cuda": "cuda-bindings", "cyclonedx": "cyclonedx-python-lib", "OpenSSL": "pyopenssl"}
#: Modules that a second package has too. The files of such packages overwrite each other, so one of them can be installed.
VARIANTS = {one.module: one.package for one in BACKENDS.values() if one.package}
_DEVELOPMENT = "dev"


def modules() -> list[str]:
    """Every module of the table, each once."""
    return list(dict.fromkeys([*(name for feature in FEATURES.values() for name in feature.modules), *_ALSO]))


def purpose(module: str) -> str:
    """What a module is used for, in the words of the table."""
    uses = dict.fromkeys(re.split("[ ,]", name)[0] for name, one in FEATURES.items() if module in one.modules)
    return ", ".join(uses) or _ALSO[module]


def package_of(module: str) -> str:
    """The package of a module, as pip names it."""
    top = module.split(".")[0]
    return _PACKAGES.get(top, _normalised(top))


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@functools.cache
def _requirements() -> dict[str, tuple[str, str]]:
    """Package -> (extra or "", versions, as in ``>=2.9``), from the metadata of this installation, or of the checkout."""
    try:
        lines = importlib.metadata.requires("foldkv") or []
    except importlib.metadata.PackageNotFoundError:
        lines = _requirements_of_checkout()
    found: dict[str, tuple[str, str]] = {}
    for line in lines:
        wanted, _, marker = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"](.+?)['\"]", marker)
        name = re.match(r"[\w.-]+", wanted.strip())
        if name and (extra is None or extra[1] != _DEVELOPMENT):
            versions = re.sub(r"\[.*?\]|\s", "", wanted.strip()[name.end() :])
            found.setdefault(_normalised(name[0]), (extra[1] if extra else "", versions))
    return found


def _requirements_of_checkout() -> list[str]:
    try:
        project = tomllib.loads((Path(__file__).resolve().parent / "pyproject.toml").read_text(encoding="utf-8"))[
            "project"
        ]
    except (OSError, ValueError, KeyError):
        return []
    extras = project.get("optional-dependencies", {}).items()
    return [*project["dependencies"], *(f"{line}; extra == '{extra}'" for extra, lines in extras for line in lines)]


def requirement(module: str) -> str:
    """The package of a module with the versions that foldkv takes, as pip reads it."""
    package = package_of(module)
    return package + _requirements().get(package, ("", ""))[1]


def version_of(module: str) -> str | None:
    """The installed version, of whichever package has the module; None: not installed, or without metadata."""
    return _version(package_of(module)) or _version(VARIANTS.get(module, ""))


def versions(wanted: Iterable[str]) -> dict[str, str]:
    """Versions by package of these modules, with Python's and foldkv's own. A package that is not installed is left out."""
    found = {package_of(module): version_of(module) for module in wanted}
    return {"python": platform.python_version(), "foldkv": __version__} | {name: v for name, v in found.items() if v}


def has_package(package: str) -> bool:
    """Whether a package is installed, by its own name. It says nothing of the modules that it has."""
    return _version(package) is not None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except (importlib.metadata.PackageNotFoundError, ValueError):  # ValueError: an empty name
        return None


def overwritten() -> dict[str, str]:
    """Modules whose files two installed packages have written over each other, with what to do."""
    return {
        module: (
            f"{package_of(module)} and {package} are both installed, and have overwritten each other's files. Run `pip uninstall "
            f"-y {package_of(module)} {package}`, then `{pip_line([module])}` for the cpu or `{pip_line([package])}` for GPUs."
        )
        for module, package in VARIANTS.items()
        if has_package(package_of(module)) and has_package(package)
    }


def installed(module: str) -> bool:
    """Whether Python finds the module. It is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def missing(wanted: Iterable[str]) -> list[str]:
    """The modules that Python does not find."""
    return [module for module in dict.fromkeys(wanted) if not installed(module)]


def pip_line(wanted: Iterable[str]) -> str:
    """The command that installs these modules: foldkv's extras, and by name the packages that are in no extra."""
    extras, plain = list[str](), list[str]()
    for module in wanted:
        extra = _requirements().get(package_of(module), ("", ""))[0]
        (extras if extra else plain).append(extra or requirement(module))
    parts = [f"foldkv[{','.join(dict.fromkeys(extras))}]"] if extras else []
    return "pip install " + " ".join(f"'{part}'" for part in [*parts, *dict.fromkeys(plain)])


def needed_by(command: str) -> list[str]:
    """The modules that a command always imports."""
    tables = [feature.modules for feature in FEATURES.values() if feature.command == command]
    return [module for module in tables[0] if all(module in table for table in tables)] if command and tables else []


def require_for(command: str) -> None:
    """As :func:`require`, for what a command always imports."""
    lacking = missing(needed_by(command))
    if lacking:
        raise lacks(f"`{command}`", lacking)


def require(feature: str, *, otherwise: str = "") -> None:
    """Check that all imports of a feature are installed, before importing any. ``otherwise`` is another remedy.

    Raises:
        MissingDependencyError: some are missing; the message lists all of them and the command that installs them.
    """
    lacking = missing(FEATURES[feature].modules)
    if lacking:
        raise lacks(f"`{feature}`", lacking, otherwise=otherwise)


def lacks(who: str, lacking: list[str], *, otherwise: str = "") -> MissingDependencyError:
    """The error for modules that ``who`` needs and that are not installed."""
    names = [package_of(module) for module in lacking]
    text = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    verb = "is" if len(names) == 1 else "are"
    return MissingDependencyError(
        f"{who} needs {text}, which {verb} not installed. Run `{pip_line(lacking)}`{f', {otherwise}' if otherwise else ''}.",
        packages=names, install=pip_line(lacking),
    )  # fmt: skip


def explain(error: BaseException, feature: str) -> MissingDependencyError | None:
    """The package problem that an error shows: one is missing, or is installed but cannot be imported. None if neither."""
    for one in _chain(error):
        if isinstance(one, ImportError):
            # Some packages name what they lack only in the text.
            words = [one.name] if one.name else re.findall(r"[A-Za-z][\w.-]*", str(one))
            for module in filter(None, map(_module, words)):
                if not installed(module):
                    return lacks(f"`{feature}`" if feature else "foldkv", missing([*needed_by(feature), module]))
                if one.name:
                    return _unusable(module, one)
    for one in _chain(error):
        importing = _imported_when_raised(one.__traceback__)
        if importing is not None:
            return _unusable(importing, one)
    return None


def as_user_error(error: BaseException, feature: str) -> FoldkvError | None:
    """The error that the user can act on, or None for a bug in foldkv."""
    if isinstance(error, FoldkvError):
        return error
    lacking = explain(error, feature)
    if lacking is not None:
        return lacking
    if isinstance(error, OSError):
        return system_failure(error)
    if isinstance(error, MemoryError):
        return MissingDependencyError(
            f"memory ran out{f': {error}' if str(error) else ''}. Use a machine with more, or smaller sizes; "
            "`foldkv plan --target` says what a model needs."
        )
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _module(name: str) -> str | None:
    """The module of the table that a name belongs to. The name may be of a submodule or of the package."""
    known = {package_of(module): module for module in modules()}
    return known.get(package_of(name))


def _imported_when_raised(traceback: TracebackType | None) -> str | None:
    """The module of the table whose own code was being imported when the error was raised."""
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_code.co_name == "<module>":
            module = _module(str(frame.f_globals.get("__name__", "")))
            if module is not None:
                return module
        traceback = traceback.tb_next
    return None


def _unusable(module: str, error: BaseException) -> MissingDependencyError:
    package, version = package_of(module), version_of(module)
    install = f"pip install --force-reinstall '{requirement(module)}'"
    return MissingDependencyError(
        f"{package}{f' {version}' if version else ''} is installed, but cannot be used: {type(error).__name__}: "
        f"{str(error).strip()[:400]}. Run `{install}`.",
        packages=[package], install=install,
    )  # fmt: skip
