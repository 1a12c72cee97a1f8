"""Engines are validated as graphs are: over stand-ins that execute the lowered, injected graphs on one GPU and on two.

Plugins compute by their definitions in torch, because the interpreter is slow; tests/runtime runs their kernels.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from executable import executable_bundle, use
from gpus import HostDriver
from saved_layers import SavedLayer

from foldkv.cluster import Cluster
from foldkv.errors import EXIT_ENVIRONMENT, InputError, MissingDependencyError
from foldkv.export.checkpoint.reader import Checkpoint
from foldkv.plugins.declarations import PLUGINS
from foldkv.plugins.plans import Kernel
from foldkv.runtime import Model, Session
from foldkv.runtime import bundle as bundle_module
from foldkv.runtime.backend import Observed
from foldkv.runtime.device_buffers import DeviceBuffers
from foldkv.runtime.engine_part import EnginePart
from foldkv.runtime.engine_stage import _Lane
from foldkv.validation.reproducers import Reproducers
from foldkv.validation.result import ValidationResult
from foldkv.validation.settings import Plan
from foldkv.validation.validate import NOT_EXECUTED, validate

pytestmark = pytest.mark.slow
pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

PLAN = Plan(texts=1, text_tokens=48, distances=(4,), cases_per_distance=1, cases_per_kind=0, sweep_cases=0)
SCHEMA = json.loads(resources.files("foldkv.validation").joinpath("schema/report.schema.json").read_text())
#: A random model answers nothing.
SILENT = {"retrieval", "retrieval-test"}


@pytest.fixture(scope="module")
def engines(micro_graph: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Mapping[str | bytes, Kernel]]:
    """A bundle of engines for a100, and its kernels."""
    return executable_bundle(micro_graph, tmp_path_factory.mktemp("engines"))


@pytest.fixture
def gpus(engines: tuple[Path, Mapping[str | bytes, Kernel]], monkeypatch: pytest.MonkeyPatch) -> Iterator[HostDriver]:
    """Two GPUs, which must have got everything back at the end."""
    driver = HostDriver(devices=2, kernels=engines[1])
    driver.by_definition = frozenset(PLUGINS)
    use(monkeypatch, driver)
    yield driver
    assert driver.blocks == {} and set(driver.opened.values()) == {0}


def run(engines: tuple[Path, Any], checkpoint: Path, report: Path, **options: Any) -> ValidationResult:
    text = Path(__file__).parents[2] / "LICENSE"
    return validate(engines[0], checkpoint, report, plan=PLAN, text=text, **options)


def test_an_engine_holds_its_gates_on_one_gpu_and_on_two(
    engines: tuple[Path, Any], micro_checkpoint: Path, gpus: HostDriver, tmp_path: Path
) -> None:
    result = run(engines, micro_checkpoint, tmp_path / "one")
    assert {verdict.gate.name for verdict in result.verdicts if verdict.word != "holds"} == SILENT
    assert result.first_divergence is None and len(result.layers) == 3
    found, about = result.metrics, result.provenance
    assert 1e-7 < found["kl_mean"] < found["yardstick_kl_mean"], "bfloat16, and nearer to float32 than PyTorch's"
    assert all(0 < row.own < (row.yardstick or 0) < row.limit for row in result.layers)
    assert about["yardstick"].endswith("bfloat16") and about["reference"].endswith("float32")
    assert about["machine"].endswith("executed on GPU 0 (stand-in)")
    content = json.loads((tmp_path / "one" / "report.json").read_text())
    jsonschema.validate(content, SCHEMA)
    [gate] = [gate for gate in content["gates"] if gate["name"] == "kl-mean"]
    assert gate["yardstick"] == {"metric": "yardstick_kl_mean", "factor": 4}
    assert gate["threshold"] == pytest.approx(1e-6 + 4 * found["yardstick_kl_mean"]) and gate["changed"] is None
    assert any("recomputed" in note for note in content["notes"]) and content["selection"]
    [saved] = content["reproducers"]
    assert saved["name"] == "worst-case" and saved["not_saved"] is None
    _check_saved(tmp_path / "one" / "reproducers" / "worst-case", saved)
    page = (tmp_path / "one" / "report.html").read_text()
    assert "executed on GPU 0 (stand-in)" in page and "on the CPU" not in page and "bfloat16: " in page

    both = run(engines, micro_checkpoint, tmp_path / "two", devices=(1, 0))
    assert both.metrics == found and both.layers == result.layers, "the same bits on two GPUs"
    assert both.provenance["machine"].endswith("executed on GPU 1 (stand-in), GPU 0 (stand-in)")
    assert "--devices 1,0" in both.provenance["command"]


def _check_saved(folder: Path, row: dict[str, Any]) -> None:
    """A layer of an engine is saved as an export traces it: it computes in float32 what the reference does, and the engine what it does in
    bfloat16."""
    layer = SavedLayer.of(folder)
    assert layer.apart(layer.reference) < row["atol"] / 10
    apart = np.abs(layer.found - layer.bundle).max(axis=(0, 2, 3))
    loose = float(row["commands"][1].split("--atol ")[1].split()[0])
    assert row["atol"] < loose and 0 < np.median(apart) < loose


def test_files_with_weights_that_a_saved_layer_opens_are_closed(
    engines: tuple[Path, Any], micro_checkpoint: Path, gpus: HostDriver, tmp_path: Path
) -> None:
    def opened() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    checkpoint = Checkpoint(micro_checkpoint)
    shape = (5, checkpoint.spec.hc_mult, checkpoint.spec.hidden_size)
    streams = np.random.default_rng(0).random(shape, np.float32)
    with Model(engines[0]) as model:
        before = opened()
        with Reproducers(tmp_path, model, checkpoint) as cases:
            cases.save(
                "a-case", "of a test", layer=1, tokens=[1, 2, 3, 4, 5], before=streams, expected=streams, actual=streams,
                reference="a test",
            )  # fmt: skip
            assert cases.rows[0].not_saved is None and opened() > before
        assert opened() == before


def _weights(patch: pytest.MonkeyPatch, owner: str, role: str, change: Callable[[Any], Any]) -> None:
    """Another value of one weight of one layer, on the GPU."""
    from foldkv.runtime import engine_part

    copy, load = EnginePart._copy, engine_part.load_weight

    def copied(self: EnginePart, call: Any, address: int, lock: Any, files: Any, upload: Any) -> Any:
        stored = lock.weights[call.owner].get(role) if call.owner == owner else None

        def loaded(taken: Any, weight: Any, *rest: Any) -> Any:
            array = load(taken, weight, *rest)
            return change(np.array(array)) if weight is stored else array

        patch.setattr(engine_part, "load_weight", loaded)
        return copy(self, call, address, lock, files, upload)

    patch.setattr(EnginePart, "_copy", copied)


def _experts_swapped(patch: pytest.MonkeyPatch) -> None:
    """Two experts of a layer have each other's down-projections."""
    _weights(patch, "layers.2", "ffn.experts.w2", lambda value: value.reshape(4, -1)[[1, 0, 2, 3]])


