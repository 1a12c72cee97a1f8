"""A check in a child process with a time limit, so that a crash or a hang in native code ends that check alone.

The child keeps what it finds in a file after every step of its work. So the parent knows where it stopped, why, and what the
library logged, whatever ended it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from foldkv.errors import MissingDependencyError

_MESSAGES, _LATEST, _TEXT = 60, 40, 500
_NOTES, _LOG = "notes.json", "messages.jsonl"


class Notes:
    """What a check has found, in a file after every step, so that it is there whatever ends the process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.content: dict[str, Any] = {}

    def at(self, stage: str) -> None:
        """Say what is done next."""
        self.keep(stage=stage)

    def keep(self, **facts: Any) -> None:
        """Keep facts."""
        self.content |= facts
        (self._folder / _NOTES).write_text(json.dumps(self.content, default=str))


#: Does a check, keeps notes, and returns what failed, or "". Its arguments come after the check's name: ``NAME:ARGUMENT:...``.
Check = Callable[..., str]


def perform(name: str, folder: Path, checks: Mapping[str, Check]) -> None:
    """Do a check in this process, with notes in ``folder``; whatever it raises is in them."""
    notes = Notes(folder)
    kind, *arguments = name.split(":")
    try:
        notes.keep(failure=checks[kind](notes, *arguments), finished=True)
    except MissingDependencyError as error:
        notes.keep(no_gpu=str(error))
    except BaseException as error:  # noqa: BLE001 - the parent reads it
        notes.keep(error=f"{type(error).__name__}: {error}", traceback=traceback.format_exc()[-2000:])
        traceback.print_exc()


def child(name: str, folder: Path, checks: Mapping[str, Check]) -> None:
    """Do a check and end the process; the library's messages go to ``folder`` too."""
    from foldkv.runtime.engine_model import log

    log.setLevel(logging.DEBUG)
    log.propagate = False
    log.addHandler(_ToFile(folder / _LOG))
    perform(name, folder, checks)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # what native code does at exit says nothing about the check


class _ToFile(logging.Handler):
    """Every message of the library, in a file at once."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file.open("a", buffering=1)

    def emit(self, record: logging.LogRecord) -> None:
        self._file.write(json.dumps([record.levelname, record.getMessage()[:_TEXT]]) + "\n")


def run_check(script: Path, name: str, limit: float, environment: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """Run ``script --child NAME --folder FOLDER``: the check's row, and why it failed, or "".

    Args:
        script: calls :func:`child` for these options.
        name: of the check.
        limit: seconds.
        environment: of the child.
    """
    with tempfile.TemporaryDirectory(prefix="foldkv-check-") as scratch:
        folder = Path(scratch)
        start = time.monotonic()
        with (folder / "stderr").open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, str(script), "--child", name, "--folder", scratch], stdout=stderr, stderr=stderr,
                env=dict(environment),
            )  # fmt: skip
            try:
                code = process.wait(limit)
                ended = signal.Signals(-code).name if code < 0 else ""
            except subprocess.TimeoutExpired:
                process.kill()
                code, ended = process.wait(), f"the time limit of {limit:.0f} s"
        row, failure = outcome(name, folder, ended or ("" if code == 0 else f"code {code}"))
        row = {"check": name, "child_s": round(time.monotonic() - start, 2), "code": code} | row
        tail = (folder / "stderr").read_text(errors="replace")[-2000:]
        return (row | {"stderr": tail} if tail else row), failure


def outcome(name: str, folder: Path, ended: str = "") -> tuple[dict[str, Any], str]:
    """The row of a check from its notes in ``folder``, and why it failed, or "". ``ended`` is what ended its process early."""
    row: dict[str, Any] = {"check": name}
    if (folder / _NOTES).exists():
        row |= json.loads((folder / _NOTES).read_text())
    failure = row.pop("failure", "") or row.get("error", "")
    finished = row.pop("finished", False)
    if ended or (not finished and not failure and "no_gpu" not in row):
        failure = f"ended by {ended or 'itself'} while {row.get('stage', 'starting')}"
    elif failure and "error" in row:
        failure = f"while {row.get('stage', 'starting')}: {failure}"
    messages = _messages(folder / _LOG)
    row["messages"] = [line for line in messages if line[0] not in ("DEBUG", "INFO")][-_MESSAGES:]
    if failure:
        row["latest"] = messages[-_LATEST:]
    return row, f"{name}: {failure}" if failure else ""


def _messages(file: Path) -> list[list[str]]:
    if not file.exists():
        return []
    lines = file.read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("]")]
