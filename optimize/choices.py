"""What a target is built with: plugins or function bodies, and the layout of its cache rows.

``plan``, ``build`` and ``run`` ask here, so they all agree. No graph is read and nothing is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InputError, MissingDependencyError, listing
from ..export.contract.geometry import ModelSpec
from ..export.contract.layouts import BUILT, DENSE, LAYOUTS, cache_layout
from ..export.contract.rows import DENSE as DENSE_ROWS
from ..export.contract.rows import row_format_named
from ..packages import pip_line, require, version_of
from ..plugins.coverage import coverage
from .targets import Target

#: Whether GPU targets get plugins by default. Only plugins keep packed rows and update caches in place. Function bodies need
#: every cache twice, and activations that grow with the context.
PLUGINS = True


@dataclass(frozen=True)
class Choice:
    """How the bundle of one target is built."""

    target: Target
    plugins: bool
    layout: str

    @property
    def feature(self) -> str:
        """What the build is called in the table of packages."""
        return self.target.backend.build_feature(self.plugins)


def layout_gap(spec: ModelSpec, profile: str, target: Target, layout: str, *, plugins: bool) -> str:
    """Why a target does not support a layout for its caches; "" if it does. For plugins the rules of injection decide.

    Args:
        spec: the model.
        profile: of the graph.
        target: the machine.
        layout: a name in ``BUILT``.
        plugins: whether a GPU target gets plugins.
    """
    reasons = target.backend.refusals(
        layout, profile=profile, plugins=plugins, plugin_gaps=lambda: _plugin_gaps(spec, profile, target, layout)
    )
    return reasons[0] if reasons else ""


def _plugin_gaps(spec: ModelSpec, profile: str, target: Target, layout: str) -> list[str]:
    """Why injection cannot give the operators on rows of that layout to plugins."""
    sm = target.sm
    assert sm is not None  # a backend that takes plugins is for GPUs
    formats = LAYOUTS[layout]
    asked = [
        row
        for row in coverage(spec, [sm], (profile,))
        if row.row_format == (formats.format_of(row.group) or DENSE_ROWS) and row.dtype in ("", target.precision)
    ]
    gaps = [row for row in asked if row.gaps[sm]]
    # An operator without a plugin keeps its function body, which reads dense rows; engines without any plugin are not built.
    packed = [row for row in gaps if row_format_named(row.row_format).packed]
    stops = (gaps if len(gaps) == len(asked) else []) if layout == DENSE else packed
    return [f"{row.operator} {row.gaps[sm]}" for row in stops]


def kept_layouts(spec: ModelSpec, profile: str, target: Target, *, plugins: bool | None = None) -> list[str]:
    """The layouts that a target supports, dense first; none if no operator of the model has a plugin there."""
    wanted = PLUGINS if plugins is None else plugins
    return [name for name in BUILT if not layout_gap(spec, profile, target, name, plugins=wanted)]


def choose(
    spec: ModelSpec,
    profile: str,
    targets: Sequence[Target],
    *,
    plugins: bool | None = None,
    layout: str = DENSE,
) -> list[Choice]:
    """How the targets of one build are built.

    If there are GPU targets, a packed layout is meant for them: the cpu target beside them keeps dense rows if it must.

    Args:
        spec: the model.
        profile: of the graph.
        targets: of one call.
        plugins: whether GPU targets get plugins; None is the default.
        layout: of cache rows.

    Raises:
        InputError: an unknown layout, or one that targets do not support; all are listed.
    """
    cache_layout(layout)
    wanted = PLUGINS if plugins is None else plugins
    gpus = any(target.backend.gpu for target in targets)
    chosen, findings = [], []
    for target in targets:
        gap = layout_gap(spec, profile, target, layout, plugins=wanted)
        if gap and (target.backend.gpu or not gpus):
            findings.append(f"{target.name}: {gap}")
        chosen.append(Choice(target, wanted and target.backend.takes_plugins, DENSE if gap else layout))
    if findings:
        step = (
            "Choose another layout or other targets; `foldkv targets --coverage CHECKPOINT` shows what plugins read."
            if wanted
            else "Build with --plugins on, or choose the layout dense."
        )
        raise InputError(
            f"{findings[0]}. {step}" if len(findings) == 1 else listing("this cannot be built", findings, step)
        )
    return chosen


def backend_version(target: Target) -> str:
    """The installed version of the backend that builds for a target.

    Raises:
        MissingDependencyError: it cannot be used here; the message says what is missing and what to run where.
    """
    from .engine_build import version_beside_gpu

    backend = target.backend
    if not backend.builds_without_gpu:
        return version_beside_gpu(target)
    require(backend.build_feature())
    return version_of(backend.module) or ""


def missing_for(choice: Choice) -> str:
    """Why this machine cannot build a bundle, or "" if it can."""
    return str(_missing_for(choice) or "")


def _missing_for(choice: Choice) -> MissingDependencyError | None:
    try:
        # A backend that needs the GPU usually lacks more than a package; its own check names everything.
        if choice.target.backend.builds_without_gpu:
            require(choice.feature)
        backend_version(choice.target)
        require(choice.feature)
    except MissingDependencyError as error:
        return error
    return None


def check_here(choices: Sequence[Choice]) -> None:
    """Check that this machine can build all targets, before any is built.

    Raises:
        MissingDependencyError: it cannot; the message names every target with its reason.
    """
    found = {choice.target.name: error for choice in choices if (error := _missing_for(choice))}
    if not found:
        return
    if len(found) == 1:
        raise next(iter(found.values()))
    packages = list(dict.fromkeys(package for error in found.values() for package in error.packages))
    raise MissingDependencyError(
        listing(
            "these targets cannot be built here", [f"{name}: {error}" for name, error in found.items()],
            "Leave them out here, and build them on a machine that has what is missing. Nothing was built.",
        ),
        packages=packages, install=pip_line(packages) if packages else "",
    )  # fmt: skip
