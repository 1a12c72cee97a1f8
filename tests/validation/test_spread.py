"""Cases on a Ray cluster: the report is that of a run without, also if a worker is killed in the middle. Needs the extra ``ray``."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from foldkv.errors import InputError, MissingDependencyError
from foldkv.runtime import Model
from foldkv.validation import spread
from foldkv.validation.settings import Plan
from foldkv.validation.validate import validate

pytestmark = pytest.mark.slow
pytest.importorskip("ray", reason="the extra ray is 250 MB and not part of `make test`")


def workers() -> set[int]:
    """Processes of Ray that answer cases now."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(b"ray::_answer"):
                found.add(int(path.parent.name))
    return found


# Ray leaves files and sockets of its own to the interpreter.
@pytest.mark.filterwarnings("ignore")
def test_the_figures_are_those_of_a_run_without_even_if_a_worker_is_killed(
    tiny_bundle: Path, tiny_checkpoint: Path, tiny_report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed, left, collect = list[int](), list[Any](), spread.Cluster.collect

    def kill_one(cluster: spread.Cluster, shares: Sequence[Any], *rest: Any) -> Any:
        cluster._ray.wait(list(shares), num_returns=1)
        while not (found := workers()):  # between two shares
            assert cluster._ray.wait(list(shares), num_returns=len(shares), timeout=0)[1], "all is answered"
        killed.append(min(found))
        os.kill(killed[0], signal.SIGKILL)
        left.extend(cluster._ray.wait(list(shares), num_returns=len(shares), timeout=0)[1])
        return collect(cluster, shares, *rest)

    monkeypatch.setattr(spread.Cluster, "collect", kill_one)
    monkeypatch.setattr(spread, "SHARE", 1)
    monkeypatch.setattr(spread, "default_threads", lambda: 2)
    expected = json.loads((tiny_report / "report.json").read_text())
    plan = {name: tuple(v) if isinstance(v, list) else v for name, v in expected["provenance"]["plan"].items()}
    text = tiny_report.parent / "tiny-report-text.txt"
    validate(
        tiny_bundle,
        tiny_checkpoint,
        tmp_path / "report",
        plan=Plan(**plan),
        text=text,
        gates={"kl-mean": 1e-3},
        ray="local",
    )
    assert left and len(killed) == 1, "a worker was killed while it answered, and shares were left"
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    for content in (found, expected):
        content["provenance"] = {k: v for k, v in content["provenance"].items() if k not in ("date", "command")}
    assert found == expected


def test_a_worker_that_would_compute_otherwise_is_refused(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    with Model(tiny_bundle) as model:
        right = spread.Sources(
            str(tiny_bundle),
            str(tiny_checkpoint),
            model.bundle.digest,
            "0" * 64,
            (),
            (("torch", "0.1"),),
            1,
            True,
            64,
            "auto",
        )
    with pytest.raises(InputError, match=r"(?s)torch .* expected 0\.1.*another checkpoint"):
        spread._open(right)


@pytest.mark.filterwarnings("ignore")
def test_no_cluster_at_an_address_is_one_error(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match="there is no Ray cluster at"):
        validate(
            tiny_bundle, tiny_checkpoint, tmp_path / "report", plan=Plan(texts=1, text_tokens=32), ray="127.0.0.1:1"
        )
    assert not (tmp_path / "report").exists()
