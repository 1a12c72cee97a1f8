"""Tasks on the workers of a Ray cluster, https://docs.ray.io: connect, give a task, wait for what it returns, end.

A task is a function of its arguments alone, so it does not matter which worker runs it. One whose worker is lost is run again by another.
Everything else about a task is in `optimize/cluster_build.py` and `validation/spread.py`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import platform
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

from .errors import FoldkvError, InputError, MissingDependencyError, listing
from .packages import require

#: The address that means a cluster of this machine's own processors, for this run.
LOCAL = "local"
#: How often a task is run again whose worker was lost.
AGAIN = 8
# In Ray's error for a function whose module a worker does not find.
_UNKNOWN = "failed to import on the worker"
# Ray does not tell lost connections from refused ones, and tries for many minutes.
_CONNECT_SECONDS = 10


class Cluster:
    """A Ray cluster. A context manager; leaving it ends what it started. Its methods can be called from several threads."""

    def __init__(self, address: str, feature: str, *, processors: int) -> None:
        """Connect to ``address``, or start a cluster on this machine if that is "local".

        Args:
            address: ``host:port``, or "local".
            feature: in the table of packages, what needs Ray.
            processors: of a cluster on this machine.

        Raises:
            MissingDependencyError: Ray is not installed, or there is no cluster at the address.
        """
        require(feature)
        import ray

        self._ray: Any = ray
        self._ended: concurrent.futures.Future[None] = concurrent.futures.Future()
        where: dict[str, Any] = {"address": address}
        if address == LOCAL:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report the run to its makers
            where |= {"num_cpus": processors, "include_dashboard": False}
        try:
            _reach(address)
            with _signals_kept():
                ray.init(**where, logging_level="ERROR", log_to_driver=False)
            # A task that wants more processors than any node has would wait for ever.
            self._nodes = [node for node in ray.nodes() if node["Alive"]]
            self._largest = max(map(_processors, self._nodes))
        except (OSError, RuntimeError, ValueError) as error:
            if address == LOCAL:
                raise MissingDependencyError(
                    f"Ray cannot start a cluster on this machine ({_reason(error)})."
                ) from None
            raise MissingDependencyError(
                f"there is no Ray cluster at {address!r} ({_reason(error)}). Start one with `ray start --head` and "
                f"give its address, or give {LOCAL!r}. One that asks for a token also needs RAY_AUTH_MODE=token, as Ray's documentation says."
            ) from None

    @property
    def processors(self) -> int:
        """Of all nodes together."""
        return int(self._ray.cluster_resources().get("CPU", 1))

    def tasks_here(self, processors: int) -> int:
        """Tasks that run on this machine at once, of those that take so many processors; 0 if it is no node of the cluster."""
        return tasks_on([node for node in self._nodes if is_here(node)], min(processors, self._largest))

    def shared(self, value: Any) -> Any:
        """An argument for several tasks, which is sent to each node once."""
        return self._ray.put(value)

    def give(self, function: Callable[..., Any], *arguments: Any, processors: int = 1, answers: int = 1) -> list[Any]:
        """Begin a task; :meth:`wait` takes each of its answers.

        Args:
            function: of a module of foldkv, which each node has. If there are several answers, it returns a list of them.
            arguments: of the function.
            processors: that the task takes.
            answers: how many there are.
        """
        task = self._ray.remote(num_cpus=min(processors, self._largest), num_returns=answers, max_retries=AGAIN)(
            function
        )
        found = task.remote(*arguments)
        return found if isinstance(found, list) else [found]

    def wait(self, answer: Any, what: str) -> Any:
        """The value of an answer, as soon as it is there.

        Raises:
            FoldkvError: the task raised it; or the cluster lost ``what`` again and again, or has ended.
        """
        # A thread that waits in Ray itself would not hear that the cluster is ended.
        value = answer.future()
        concurrent.futures.wait([value, self._ended], return_when=concurrent.futures.FIRST_COMPLETED)
        if not value.done():
            raise FoldkvError(f"{what} was given up, because the run ended.")
        try:
            return value.result()
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, FoldkvError):
                raise error.cause from None
            if _UNKNOWN in str(error.cause) or isinstance(error.cause, ImportError):
                raise MissingDependencyError(
                    f"a worker of the Ray cluster cannot run foldkv: {str(error.cause).strip().splitlines()[-1]}. Install the same "
                    "packages on all nodes."
                ) from None
            raise
        except self._ray.exceptions.RayError as error:
            raise MissingDependencyError(
                f"the Ray cluster lost {what} {AGAIN + 1} times ({_reason(error)}). Look at its memory, or leave out --ray."
            ) from None

    def end(self) -> None:
        """Let every thread go that waits for an answer."""
        with contextlib.suppress(concurrent.futures.InvalidStateError):  # it has ended already
            self._ended.set_result(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._ray.shutdown()


def is_here(node: Mapping[str, Any]) -> bool:
    """Whether a node, as ``ray.nodes()`` gives it, is on this machine: it has this machine's name, and an address that is one of its own.

    A process that only speaks to a cluster (``ray://``) is told of the node that it speaks to, so Ray's own word for "here" does not say it.
    """
    address = node["NodeManagerAddress"]
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family) as own:
            own.bind((address, 0))  # which the system refuses for an address of another machine
    except OSError:
        return False
    return bool(node["NodeManagerHostname"] == socket.gethostname())


def tasks_on(nodes: Sequence[Mapping[str, Any]], processors: float) -> int:
    """Tasks that these nodes run at once, of those that take so many processors; if that is 0, one for each node."""
    return sum(int(_processors(node) // processors) if processors else 1 for node in nodes)


def _processors(node: Mapping[str, Any]) -> float:
    found: float = node["Resources"].get("CPU", 0.0)
    return found


def refuse_others(
    expected: Mapping[str, str], found: Mapping[str, str], others: Sequence[str] = (), *, step: str
) -> None:
    """In a worker: refuse it if its packages differ.

    Args:
        expected: versions by package.
        found: those of this worker.
        others: what else differs, in words.
        step: what to do next.

    Raises:
        InputError: this worker would give something else; all differences are named.
    """
    findings = [
        f"{name} {found.get(name, 'is missing')}, expected {version}"
        for name, version in expected.items()
        if found.get(name) != version
    ]
    if findings or others:
        title = f"a worker of the Ray cluster on {platform.node()} would compute something else"
        raise InputError(listing(title, [*findings, *others], step))


def _reason(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray takes SIGTERM over and would end the process itself: give it back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _reach(address: str) -> None:
    """Connect to ``host:port`` and leave.

    Raises:
        OSError: nobody answers.
    """
    if found := re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d+)", address):
        socket.create_connection((found[1], int(found[2])), timeout=_CONNECT_SECONDS).close()
