"""The GPU runtime, whole, over stand-ins that execute the lowered, injected graphs: on one GPU and on several."""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from executable import STATELESS, executable_bundle, use
from gpus import HostDriver

from foldkv.errors import FoldkvError, InputError
from foldkv.export.checkpoint.config_reader import spec_from_file
from foldkv.export.pack import pack
from foldkv.export.package import export_checkpoint
from foldkv.optimize.build import build_bundles
from foldkv.optimize.fit import plan_target
from foldkv.optimize.targets import load_targets
from foldkv.plugins import tensorrt
from foldkv.plugins.cuda import Device, Launcher
from foldkv.plugins.plans import Kernel
from foldkv.runtime import Model, Session
from foldkv.runtime.engine import _Link
from foldkv.runtime.engine_stage import EngineStage, _Lane

pytestmark = pytest.mark.slow
pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
PROMPTS = [[84, 104, 101, 40, 41, 42], [65]]
STEPS = [[70, 71], [72, 73], [74, 75]]


@dataclass(frozen=True)
class Made:
    """Bundles for the cpu and bundles of engines by layout, with the kernels that they launch. Packed rows are of the profile served."""

    checkpoint: Path
    cpu: dict[str, Path]
    engines: dict[str, Path]
    kernels: Mapping[str | bytes, Kernel]