def _gate_scaled(patch: pytest.MonkeyPatch) -> None:
    """The router's scores are those of a gate four times as large: bits of bfloat16 with two more in the exponent."""
    _weights(patch, "layers.1", "ffn.gate.weight", lambda value: np.where(value & 0x7F80, value + (2 << 7), value))


def _state_not_kept(patch: pytest.MonkeyPatch) -> None:
    """What a chunk writes of a layer's state does not reach the sequence's rows, as if an alias were ignored."""
    copy_back = _Lane._copy_back

    def forgetful(self: _Lane, slot: int) -> None:
        written = DeviceBuffers.slot
        with pytest.MonkeyPatch.context() as inner:
            spare = self._stage.space("elsewhere", 1 << 16)
            inner.setattr(
                DeviceBuffers,
                "slot",
                lambda self, tensor, at: spare if tensor.layer == 1 else written(self, tensor, at),
            )
            copy_back(self, slot)

    patch.setattr(_Lane, "_copy_back", forgetful)


@pytest.mark.parametrize(
    ("plant", "layer", "gates"),
    [
        (_experts_swapped, 2, {"kl-mean", "layers"}),
        (_gate_scaled, 1, {"layers"}),
        (_state_not_kept, 1, {"kl-mean", "layers"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_inside_a_segment_fails_its_gates_and_the_layer_is_named(
    plant: Callable[[pytest.MonkeyPatch], None],
    layer: int,
    gates: set[str],
    engines: tuple[Path, Any],
    micro_checkpoint: Path,
    gpus: HostDriver,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    result = run(engines, micro_checkpoint, tmp_path / "report", devices=(0, 1))
    assert gates <= {verdict.gate.name for verdict in result.verdicts if verdict.word == "fails"}
    assert result.first_divergence == layer
    assert [row.layer for row in result.layers if row.diverged] == [layer], "each layer is judged alone"
    page = (tmp_path / "report" / "report.html").read_text()
    assert f"The first layer that diverges is layer {layer}" in page and "Each layer was judged alone" in page


def test_without_the_gpu_nothing_is_measured_and_a_report_can_say_so(
    engines: tuple[Path, Any], micro_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle_module, "device_capability", lambda: None)
    with pytest.raises(
        MissingDependencyError, match=r"for a100 cannot be executed here, so nothing was measured"
    ) as caught:
        run(engines, micro_checkpoint, tmp_path / "report")
    assert "an NVIDIA GPU of compute capability 8.0 with its driver (libcuda.so.1); none was found" in str(caught.value)
    assert caught.value.exit_code == EXIT_ENVIRONMENT and not (tmp_path / "report").exists()
    monkeypatch.setattr(bundle_module, "device_capability", lambda: 90)
    result = run(engines, micro_checkpoint, tmp_path / "report", report_absent=True)
    assert (result.exit_code, result.passed, result.source) == (EXIT_ENVIRONMENT, False, NOT_EXECUTED)
    assert result.headline.startswith("not executed here: this machine lacks ") and "has 9.0" in result.headline
    assert {verdict.word for verdict in result.verdicts} == {"not informative"}
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    jsonschema.validate(content, SCHEMA)
    assert content["gates"][0]["value"] is None and content["provenance"]["machine"].endswith("not executed here")
    page, junit = ((tmp_path / "report" / name).read_text() for name in ("report.html", "junit.xml"))
    assert "Not executed here" in page and "executed on" not in page
    assert f'errors="{len(result.verdicts)}"' in junit and "not executed here" in junit
    # It has no figures to judge again: with the GPU it would be measured.
    assert run(engines, micro_checkpoint, tmp_path / "report", keep=True, report_absent=True).source == NOT_EXECUTED
    with pytest.raises(InputError, match=r"the longest case has 400 tokens; .* takes at most 256"):
        validate(engines[0], micro_checkpoint, tmp_path / "report", plan=Plan(text_tokens=400, distances=(4,)))


def test_an_observer_sees_the_streams_of_engines_whose_steps_are_not_captured_meanwhile(
    engines: tuple[Path, Any], gpus: HostDriver
) -> None:
    def decoded(devices: tuple[int, ...], watched: bool) -> tuple[list[np.ndarray], list[Observed]]:
        seen: list[Observed] = []

        def keep(one: Observed) -> None:
            seen.append(Observed(one.layer, one.slot, one.streams.copy()))

        with Session(engines[0], context=64, batch=2, devices=devices) as session:
            logits = [session.prefill([[65, 66, 67], [70]])]
            logits += [session.decode([71 + step, 72]) for step in range(2)]
            launched = gpus.calls.count("cuGraphLaunch")
            if watched:
                with session.observed(keep):
                    logits += [session.forward([[80, 81], []])[0], session.decode([73, 74]), session.decode([75, 76])]
                assert gpus.calls.count("cuGraphLaunch") == launched
            else:
                logits += [session.forward([[80, 81], []])[0], session.decode([73, 74]), session.decode([75, 76])]
                assert gpus.calls.count("cuGraphLaunch") > launched, "captured where nobody looks"
            logits.append(session.decode([77, 78]))
        return logits, seen

    plain, _ = decoded((0,), False)
    watched, seen = decoded((0, 1), True)
    for left, right in zip(watched, plain, strict=True):
        np.testing.assert_array_equal(left, right)
    assert [row.layer for row in seen] == [None, 0, 1, 2] * 3
    # A chunk is one sequence's, a step is of all; the second slot got no token in the chunk.
    assert [(row.slot, row.streams.shape[:2]) for row in seen[::4]] == [(0, (1, 2)), (None, (2, 1)), (None, (2, 1))]
    assert all(np.isfinite(row.streams).all() and row.streams.any() for row in seen)
    assert not any(np.array_equal(row.streams, later.streams) for row, later in itertools.pairwise(seen))


# Ray leaves files and sockets of its own to the interpreter.
@pytest.mark.filterwarnings("ignore")
def test_workers_answer_for_the_references_of_an_engine(
    engines: tuple[Path, Any], micro_checkpoint: Path, gpus: HostDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="the extra ray is 250 MB and not part of `make test`")
    asked, wait = set[str](), Cluster.wait
    monkeypatch.setattr(Cluster, "wait", lambda self, given, what: (asked.add(what), wait(self, given, what))[1])
    alone, there = (run(engines, micro_checkpoint, tmp_path / str(ray), threads=1, ray=ray) for ray in (None, "local"))
    assert asked == {"questions to the reference", "questions to the yardstick"}
    assert there.metrics == alone.metrics and there.layers == alone.layers and there.selection == alone.selection
