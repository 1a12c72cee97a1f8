"""What a worker of a cluster opens, without a cluster: it refuses what would compute otherwise, and keeps in files what room.py does not count."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from mappings import in_files

from foldkv.errors import InputError
from foldkv.export.checkpoint.reader import Checkpoint
from foldkv.runtime.bundle import load_bundle
from foldkv.validation.environment import environment, instructions
from foldkv.validation.jobs import Job
from foldkv.validation.spread_worker import CHOICES, ORACLE, REFERENCE, SUBJECT, YARDSTICK, Sources, Worker


@pytest.fixture
def sources(tiny_checkpoint: Path) -> Callable[[Path], Sources]:
    """Gives what a worker is asked for that answers here, a layer at a time."""

    def of(folder: Path) -> Sources:
        bundle, checkpoint = load_bundle(folder), Checkpoint(tiny_checkpoint)
        return Sources(
            str(folder), str(tiny_checkpoint), bundle.digest, checkpoint.identity(), tuple(checkpoint.allowed_keys),
            tuple(environment(bundle).items()), instructions(), 1, False, 64, "auto",
        )  # fmt: skip

    return of


def test_a_worker_that_would_compute_otherwise_is_refused(
    tiny_bundle: Path, sources: Callable[[Path], Sources]
) -> None:
    wrong = replace(
        sources(tiny_bundle),
        identity="0" * 64,
        environment=(("torch", "0.1"),),
        instructions=instructions() | {"avx4096"},
    )
    with pytest.raises(
        InputError, match=r"(?s)torch .* expected 0\.1.*another checkpoint.*another processor.*without avx4096"
    ):
        Worker(wrong)


@pytest.mark.slow
def test_a_worker_that_goes_a_layer_at_a_time_has_its_answers_in_files(
    served_bundles: dict[str, Path],
    sources: Callable[[Path], Sources],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    texts = [list(range(2, 50)), list(range(9, 57))]
    jobs = [Job(text) for text in texts]
    worker = Worker(sources(served_bundles["fp8+fp4"]))
    [folder] = tmp_path.glob("foldkv-worker-*")
    logits = [
        *worker.answers(SUBJECT, [*jobs, *(Job(text, edges=[16]) for text in texts)]),
        *(one.logits for side in (REFERENCE, YARDSTICK, ORACLE) for one in worker.answers(side, jobs)),
    ]
    chosen = worker.answers(CHOICES, jobs)
    assert len(logits) == 10 and all(in_files(one, folder) for one in logits)
    assert all(one and all(in_files(entries, folder) for entries in one.values()) for one in chosen)
    assert list(folder.iterdir()) == []
    # Of the reference with the choices of the bundle, also what it says about them.
    readings = worker.answers(
        REFERENCE, [Job(text, chosen=entries) for text, entries in zip(texts, chosen, strict=True)]
    )
    assert all(in_files(one.logits, folder) and one.selections for one in readings)
    assert all(in_files(one.mass, folder) for read in readings for one in read.selections.values() if one.mass.size)
    worker.close()
    assert not folder.exists()


def test_what_a_killed_worker_left_is_removed_by_the_next_and_what_a_living_one_has_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sources: Callable[[Path], Sources], tiny_bundle: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    living, killed, elsewhere = Worker(sources(tiny_bundle)), tmp_path / "foldkv-worker-killed", tmp_path / "elsewhere"
    [own] = tmp_path.glob("foldkv-worker-*")
    for folder in (killed, elsewhere):
        (folder / "kept").mkdir(parents=True)
    (tmp_path / "foldkv-worker-link").symlink_to(elsewhere)
    Worker(sources(tiny_bundle)).close()
    assert own.is_dir() and not killed.exists() and (elsewhere / "kept").is_dir()
    living.close()
    assert not own.exists()
