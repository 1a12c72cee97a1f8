"""Tasks on a Ray cluster: what becomes of those that cannot run, are lost, or are given up. Most of it needs the extra ``ray``."""

from __future__ import annotations

import importlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from foldkv import cluster as module
from foldkv.cluster import LOCAL, Cluster, is_here, tasks_on
from foldkv.errors import FoldkvError, InputError, MissingDependencyError

# Ray leaves files and sockets of its own to the interpreter.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    pytest.importorskip("ray", reason="the extra ray is 250 MB and not part of `make test`")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "127.0.0.1:9")  # of some cluster that Ray would take by itself
        with Cluster(LOCAL, "build with Ray", processors=2) as opened:
            yield opened


def test_answers_are_those_of_the_function_and_its_errors_are_raised_here(cluster: Cluster) -> None:
    def halves(number: int) -> list[int]:
        return [number // 2, number - number // 2]

    def refuses() -> None:
        raise InputError("no such thing")

    assert cluster.processors == 2
    assert [cluster.tasks_here(each) for each in (1, 2, 64)] == [2, 1, 1]
    assert [cluster.wait(one, "a half") for one in cluster.give(halves, 7, answers=2)] == [3, 4]
    [refused] = cluster.give(refuses)
    with pytest.raises(InputError, match=r"^no such thing$"):
        cluster.wait(refused, "it")
    # No node has so many processors; the task runs all the same.
    [wide] = cluster.give(lambda: 5, processors=64)
    assert cluster.wait(wide, "a number") == 5


def test_only_nodes_on_this_machine_count_here() -> None:
    # As ray.nodes() gives them; the two addresses of others are of nobody (RFC 5737, RFC 3849).
    here, other = socket.gethostname(), f"not-{socket.gethostname()}"
    nodes = [
        {"NodeManagerAddress": address, "NodeManagerHostname": name, "Resources": {"CPU": processors}}
        for address, name, processors in (
            ("127.0.0.1", here, 4.0),
            ("127.0.0.1", other, 64.0),  # a tunnel leads to it
            ("198.51.100.7", here, 64.0),  # two machines with one name
            ("2001:db8::7", other, 64.0),
        )
    ]
    nodes.append({"NodeManagerAddress": "127.0.0.1", "NodeManagerHostname": here, "Resources": {}})  # of GPUs alone
    assert [is_here(node) for node in nodes] == [True, False, False, False, True]
    own = [node for node in nodes if is_here(node)]
    assert [tasks_on(own, each) for each in (1, 2, 3, 4, 8)] == [4, 2, 1, 1, 0]
    assert tasks_on(nodes[1:4], 16) == 12 and tasks_on([], 1) == 0
    assert tasks_on(own, 0) == 2


def test_a_function_that_a_worker_does_not_find_is_one_error(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").write_text("def work():\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    [task] = cluster.give(importlib.import_module("only_here").work)
    with pytest.raises(MissingDependencyError, match=r"cannot run foldkv: .*No module named 'only_here'"):
        cluster.wait(task, "it")
    del sys.modules["only_here"]


def test_a_task_whose_workers_are_lost_again_and_again_is_one_error(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AGAIN", 1)
    [task] = cluster.give(lambda: os._exit(1))
    with pytest.raises(MissingDependencyError, match=r"lost a share 2 times .*leave out --ray"):
        cluster.wait(task, "a share")


def test_the_end_lets_those_go_who_wait(cluster: Cluster) -> None:
    said = list[str]()

    def wait() -> None:
        try:
            cluster.wait(endless, "a sleep")
        except FoldkvError as error:
            said.append(str(error))

    [endless] = cluster.give(lambda: time.sleep(1000))
    waiting = threading.Thread(target=wait)
    waiting.start()
    cluster.end()
    waiting.join(5)
    assert said == ["a sleep was given up, because the run ended."]
