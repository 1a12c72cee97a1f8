"""The command under load, killed in the middle of it and started again, as benchmarks/serving_load.py does it for longer."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def serving_load() -> ModuleType:
    path = Path(__file__).parents[3] / "benchmarks" / "serving_load.py"
    spec = importlib.util.spec_from_file_location("serving_load", path)
    assert spec and spec.loader
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_every_answer_is_the_one_given_alone_and_a_kill_loses_no_kept_state(
    serving_load: ModuleType, tiny_bundle: Path
) -> None:
    found = serving_load.measure(
        tiny_bundle, clients=12, seconds=2.0, kill_after=0.5, count=6, longest=100, invariant=True
    )
    load, kill = found["load"], found["kill"]
    assert len(load["answered_by_kind"]) > 1 and len(load["answered_by_kind"]) <= 5
    assert load["wrong"] == [] and set(load["ended"]) <= {"answered", "left"} and load["ended"]["answered"] > 5
    assert load["left_in_the_engine"] == 0 and load["same_afterwards"]
    assert load["memory_bytes"]["last"] - load["memory_bytes"]["first"] < 48 << 20, "the room for kept states is 32 MiB"
    assert kill["answered_before"] > 0 and kill["wrong"] == [] and kill["files"] > 0 and kill["damaged"] == 0
    assert kill["same"] and kill["tokens_from_before"] > 0 and found["exit_code"] == 0
