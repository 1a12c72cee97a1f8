"""The errors a user can cause, each bound to the exit code of the command line.

Exit codes: 0 ok, 1 a validation gate failed, 2 bad usage or bad input, 3 the environment lacks
something, 4 internal error (anything that is not a :class:`FoldkvError`).
"""

from __future__ import annotations

from collections.abc import Sequence

EXIT_OK = 0
EXIT_GATE_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_ENVIRONMENT = 3
EXIT_INTERNAL = 4


class FoldkvError(Exception):
    """A failure with a cause the user can act on.

    The message says what failed, where, what was found, what was expected and what to do next.
    """

    exit_code = EXIT_BAD_INPUT


class InputError(FoldkvError):
    """An argument, a configuration value or a file given by the user is wrong."""


class CheckpointError(InputError):
    """A checkpoint's config.json, index or tensors are not what the model needs."""


class ArtifactError(InputError):
    """A graph package or a bundle is damaged, incomplete, tampered with or of another version."""


class CapacityError(InputError):
    """A sequence would not fit into the state that was allocated; nothing was changed."""


class BuildError(FoldkvError):
    """An engine could not be built from a graph that was read correctly."""


class MissingDependencyError(FoldkvError):
    """A package, a library or a device that the command needs is not here."""

    exit_code = EXIT_ENVIRONMENT


def listing(title: str, findings: Sequence[str], next_step: str, *, limit: int = 20) -> str:
    """One message for many findings: a title with the count, the findings, the next step."""
    shown = [f"  - {finding}" for finding in findings[:limit]]
    if len(findings) > limit:
        shown.append(f"  - ... and {len(findings) - limit} more")
    return "\n".join([f"{title} ({len(findings)} found):", *shown, next_step])


def nearest(name: str, known: Sequence[str]) -> str:
    """`" (did you mean 'x'?)"` for a known name that ``name`` may be a slip of, or an empty string.

    It stands behind the name, inside a sentence. Names that merely have some letters in common are not offered.
    """
    import difflib

    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.75)
    return f" (did you mean {close[0]!r}?)" if close else ""


def short(value: object, most: int = 60) -> str:
    """``repr`` of a value for a message, cut after ``most`` characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."