@pytest.fixture(scope="module")
def made(micro_checkpoint: Path, micro_graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("executed")
    served = export_checkpoint(micro_checkpoint, folder / "served-graph", profile="served")
    cpu, engines, kernels = {}, {}, dict[str | bytes, Kernel]()
    for layout, package in (("dense", micro_graph), ("fp8+fp4", served)):
        [built] = build_bundles(package, folder / "cpu" / package.name, ["cpu"], layout=layout).results
        cpu[layout] = built.folder
        engines[layout], found = executable_bundle(package, folder / layout, layout=layout)
        kernels |= found
    return Made(micro_checkpoint, cpu, engines, kernels)


@pytest.fixture
def gpus(made: Made, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostDriver]:
    """Three GPUs, which must have got everything back at the end."""
    driver = HostDriver(devices=3, kernels=made.kernels)
    driver.by_definition = STATELESS
    use(monkeypatch, driver)
    yield driver
    assert driver.blocks == {} and set(driver.opened.values()) == {0}


def decoded(session: Session, *, whole: bool = True) -> list[np.ndarray[Any, Any]]:
    """Logits of the prompts and of three steps, with a chunk between them that needs more scratch memory than a step; or of the
    prompts and one step."""
    found = [session.prefill(PROMPTS)]
    found += [session.decode(step) for step in STEPS[: 2 if whole else 1]]
    if not whole:
        return [np.array(one) for one in found]
    found.append(session.forward([list(range(8)), []])[0])
    found.append(session.decode(STEPS[2]))
    return [np.array(one) for one in found]


def distance(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    return float(np.sqrt(np.mean(np.square(found - expected)) / np.mean(np.square(expected))))


@pytest.mark.parametrize(("layout", "bound"), [("dense", 0.03), ("fp8+fp4", 0.1)])
def test_engines_decode_as_the_cpu_bundle_does_on_any_number_of_gpus(
    layout: str, bound: float, made: Made, gpus: HostDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 has 8 bits. fp8 has 3 after the first: 6 % of a value, and FP4 index rows may choose other entries."""
    with Session(made.cpu[layout], context=64, batch=2) as session:
        expected = decoded(session)
    with Session(made.engines[layout], context=64, batch=2) as session:
        one = decoded(session)
        snapshot, state = session.snapshot(), session.state_bytes
        after = np.array(session.decode([1, 2]))
    assert gpus.calls.count("cuGraphLaunch") >= 2, "steps are captured from the second one on"
    errors = [distance(found, wanted) for found, wanted in zip(one, expected, strict=True)]
    assert max(errors) < bound and min(errors) > 1e-4, errors
    # Two GPUs that reach each other, three that do not, without capture: the same bits.
    for devices, peers, captures in (([1, 0], True, True), ([0, 1, 2], False, False)) if layout == "dense" else ():
        gpus.peers = peers
        before = gpus.calls.count("cuGraphLaunch")
        with Model(made.engines[layout], devices=devices) as model:
            monkeypatch.setattr(model._loaded, "captures", captures)
            with Session(model, context=64, batch=2) as session:
                assert session.state_bytes == state
                for found, wanted in zip(decoded(session, whole=captures), one, strict=False):
                    np.testing.assert_array_equal(found, wanted)
                session.reset()
                session.restore(snapshot)
                np.testing.assert_array_equal(session.decode([1, 2]), after)
        assert (gpus.calls.count("cuGraphLaunch") > before) == captures


def test_rows_move_between_engines_and_the_cpu_if_they_are_the_same(made: Made, gpus: HostDriver) -> None:
    """Packed rows are the same bytes everywhere. Dense ones are bfloat16 in engines and float32 on the cpu."""
    with (
        Session(made.engines["fp8+fp4"], context=64, batch=2, devices=[0, 1]) as engine,
        Session(made.cpu["fp8+fp4"], context=64, batch=2) as cpu,
    ):
        cpu.prefill(PROMPTS)
        before = cpu.snapshot()
        engine.restore(before)
        assert engine.positions.tolist() == [len(prompt) for prompt in PROMPTS]
        for rows, others in zip(before.rows, engine.snapshot().rows, strict=True):
            for one, other in zip(rows, others, strict=True):
                np.testing.assert_array_equal(one, other)
        assert distance(engine.decode([70, 71]), cpu.decode([70, 71])) < 0.05
        cpu.restore(engine.snapshot())
        assert distance(cpu.decode([72, 73]), engine.decode([72, 73])) < 0.05
        with Session(made.engines["dense"], context=64, batch=2) as other:
            with pytest.raises(InputError, match="the snapshot has profile hf; this session has served"):
                engine.restore(other.snapshot())
            with Session(made.cpu["dense"], context=64, batch=2) as float32, pytest.raises(
                InputError, match=r"has rows dense \(bfloat16, float32; .*this session has dense \(float32;"
            ):  # fmt: skip
                float32.restore(other.snapshot())


def test_sessions_of_two_threads_share_a_model(made: Made, gpus: HostDriver) -> None:
    def steps(session: Session) -> list[np.ndarray[Any, Any]]:
        return [np.array(session.decode([token])) for token in (65, 66, 67)]

    with Model(made.engines["dense"], devices=[0, 1], context=64, batch=2) as model:
        with Session(model, context=64) as session:
            alone = steps(session)
        with (
            Session(model, context=64) as one,
            Session(model, context=64) as two,
            concurrent.futures.ThreadPoolExecutor(2) as pool,
        ):
            together = [pool.submit(steps, session) for session in (one, two)]
            for future in together:
                np.testing.assert_array_equal(future.result(), alone)


def test_kernels_are_compiled_once_per_kind_of_layer_and_kept_for_the_next_process(
    made: Made, gpus: HostDriver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FOLDKV_CACHE", str(tmp_path))

    def compiled() -> int:
        gpus.calls.clear()
        with Session(made.engines["dense"], context=64) as session:
            session.decode([65])
        return sum(call.startswith("compile") for call in gpus.calls)

    kinds = 1 + 3 + 2  # the step, layers, and both ends
    assert compiled() == kinds and compiled() == 0
    [folder] = (tmp_path / "runtime").iterdir()
    assert folder.name == "sm80" and len(list(folder.iterdir())) == kinds
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:-1])  # a file that is damaged is not given to the library
    assert compiled() == kinds
    monkeypatch.setattr("engine.GPU", "another")
    assert compiled() == kinds, "the library refuses what another GPU compiled"
    monkeypatch.setenv("FOLDKV_CACHE", "/dev/null")
    assert compiled() == kinds, "a cache that cannot be written is not used"


def test_weights_are_verified_while_they_are_copied(made: Made, gpus: HostDriver, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be verified(.|\n)*foldkv pack --with-weights"):
        Model(made.engines["dense"], context=64, verify=True)
    pack(made.engines["dense"], tmp_path / "packed")
    with Session(tmp_path / "packed", context=64, devices=[0, 1], verify=True) as session:
        assert session.ready()
    file = min((tmp_path / "packed" / "weights").iterdir())
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()  # it may be the checkpoint's own file, linked
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"has sha256 .* the lock says"):
        Model(tmp_path / "packed", context=64, devices=[0, 1], verify=True)
    Model(tmp_path / "packed", context=64).close()


def test_weights_and_state_lie_on_the_gpu_that_computes_with_them(made: Made, gpus: HostDriver) -> None:
    with Model(made.engines["dense"], devices=[0, 1], context=64, batch=2) as model:
        parts = model._loaded.parts
        assert [part.device.ordinal for part in parts] == [0, 1]
        assert [call.owner for part in parts for call in part.calls] == [
            "embed",
            "layers.0",
            "layers.1",
            "layers.2",
            "head",
        ]
        held = [sum(b.numel() for a, b in gpus.blocks.items() if gpus._owners[a] == n) for n in (0, 1)]
        assert held == [part.weight_bytes for part in parts]
        with Session(model, context=64, batch=2) as session:
            costs = model._loaded.costs(64, 2)
            planned = plan_target(
                spec_from_file(made.checkpoint), load_targets()["a100"], context=64, batch=2, stored="bf16", chunk=1
            )
            assert costs == [sum(one) for one in zip(planned.call_weights["bf16"], planned.call_state, strict=True)]
            shares = planned.shares("bf16", 2)
            assert [(one.weights, one.calls) for one in shares] == [
                (part.weight_bytes, (start, start + len(part.calls) - 1))
                for part, start in zip(parts, (0, len(parts[0].calls)), strict=True)
            ]
            for number, part in enumerate(parts):
                own = [cost for cost, call in zip(costs, model._loaded.table.calls, strict=True) if call in part.calls]
                now = sum(b.numel() for a, b in gpus.blocks.items() if gpus._owners[a] == number)
                assert now == sum(own), "to the byte, before scratch memory"
            assert sum(costs) == sum(held) + session.state_bytes


def test_wrong_gpus_are_refused(made: Made, gpus: HostDriver) -> None:
    folder = made.engines["dense"]
    for devices, message in (
        ([], r"devices are \[\]; expected different numbers"),
        ([0, 0], r"devices are \[0, 0\]"),
        ([0, 7], r"GPU 7 was asked for; this machine has 0, 1, 2"),
    ):
        with pytest.raises(InputError, match=message):
            Session(folder, context=64, devices=devices)
    with pytest.raises(InputError, match="devices are for bundles with engines"):
        Session(made.cpu["dense"], context=64, devices=[0])
    gpus.devices = 6
    with pytest.raises(InputError, match="6 GPUs for a model of 5 segments"):
        Session(folder, context=64, devices=range(6))
    gpus.devices, gpus.limit = 3, 60_000
    with pytest.raises(
        InputError, match=r"the weights of .* on GPU 0, which it cannot allocate. Give the model more GPUs"
    ):
        Session(folder, context=64)


@pytest.fixture(scope="module")
def right(made: Made) -> np.ndarray[Any, Any]:
    """Logits of a first step on two GPUs, with no fault."""
    driver = HostDriver(devices=2, kernels=made.kernels)
    driver.by_definition = STATELESS
    with pytest.MonkeyPatch.context() as patch:
        use(patch, driver)
        with Session(made.engines["dense"], context=64, devices=[0, 1]) as session:
            return np.array(session.decode([65]))


def _without(method: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A driver whose call does nothing and says that it did."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(HostDriver, method, lambda self, *arguments: (0, 0) if "Create" in method else (0,))

    return plant


def _context_missing(patch: pytest.MonkeyPatch) -> None:
    """In the thread that calls, once the model is open."""
    opened = EngineStage.__init__

    def init(self: EngineStage, *arguments: Any) -> None:
        opened(self, *arguments)
        patch.setattr(Device, "current", lambda self: contextlib.nullcontext())

    patch.setattr(EngineStage, "__init__", init)


def _alias_ignored(patch: pytest.MonkeyPatch) -> None:
    bind = _Lane._bind
    patch.setattr(
        _Lane, "_bind", lambda self, owner, tensor, past, present: bind(self, owner, tensor, past, present + 256)
    )


def _streams_swapped(patch: pytest.MonkeyPatch) -> None:
    found = _Lane._flow_addresses

    def swapped(self: _Lane, given: Any) -> dict[str, int]:
        addresses = found(self, given)
        return addresses | {"streams.1": addresses["streams.0"]}

    patch.setattr(_Lane, "_flow_addresses", swapped)


def _attribute_on_one_device(patch: pytest.MonkeyPatch) -> None:
    prepare = Launcher.prepare
    patch.setattr(Launcher, "prepare", lambda self: None if self._prepared else prepare(self))


def _weights_off_by_one(patch: pytest.MonkeyPatch) -> None:
    made = EngineStage.__init__

    def init(self: EngineStage, model: Any, part: Any, *rest: Any) -> None:
        for roles in part.weights.values():
            names = [name for name in roles if name.endswith(("w1.weight", "w3.weight"))]
            if len(names) == 2:
                roles[names[0]], roles[names[1]] = roles[names[1]], roles[names[0]]
        made(self, model, part, *rest)

    patch.setattr(EngineStage, "__init__", init)


@pytest.mark.parametrize(
    "plant",
    [
        _context_missing, _alias_ignored, _streams_swapped, _attribute_on_one_device, _weights_off_by_one,
        _without("cuStreamSynchronize"), _without("cuStreamWaitEvent"), _without("cuMemcpyPeerAsync"),
    ],
    ids=lambda plant: getattr(plant, "__name__", ""),
)  # fmt: skip
def test_a_planted_fault_is_found(
    plant: Callable[[pytest.MonkeyPatch], None],
    made: Made,
    right: np.ndarray[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = HostDriver(devices=2, kernels=made.kernels)
    driver.by_definition = STATELESS
    use(monkeypatch, driver)
    found = None
    with monkeypatch.context() as patch, contextlib.suppress(AssertionError, LookupError, FoldkvError):
        plant(patch)
        session = Session(made.engines["dense"], context=64, devices=[0, 1])
        found = np.array(session.decode([65]))
    tensorrt._LIBRARIES.clear()  # the session cannot be closed: its state is broken
    tensorrt._USERS.clear()
    assert found is None or not np.array_equal(found, right)


def test_links_are_copies_of_streams_only(made: Made, gpus: HostDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    hand_over = _Link.hand_over

    def noted(self: _Link, given: Any, slot: int | None) -> None:
        sizes.append(self._source.streams_out(given, slot)[1])
        hand_over(self, given, slot)

    monkeypatch.setattr(_Link, "hand_over", noted)
    with Session(made.engines["dense"], context=64, batch=2, devices=[0, 1]) as session:
        session.decode([65, 66])
    assert sizes == [2 * 4 * 64 * 4]  # sequences, streams, channels, bytes
