"""The pipeline file: typed, versioned, with unknown keys refused."""

from __future__ import annotations

import os.path
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from .backends import backend_named
from .errors import InputError, listing, nearest
from .export.contract.layouts import DENSE, cache_layout
from .optimize.choices import PLUGINS
from .units import read_tokens

#: A number of tokens, as the command line reads it: 4096, "64k" or "1M".
Tokens = Annotated[int, BeforeValidator(read_tokens)]


def _known_layout(name: str) -> str:
    try:
        return cache_layout(name).name
    except InputError as error:
        raise ValueError(str(error)) from None


def _known_backend(name: str) -> str:
    try:
        return backend_named(name).name
    except InputError as error:
        raise ValueError(str(error)) from None


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ExportConfig(_Strict):
    """The export stage."""

    profile: Literal["hf", "served"] = "hf"
    allow_unknown_keys: list[str] = []


class ShapesConfig(_Strict):
    """Sizes engines are built for, each [smallest, typical, largest]; None is what suits the model."""

    batch: Annotated[list[int], Field(min_length=3, max_length=3)] | None = None
    chunk: Annotated[list[Tokens], Field(min_length=3, max_length=3)] | None = None
    context: Annotated[list[Tokens], Field(min_length=3, max_length=3)] | None = None


class BuildConfig(_Strict):
    """The build stage."""

    targets: list[str] = Field(default=["cpu"], min_length=1)
    backend: Annotated[str, AfterValidator(_known_backend)] | None = None
    plugins: Literal["on", "off"] = "on" if PLUGINS else "off"
    layout: Annotated[str, AfterValidator(_known_layout)] = DENSE
    jobs: int | None = Field(default=None, ge=1)
    cache: str | None = None
    ray: str | None = None
    shapes: ShapesConfig = ShapesConfig()


class ValidateConfig(_Strict):
    """The validate stage; runs on the bundles of ``targets``, those of engines on the GPUs ``devices``."""

    enabled: bool = True
    targets: list[str] = Field(default=["cpu"], min_length=1)
    devices: list[Annotated[int, Field(ge=0)]] | None = Field(default=None, min_length=1)
    seed: int = Field(default=0, ge=0)
    gates: dict[str, float] = {}
    text: str | None = None
    text_tokens: Tokens = Field(default=384, ge=8)
    texts: int = Field(default=6, ge=1)
    distances: list[Tokens] = Field(default=[16, 64, 128, 256, 512], min_length=1)
    cases_per_distance: int = Field(default=20, ge=1)
    cases_per_kind: int = Field(default=8, ge=0)
    case_tokens: Tokens = Field(default=256, ge=1)
    sweep_cases: int = Field(default=1, ge=0)
    contexts: list[Tokens] = []
    baseline: str | None = None
    threads: int | None = Field(default=None, ge=1)
    ray: str | None = None


class PipelineConfig(_Strict):
    """A whole pipeline file. Paths are relative to the file."""

    version: Literal[1]
    checkpoint: str
    output: str
    export: ExportConfig = ExportConfig()
    build: BuildConfig = BuildConfig()
    # pydantic reserves the name `validate`.
    validation: ValidateConfig = Field(default=ValidateConfig(), alias="validate")


def load_config(path: Path) -> PipelineConfig:
    """Read a pipeline file; paths in it become relative to it.

    Raises:
        InputError: the file cannot be read, is not TOML, or has wrong or unknown keys; all are listed.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}. Give a pipeline file; docs/cli.md shows one."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML: {error}.") from None
    try:
        config = PipelineConfig.model_validate(table)
    except ValidationError as error:
        raise InputError(
            listing(f"{path} cannot be used", [_finding(item) for item in error.errors()], "Correct these keys.")
        ) from None
    bad = [d for d in config.validation.distances if d < 4 or d % 4]
    if bad:
        raise InputError(f"{path}: validate.distances has {bad}; expected positive multiples of 4.")
    folder, validation = Path(path).parent, config.validation
    beside = {name: getattr(validation, name) for name in ("text", "baseline")}
    beside = {name: os.path.normpath(folder / file) for name, file in beside.items() if file is not None}
    validation = validation.model_copy(update=beside)
    build = config.build
    if build.cache is not None:
        build = build.model_copy(update={"cache": os.path.normpath(folder / build.cache)})
    paths = {name: os.path.normpath(folder / getattr(config, name)) for name in ("checkpoint", "output")}
    return config.model_copy(update=paths | {"build": build, "validation": validation})


def _finding(item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"unknown key {place!r}{nearest(str(item['loc'][-1]), _keys(item['loc'][:-1]))}"
    if item["type"] == "missing":
        return f"missing key {place!r}"
    if item["type"] == "value_error":  # from foldkv's own readers, which say what was found
        return f"{place}: {item['ctx']['error']}".removesuffix(".")
    return f"{place} is {item['input']!r}: {item['msg']}"


def _keys(parents: tuple[int | str, ...]) -> list[str]:
    model: Any = PipelineConfig
    for parent in parents:
        fields = {field.alias or name: field for name, field in model.model_fields.items()}
        model = fields[str(parent)].annotation
    return [field.alias or name for name, field in model.model_fields.items()]
