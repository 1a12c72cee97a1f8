"""Sides in front of a Ray cluster: the report is that of a run without, also if a worker is killed in the middle. Needs the extra ``ray``."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foldkv.cluster import Cluster
from foldkv.errors import MissingDependencyError
from foldkv.validation import spread
from foldkv.validation.settings import Plan
from foldkv.validation.spread_worker import CHOICES, ORACLE, REFERENCE, SUBJECT
from foldkv.validation.validate import validate

# Ray leaves files and sockets of its own to the interpreter.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("ray", reason="the extra ray is 250 MB and not part of `make test`")
PLAN = Plan(texts=3, text_tokens=96, distances=(16, 32), cases_per_distance=3, cases_per_kind=1, sweep_cases=0)


def workers() -> set[int]:
    """Processes of Ray that answer questions now."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(b"ray::answer"):
                found.add(int(path.parent.name))
    return found


@contextlib.contextmanager
def one_killed() -> Any:
    """Kill the first worker that answers while another one does, as soon as there are two; gives its number in a list."""
    killed, over = list[int](), threading.Event()

    def kill() -> None:
        while not over.wait(0.01):
            if len(found := workers()) > 1:
                killed.append(min(found))
                os.kill(killed[0], signal.SIGKILL)
                return

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield killed
    finally:
        over.set()
        killer.join()


def figures(folder: Path) -> dict[str, Any]:
    """A report without its date and command."""
    content: dict[str, Any] = json.loads((folder / "report.json").read_text())
    for name in ("date", "command"):
        del content["provenance"][name]
    return content


@pytest.fixture
def reported(tiny_checkpoint: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Gives the figures of a validation of a bundle."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {number} says {number * number} and nothing else.\n" for number in range(60)))
    return lambda bundle, name, **options: (
        validate(bundle, tiny_checkpoint, tmp_path / name, plan=PLAN, text=text, threads=1, **options),
        figures(tmp_path / name),
    )[1]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What two workers were asked for, and answered."""
    found, wait = set[str](), Cluster.wait
    monkeypatch.setattr(Cluster, "wait", lambda self, given, what: (found.add(what), wait(self, given, what))[1])
    monkeypatch.setattr("foldkv.validation.validate.default_threads", lambda: 2)
    return found


def test_the_figures_are_those_of_a_run_without_even_if_a_worker_is_killed(
    tiny_bundle: Path, reported: Callable[..., dict[str, Any]], asked: set[str]
) -> None:
    with one_killed() as killed:
        found = reported(tiny_bundle, "spread", ray="local")
    assert len(killed) == 1
    assert asked == {f"questions to {side}" for side in (SUBJECT, CHOICES, REFERENCE)}
    assert found == reported(tiny_bundle, "alone")


@pytest.mark.parametrize("layered", [False, True], ids=["whole", "layered"])
def test_oracle_and_models_that_go_a_layer_at_a_time(
    layered: bool,
    served_bundles: dict[str, Path],
    reported: Callable[..., dict[str, Any]],
    asked: set[str],
) -> None:
    bundle = served_bundles["fp8+fp4"]
    assert reported(bundle, "spread", ray="local", layered=layered) == reported(bundle, "alone", layered=layered)
    assert asked == {f"questions to {side}" for side in (SUBJECT, CHOICES, REFERENCE, ORACLE)}


def test_shares_are_of_one_size_and_lose_nothing() -> None:
    sizes = [(str(number), 1 + number % 5) for number in range(40)]
    for parts, most in ((1, 40), (3, 40), (8, 40), (4, 3), (100, 8)):
        found = spread.shares(sizes, parts, most)
        assert [name for share in found for name in share] == [name for name, _ in sizes]
        assert all(0 < len(share) <= most for share in found)
        if most == len(sizes):
            assert len(found) == parts
            told = [sum(dict(sizes)[name] for name in share) for share in found]
            assert max(told) - min(told) <= 2 * 5
    assert spread.shares([], 2, 0) == []


def test_no_cluster_at_an_address_is_one_error(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match="there is no Ray cluster at"):
        validate(
            tiny_bundle, tiny_checkpoint, tmp_path / "report", plan=Plan(texts=1, text_tokens=32), ray="127.0.0.1:1"
        )
    assert not (tmp_path / "report").exists()
