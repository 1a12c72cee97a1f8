"""The errors that a user can cause, each with the exit code of the command line.

Exit codes: 0 ok, 1 a validation gate failed, 2 bad usage or bad input (an error of the operating system too: a full disk,
a forbidden folder), 3 the environment lacks something, 4 internal error (anything that is not a :class:`FoldkvError`),
128 + the signal's number when a signal ended the command: 130 for Ctrl-C, 143 for SIGTERM.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXIT_OK = 0
EXIT_GATE_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_ENVIRONMENT = 3
EXIT_INTERNAL = 4
EXIT_SIGNAL = 128  # and the number of the signal


class FoldkvError(Exception):
    """A failure with a cause the user can act on.

    The message says what failed, where, what was found, what was expected and what to do next.
    """

    exit_code = EXIT_BAD_INPUT

    def facts(self) -> dict[str, Any]:
        """The error as JSON values: what `--json` prints under "error"."""
        return {"type": type(self).__name__, "message": shown(self), "exit_code": self.exit_code}


class InputError(FoldkvError):
    """An argument, a configuration value or a file given by the user is wrong."""


class CheckpointError(InputError):
    """A checkpoint's config.json, index or tensors are not what the model needs."""


class ArtifactError(InputError):
    """A graph package or a bundle is damaged, incomplete, tampered with or of another version."""


class CapacityError(InputError):
    """A sequence would not fit into the allocated state; nothing was changed."""


class GrammarError(InputError):
    """An answer cannot go on within its grammar: the grammar is too complex, or the vocabulary cannot write what must follow."""


class QueueFullError(FoldkvError):
    """As many requests wait as may: the engine is busy, and the same request may be taken on later."""


class BuildError(FoldkvError):
    """An engine could not be built from a graph that was read correctly."""


class MissingDependencyError(FoldkvError):
    """A package, a library or a device that the command needs is missing."""

    exit_code = EXIT_ENVIRONMENT

    def __init__(self, message: str, *, packages: Sequence[str] = (), install: str = "") -> None:
        """The message; if packages are missing, also their names and the command that installs them."""
        super().__init__(message)
        self.packages, self.install = tuple(packages), install

    def facts(self) -> dict[str, Any]:
        """As for every error, plus ``packages`` and ``install`` if packages are missing."""
        named = {"packages": list(self.packages), "install": self.install} if self.packages else {}
        return super().facts() | named


class SystemFailure(InputError):
    """The operating system refused to read or write: a full disk, a forbidden folder, a file where a folder must be."""

    def __init__(self, message: str, *, path: str = "", reason: str = "") -> None:
        """The message, with the path and the system's reason as in errno.h ("ENOSPC")."""
        super().__init__(message)
        self.path, self.reason = path, reason

    def facts(self) -> dict[str, Any]:
        """As for every error, plus ``path`` and ``reason``."""
        return super().facts() | {"path": self.path, "reason": self.reason}


_NEXT_STEPS = {
    errno.ENOSPC: "Free some room, or choose a place on another disk.",
    errno.EDQUOT: "Free some room, or choose a place on another disk.",
    errno.EACCES: "Choose a place that you have access to, or change its permissions.",
    errno.EPERM: "Choose a place that you have access to, or change its permissions.",
    errno.EROFS: "Choose a place on a file system that can be written.",
    errno.ENOTDIR: "Part of the path is a file; choose another place.",
    errno.EEXIST: "Part of the path is a file; choose another place.",
    errno.EISDIR: "Give a file, not a folder.",
    errno.ENOENT: "Check the path.",
    errno.EMFILE: "Raise the limit of open files (`ulimit -n`).",
    errno.EFBIG: "Raise the limit of file sizes (`ulimit -f`), or choose a file system that takes larger files.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ELOOP: "The links lead in a circle; correct them or give another path.",
    errno.ESTALE: "The file was removed on its server; check the path.",
    errno.EADDRINUSE: "Another program listens there: stop it, or choose another port.",
}


def system_failure(error: OSError, place: str | Path = "") -> SystemFailure:
    """An error of the operating system as a foldkv error: what, where, why, and what to do next.

    Args:
        error: the error that was raised.
        place: what was being read or written, for errors that name no file, such as a full disk.
    """
    named = [shown(name) for name in (error.filename, error.filename2) if name not in (None, "")]
    path = " -> ".join(named) or shown(place)
    why = error.strerror or str(error) or type(error).__name__
    step = _NEXT_STEPS.get(error.errno or 0, "")
    return SystemFailure(
        f"{path}: {why}.{f' {step}' if step else ''}" if path else f"the system refused: {why}.{f' {step}' if step else ''}",
        path=path, reason=errno.errorcode.get(error.errno or 0, type(error).__name__),
    )  # fmt: skip


def shown(path: object) -> str:
    """A path as text that can be printed and written as UTF-8; bytes that are not UTF-8 appear as ``\\xff``.

    Names of files are bytes, and Python keeps those that are not UTF-8 as half characters, which no output takes.
    """
    text = os.fsdecode(path) if isinstance(path, bytes) else str(path)
    try:
        return os.fsencode(text).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a character that no byte stands for
        return text.encode("utf-8", "backslashreplace").decode()


#: A message lists so many findings and counts the rest.
MOST_FINDINGS = 20


def listing(title: str, findings: Sequence[str], next_step: str, *, limit: int = MOST_FINDINGS) -> str:
    """One message for many findings: a title with the count, the findings, the next step."""
    shown = [f"  - {finding}" for finding in findings[:limit]]
    if len(findings) > limit:
        shown.append(f"  - ... and {len(findings) - limit} more")
    return "\n".join([f"{title} ({len(findings)} found):", *shown, next_step])


def nearest(name: str, known: Sequence[str]) -> str:
    """`" (did you mean 'x'?)"` for the known name that ``name`` may be a typo of, or an empty string.

    It goes after the name, inside a sentence. Names that only share some letters are not offered.
    """
    import difflib

    close = [other for other in known if name and other.lower() == name.lower()]
    close = close or difflib.get_close_matches(name, list(known), n=1, cutoff=0.75)
    return f" (did you mean {close[0]!r}?)" if close else ""


def short(value: object, most: int = 60) -> str:
    """``repr`` of a value for a message, cut after ``most`` characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."
