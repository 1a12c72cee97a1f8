"""Cases answered by the workers of a Ray cluster, https://docs.ray.io. Each opens the bundle and the reference once, from the same paths.

A case is a question from an empty state, so its answer does not depend on who answers it: the figures are those of a run without. A
worker whose files, packages or threads would compute otherwise is refused. A share whose worker is lost is answered again by another.
"""

from __future__ import annotations

import platform
import re
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ..errors import FoldkvError, InputError, MissingDependencyError, listing
from ..export.checkpoint.reader import Checkpoint
from ..packages import require
from ..progress import Progress
from ..runtime.backend import default_threads
from ..runtime.model import Model
from .behaviour import is_answer
from .environment import environment
from .jobs import Job
from .layered_runner import LayeredRunner
from .layered_subject import open_subject
from .runners import Reference, Runner, Subject, TransformersRunner, torch_threads

#: The tokens that are fed, and those that should be the likeliest after the last of them.
Question = tuple[list[int], list[int]]
#: The address that means a cluster of this machine's own processors, for this run.
LOCAL = "local"
#: Questions of a share. A lost worker loses no more than this.
SHARE = 8
#: How often a share is answered again whose worker was lost.
_AGAIN = 8


@dataclass(frozen=True)
class Sources:
    """What a worker opens, and what it must find.

    Attributes:
        bundle, checkpoint: folders, which all workers see under the same path.
        digest: of the bundle.
        identity: of the checkpoint.
        allowed: keys of the checkpoint's config.json to ignore.
        environment: versions of Python and of packages.
        threads: of the reference and the subject.
        whole: the reference in memory, else layer by layer.
        context: tokens of the longest question.
        matrices: how the subject reads the matrices of a large model.
    """

    bundle: str
    checkpoint: str
    digest: str
    identity: str
    allowed: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    threads: int
    whole: bool
    context: int
    matrices: str


def answers(runner: Runner, tokens: list[int], answer: list[int]) -> bool:
    """Whether the greedy continuation is the answer: every answer token is the likeliest one."""
    return is_answer(answer, runner.logits(tokens, last=len(answer)))


class Cluster:
    """A Ray cluster that answers questions. A context manager; leaving it ends what it started.

    Raises:
        MissingDependencyError: Ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, address: str, sources: Sources) -> None:
        """Connect to ``address``, or start a cluster on this machine if that is "local"."""
        require("validate with Ray")
        import ray

        self._ray: Any = ray
        self._sources = sources
        where: dict[str, Any] = (
            {"num_cpus": default_threads(), "include_dashboard": False} if address == LOCAL else {"address": address}
        )
        try:
            _reach(address)
            ray.init(**where, logging_level="ERROR", log_to_driver=False)
        except (OSError, RuntimeError, ValueError) as error:
            raise MissingDependencyError(
                f"there is no Ray cluster at {address!r} ({str(error).strip().splitlines()[0][:200]}). Start one with `ray start --head` and "
                f"give its address, or give {LOCAL!r}."
            ) from None

    def ask(self, questions: Sequence[Question]) -> list[Any]:
        """Begin to answer; :meth:`collect` takes what this returns."""
        workers = max(1, int(self._ray.cluster_resources().get("CPU", 1)) // self._sources.threads)
        # Each pass through a reference that is computed layer by layer reads all weights.
        size = SHARE if self._sources.whole else -(-len(questions) // workers)
        task = self._ray.remote(num_cpus=self._sources.threads, max_retries=_AGAIN)(_answer)
        sources = self._ray.put(self._sources)
        return [task.remote(sources, list(questions[at : at + size])) for at in range(0, len(questions), size)]

    def collect(self, shares: Sequence[Any], progress: Progress) -> npt.NDArray[np.bool_]:
        """Whether reference and subject answered each question: [2, n].

        Raises:
            FoldkvError: a worker cannot answer, or workers were lost again and again.
        """
        found = []
        for number, share in enumerate(shares):
            progress.steps(number, len(shares), "shares of the cases")
            try:
                found += self._ray.get(share)
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, FoldkvError) else error from None
            except self._ray.exceptions.RayError as error:
                raise MissingDependencyError(
                    f"the Ray cluster lost a share of the cases {_AGAIN + 1} times ({str(error).strip().splitlines()[0][:200]}). "
                    "Look at its memory, or validate without --ray."
                ) from None
        return np.array(found, bool).reshape(-1, 2).T

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()


def _reach(address: str) -> None:
    """Connect to ``host:port`` and leave: Ray itself tries for many minutes.

    Raises:
        OSError: nobody answers.
    """
    if found := re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d+)", address):
        socket.create_connection((found[1], int(found[2])), timeout=10).close()


#: In a worker: what it has opened, and how to close it.
_opened: dict[Sources, tuple[ExitStack, Reference, Subject]] = {}


def _answer(sources: Sources, questions: list[Question]) -> list[tuple[bool, bool]]:
    """In a worker: whether reference and subject answer each question."""
    if sources not in _opened:
        for stack, *_ in _opened.values():
            stack.close()
        _opened.clear()
        _opened[sources] = _open(sources)
    _, reference, subject = _opened[sources]
    with torch_threads(sources.threads):
        reference.prepare([Job(tokens, last=len(answer)) for tokens, answer in questions])
        subject.announce(logits=[(tokens, len(answer)) for tokens, answer in questions])
        return [(answers(reference, *question), answers(subject, *question)) for question in questions]


def _open(sources: Sources) -> tuple[ExitStack, Reference, Subject]:
    with ExitStack() as stack:
        checkpoint = Checkpoint(Path(sources.checkpoint), allow_unknown_keys=sources.allowed)
        model = stack.enter_context(Model(Path(sources.bundle), threads=sources.threads, matrices=sources.matrices))
        _refuse_others(sources, checkpoint, model)
        subject: Subject = stack.enter_context(open_subject(model, context=sources.context, layered=not sources.whole))
        reference: Reference = (
            TransformersRunner(checkpoint.folder, allow_unknown_keys=sources.allowed)
            if sources.whole
            else LayeredRunner(checkpoint)
        )
        return stack.pop_all(), reference, subject


def _refuse_others(sources: Sources, checkpoint: Checkpoint, model: Model) -> None:
    here = environment(model.bundle)
    findings = [
        f"{name} {here.get(name, 'is missing')}, expected {version}"
        for name, version in sources.environment
        if here.get(name) != version
    ]
    findings += ["another bundle"] if model.bundle.digest != sources.digest else []
    findings += ["another checkpoint"] if checkpoint.identity() != sources.identity else []
    if findings:
        title = f"a worker of the Ray cluster on {platform.node()} would compute something else"
        raise InputError(
            listing(title, findings, "Give all nodes the same packages and the same files under the same paths.")
        )
