"""What plan says that a target can be built with is what build takes: asked of injection itself, node by node."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from foldkv import packages
from foldkv.errors import InputError, MissingDependencyError
from foldkv.export.checkpoint.config_reader import spec_from_file
from foldkv.export.contract.layouts import BUILT, LAYOUTS
from foldkv.export.contract.profiles import PROFILES
from foldkv.export.contract.rows import DENSE
from foldkv.export.package import read_package
from foldkv.export.stitch import flat_model
from foldkv.optimize import choices
from foldkv.optimize.build import build_bundles, reasons_to_build
from foldkv.optimize.choices import PLUGINS, Choice, check_here, choose, kept_layouts, layout_gap
from foldkv.optimize.fit import plan_targets
from foldkv.optimize.targets import Target, load_targets
from foldkv.plugins.inject import inject_nodes

TARGETS = load_targets()
GPUS = {target.sm: target for target in TARGETS.values() if target.sm}  # one of each compute capability
CASES = [*itertools.product(GPUS.values(), PROFILES), *((TARGETS["cpu"], profile) for profile in PROFILES)]


@pytest.fixture(scope="module")
def graphs(tiny_graph: Path, served_graph: Path) -> dict[str, Path]:
    return {"hf": tiny_graph, "served": served_graph}


def injects(graph: Path, target: Target, layout: str) -> bool:
    """Whether the nodes of a graph can be given to plugins, as a build does it."""
    assert target.sm is not None
    package = read_package(graph)
    model, manifest = flat_model(package), package.manifest
    spec = spec_from_file(graph / "config.json")
    try:
        inject_nodes(
            model, manifest.state, rope_dim=spec.rope_dim, target=target.name, sm=target.sm, dtype=target.precision,
            layout=layout,
        )  # fmt: skip
    except InputError:
        return False
    return True


@pytest.mark.parametrize(("target", "profile"), CASES, ids=str)
def test_a_layout_is_kept_exactly_where_injection_and_packing_take_it(
    graphs: dict[str, Path], target: Target, profile: str
) -> None:
    spec = spec_from_file(graphs[profile] / "config.json")
    kept = kept_layouts(spec, profile, target)
    if target.sm is None:
        assert kept == [DENSE, *(["fp8+fp4"] if profile == "served" else [])]
    else:
        assert kept == [name for name in BUILT if injects(graphs[profile], target, name)]
        assert kept_layouts(spec, profile, target, plugins=False) == [DENSE]
    assert not any(injects(graphs[profile], target, name) for name in LAYOUTS if name not in BUILT and target.sm)


@pytest.mark.parametrize("plugins", [None, True, False])
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("layout", BUILT)
@pytest.mark.parametrize("names", [["cpu"], ["a100"], ["cpu", "rtx4090"]], ids=str)
def test_plan_and_build_refuse_and_choose_the_same(
    graphs: dict[str, Path], tmp_path: Path, names: list[str], layout: str, profile: str, plugins: bool | None
) -> None:
    spec = spec_from_file(graphs[profile] / "config.json")
    asked = {"plugins": plugins, "layout": layout}

    def planned() -> list[tuple[str, str, bool]]:
        found = plan_targets(spec, [TARGETS[n] for n in names], profile=profile, context=4096, **asked)
        return [(plan.target.name, plan.layout, plan.plugins) for plan in found]

    try:
        reasons = reasons_to_build(graphs[profile], tmp_path, names, plugins=plugins, layout=layout)
    except InputError as error:
        with pytest.raises(InputError, match=str(error).splitlines()[0].split("(")[0].replace("+", ".")):
            planned()
        return
    assert list(reasons) == names and all("does not exist" in reason for reason in reasons.values())
    chosen = choose(spec, profile, [TARGETS[n] for n in names], plugins=plugins, layout=layout)
    assert [(one.target.name, one.layout, one.plugins) for one in chosen] == planned()
    for one in chosen:
        assert one.plugins == (one.target.sm is not None and (PLUGINS if plugins is None else plugins))


def test_layouts_that_are_offered_are_kept_by_some_target_and_the_others_by_none() -> None:
    spec = spec_from_file(Path(__file__).parents[1] / "data" / "deepseek-v4-flash.json")
    for name in LAYOUTS:
        kept = [
            t
            for t, p in itertools.product(TARGETS.values(), PROFILES)
            if not layout_gap(spec, p, t, name, plugins=True)
        ]
        assert bool(kept) == (name in BUILT)


def test_everything_that_cannot_be_built_here_is_named_before_anything_is_built(
    tiny_graph: Path, tmp_path: Path
) -> None:
    with pytest.raises(MissingDependencyError, match=r"(?s)2 found.*h100: .*b200: .*Nothing was built"):
        build_bundles(tiny_graph, tmp_path / "out", ["cpu", "h100", "b200"])
    assert not (tmp_path / "out").exists()


def test_without_a_compiler_a_gpu_is_refused_with_plugins_only(monkeypatch: pytest.MonkeyPatch) -> None:
    found = packages.installed
    monkeypatch.setattr(packages, "installed", lambda module: module != "triton" and found(module))
    pytest.importorskip("tensorrt_rtx", reason="engines need TensorRT-RTX")
    check_here([Choice(TARGETS["a100"], False, DENSE), Choice(TARGETS["cpu"], False, DENSE)])
    with pytest.raises(MissingDependencyError, match=r"foldkv\[plugins\]"):
        check_here([Choice(TARGETS["a100"], True, DENSE)])
    assert choices.missing_for(Choice(TARGETS["a100"], True, DENSE))
