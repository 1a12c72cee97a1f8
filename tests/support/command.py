"""The command line as processes of their own: with packages hidden, with signals, in a terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HIDDEN = Path(__file__).parent / "hidden"


def environment(hide: Sequence[str] = (), front: Path | None = None) -> dict[str, str]:
    """The environment of a process that does not find some modules; ``front`` comes first in its path."""
    paths = [*([str(front)] if front else []), *([str(HIDDEN)] if hide else []), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path), "FOLDKV_HIDE": ",".join(hide),
    }  # fmt: skip


def _hear_interrupts() -> None:
    """Tests that run in the background would pass on that they ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(
    *arguments: object, hide: Sequence[str] = (), front: Path | None = None, code: str = ""
) -> subprocess.Popen[str]:
    """``foldkv ARGUMENTS``, or Python code with these arguments, in a session of its own."""
    command = [sys.executable, *(["-c", code] if code else ["-m", "foldkv"]), *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(hide, front),
        start_new_session=True, preexec_fn=_hear_interrupts,  # noqa: PLW1509
    )  # fmt: skip


def run(
    *arguments: object, hide: Sequence[str] = (), front: Path | None = None, code: str = ""
) -> tuple[int, str, str]:
    """The exit code, stdout and stderr of :func:`start`."""
    with start(*arguments, hide=hide, front=front, code=code) as process:
        out, err = process.communicate(timeout=180)
    return process.returncode, out, err
