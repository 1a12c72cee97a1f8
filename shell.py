"""What all commands share: errors and their exit codes, signals, warnings, and the display of progress.

An error is one message on stderr; with ``--json`` it is also an object on stdout. A signal ends the process and its children
within two seconds, even during native code, and leaves nothing half-written.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self, TextIO, cast

import click

from .artifact import abandon_unfinished
from .errors import EXIT_INTERNAL, EXIT_OK, EXIT_SIGNAL
from .packages import as_user_error, needed_by, require_for
from .progress import BYTES, Progress

if TYPE_CHECKING:
    from rich.console import RenderableType

_UNWIND = 1.0  # seconds that the main thread has to clean up after a signal
_AGAIN = 0.01  # seconds after which a signal arrives again that came in a destructor
_THREADS = 0.5  # seconds that its threads have after their children have ended
_EVERY = 30.0  # seconds between two lines of a log on how much is done
_LABEL = 44  # characters of a bar's label
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


# Errors


class Command(click.Command):
    """A command that says what packages it lacks before it does anything.

    ``look`` gets the values of all parameters before PyTorch is loaded, which takes seconds: what is plainly wrong with them is an
    error at once. It must not import PyTorch.
    """

    def __init__(self, *given: Any, look: Callable[[Mapping[str, Any]], object] = lambda _: None, **named: Any) -> None:
        super().__init__(*given, **named)
        self._look = look

    def invoke(self, ctx: click.Context) -> Any:
        """As in click."""
        name = self.name or ""
        require_for(name)
        self._look(ctx.params)
        if "torch" in needed_by(name):  # takes seconds, on a busy machine many
            progress()("loading PyTorch")
        return super().invoke(ctx)


class Group(click.Group):
    """Commands whose errors, signals and warnings are handled here."""

    command_class = Command

    def main(
        self, args: Sequence[str] | None = None, prog_name: str | None = None, complete_var: str | None = None,
        standalone_mode: bool = True, **extra: Any,
    ) -> Any:  # fmt: skip
        """Run a command line; ends the process unless ``standalone_mode`` is off."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        arguments = list(sys.argv[1:] if args is None else args)
        with Shell(arguments) as shell:
            try:
                code = super().main(arguments, prog_name, complete_var, False, **extra)
            except (KeyboardInterrupt, _Interrupted):
                code = shell.interrupted()
            except click.ClickException as error:
                code = shell.usage(error)
            except Exception as error:  # noqa: BLE001 - the last resort of the command line
                code = shell.failed(error)
        sys.exit(code if isinstance(code, int) else EXIT_OK)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As in click; tells the shell which command runs."""
        found = super().resolve_command(ctx, args)
        if Shell.current is not None:
            Shell.current.starts(found[0] or "", bool(ctx.params.get("verbose")))
        return found

    def invoke(self, ctx: click.Context) -> Any:
        """As in click, but without click's own message on an interrupt."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _Interrupted from None
        except EOFError as error:  # click would take it for an unanswered prompt
            raise RuntimeError(f"{type(error).__name__}: {error}") from error


class _Interrupted(Exception):
    """Ctrl-C, past click."""


class Shell:
    """One running command line: what it was asked, what it shows, and how it ends."""

    current: Shell | None = None

    def __init__(self, arguments: Sequence[str]) -> None:
        """For a command line's arguments."""
        # Known before click has read the arguments, so that its errors are JSON too.
        before = arguments[: arguments.index("--")] if "--" in arguments else arguments
        self.as_json = "--json" in before
        self.command, self.verbose = "", False
        self.display = Display()
        self._signals = _Signals(self._end)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Take over signals, warnings and the loggers."""
        Shell.current = self
        self._stack.callback(setattr, Shell, "current", None)
        self._stack.enter_context(self._signals)
        self._stack.enter_context(self._messages())
        self._stack.callback(self.display.stop)
        return self

    def __exit__(self, *_: object) -> None:
        """Give everything back."""
        self._stack.close()

    def starts(self, command: str, verbose: bool) -> None:
        """Note which command runs."""
        self.command, self.verbose = command, verbose
        if verbose:
            logging.getLogger("foldkv").setLevel(logging.INFO)

    def usage(self, error: click.ClickException) -> int:
        """Show an error of click."""
        self.display.stop()
        error.show()
        self._print_json(type(error).__name__, error.format_message(), error.exit_code)
        return error.exit_code

    def failed(self, error: Exception) -> int:
        """Show an error and return its exit code."""
        self.display.stop()
        if self.verbose:
            traceback.print_exception(error)
        known = as_user_error(error, self.command)
        if known is None:
            text = f"{type(error).__name__}: {error}"
            click.echo(f"internal error: {text}\nRun again with -v before the command and report it.", err=True)
            self._print_json("InternalError", text, EXIT_INTERNAL)
            return EXIT_INTERNAL
        click.echo(f"error: {known}", err=True)
        self._print(known.facts())
        return known.exit_code

    def interrupted(self) -> int:
        """End a command that a signal interrupted. Returns only if no signal came, as in tests."""
        received = self._signals.received
        if received is not None:
            self._end(received)
        self._say_interrupted(signal.SIGINT)
        return EXIT_SIGNAL + signal.SIGINT

    def _end(self, signum: int) -> None:
        """End this process and its children now, without the interpreter: native code may block it and the threads."""
        self.display.silence()
        _kill_children()
        deadline = time.monotonic() + _THREADS
        for thread in threading.enumerate():
            if thread not in (threading.main_thread(), threading.current_thread()) and not thread.daemon:
                thread.join(max(0.0, deadline - time.monotonic()))
        abandon_unfinished()
        self._say_interrupted(signum)
        os._exit(EXIT_SIGNAL + signum)

    def _say_interrupted(self, signum: int) -> None:
        self.display.stop()
        text = f"interrupted by {signal.Signals(signum).name}; unfinished output was removed."
        with contextlib.suppress(OSError, ValueError):
            click.echo(text, err=True)
            self._print_json("Interrupted", text, EXIT_SIGNAL + signum)
            sys.stdout.flush()

    def _print_json(self, kind: str, message: str, code: int) -> None:
        self._print({"type": kind, "message": message, "exit_code": code})

    def _print(self, facts: dict[str, Any]) -> None:
        """Print the error as JSON if that was asked for. stdout may be what failed, so errors of it are ignored."""
        try:
            if self.as_json:
                click.echo(json.dumps({"error": facts}, indent=2, ensure_ascii=False))
            sys.stdout.flush()
        except OSError:  # otherwise Python tries again at exit, and changes the exit code
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    @contextlib.contextmanager
    def _messages(self) -> Iterator[None]:
        """Show warnings of foldkv on stderr, and those meant for authors of packages only with -v."""
        root, own = logging.getLogger(), logging.getLogger("foldkv")
        handler, level, show = _Handler(self), own.level, warnings.showwarning
        root.addHandler(handler)
        if not sys.warnoptions:
            warnings.showwarning = self._warning
        try:
            yield
        finally:
            warnings.showwarning = show
            root.removeHandler(handler)
            own.setLevel(level)

    def _warning(
        self, message: Warning | str, category: type[Warning], filename: str, lineno: int, file: object = None,
        line: str | None = None,
    ) -> None:  # fmt: skip
        own = Path(filename).is_relative_to(Path(__file__).parent)
        # An overflow matters, whichever package computes it.
        if own or self.verbose or issubclass(category, RuntimeWarning):
            self.display.print(f"warning: {message}" + (f" ({filename}:{lineno})" if self.verbose or not own else ""))


class _Handler(logging.Handler):
    """Shows log records: of foldkv from warnings up (with -v info), of other packages from errors up (with -v warnings)."""

    def __init__(self, shell: Shell) -> None:
        super().__init__()
        self._shell = shell

    def emit(self, record: logging.LogRecord) -> None:
        least = logging.WARNING if record.name.split(".")[0] == "foldkv" else logging.ERROR
        if record.levelno >= least - 10 * self._shell.verbose:
            self._shell.display.print(f"{record.levelname.lower()}: {record.getMessage()}")


# Signals


class _Signals:
    """Turns the first signal into KeyboardInterrupt, and ends the process if the main thread does not follow."""

    def __init__(self, end: Callable[[int], None]) -> None:
        self.received: int | None = None
        self._end = end
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread handles signals
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # Python runs handlers only between two steps of the main thread, and native code can delay those. The number is
        # written to the pipe at once.
        self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for signum in _SIGNALS:
            if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup, or a job in the background
                self._old[signum] = signal.signal(signum, self._handle)
        self._old_hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        self._thread = threading.Thread(target=self._watch, name="foldkv-signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not hasattr(self, "_thread"):
            return
        for signum, handler in self._old.items():
            signal.signal(signum, handler)
        sys.unraisablehook = self._old_hook
        signal.set_wakeup_fd(self._old_fd)
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received is None:  # later signals must not disturb the cleanup
            self.received = signum
            raise KeyboardInterrupt

    def _unraisable(self, lost: sys.UnraisableHookArgs) -> None:
        """A signal that arrived in a destructor would be printed and forgotten: let it arrive again."""
        if self.received is None or not issubclass(lost.exc_type, KeyboardInterrupt):
            self._old_hook(lost)
            return
        signum, self.received = self.received, None
        threading.Timer(_AGAIN, os.kill, (os.getpid(), signum)).start()

    def _watch(self) -> None:
        while signum := os.read(self._read, 1)[0]:
            if signum in self._old:
                time.sleep(_UNWIND)
                self._end(signum)


def _kill_children() -> None:
    """End every descendant of this process, except Python's resource tracker, which removes semaphores afterwards."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            if b"multiprocessing.resource_tracker" in path.with_name("cmdline").read_bytes():
                continue
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    waiting = [os.getpid()]
    while waiting:
        for child in children.get(waiting.pop(), []):
            waiting.append(child)
            with contextlib.suppress(OSError):
                os.kill(child, signal.SIGKILL)


# Progress


def progress() -> Progress:
    """Progress on the display of the running command: bars and times on a terminal, lines with a time in a log."""
    return Progress(Shell.current.display if Shell.current is not None else Display())


def clock(seconds: float) -> str:
    """Seconds as 00:42 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def _amount(value: float, unit: str) -> str:
    return f"{value / 2**30:.1f} GiB" if unit == BYTES else f"{value:g}"


class _Part:
    """What is known about a part of the work; times in seconds of the display's clock."""

    def __init__(self, name: str, now: float) -> None:
        self.name, self.text, self.start = name, "", now
        self.since, self.first = now, 0.0  # when the current steps began, and with how many of them done
        self.done, self.total, self.unit = 0.0, 0.0, ""
        self.expected: tuple[float, float] | None = None
        self.told = now

    def share(self, now: float) -> float | None:
        """How much is done, from 0 to 1: counted, or estimated from earlier runs; None if unknown."""
        if self.total:
            return min(1.0, self.done / self.total)
        if self.expected:
            return min(0.99, 2 * (now - self.start) / sum(self.expected))
        return None

    def left(self, now: float) -> float | None:
        """Seconds left, or None."""
        if self.total and self.done > self.first and now > self.since:
            return (self.total - self.done) * (now - self.since) / (self.done - self.first)
        if self.expected:
            rest = sum(self.expected) / 2 - (now - self.start)
            return rest if rest > 0 else None
        return None

    def amount(self) -> str:
        if not self.total:
            return ""
        unit = f" {self.unit}" if self.unit not in ("", BYTES) else ""
        return f"{_amount(self.done, self.unit)} of {_amount(self.total, self.unit)}{unit}"

    def times(self, now: float) -> str:
        left = self.left(now)
        return clock(now - self.start) + (f", about {clock(left)} left" if left is not None else "")


class Display:
    """The sink of the command line, on stderr: stdout is for results."""

    def __init__(self, stream: TextIO | None = None, now: Callable[[], float] = time.monotonic) -> None:
        """Show on ``stream`` (default: stderr); ``now`` is a clock in seconds."""
        self._stream, self._now = stream, now
        self._start = now()
        self._parts: dict[str, _Part] = {}
        self._lock = threading.RLock()
        self._live: Any = None
        self._silent = False

    def line(self, part: str, text: str) -> None:
        """See :meth:`foldkv.progress.Sink.line`."""
        with self._lock:
            row = self._part(part)
            row.text, row.total, row.done, row.since = text, 0.0, 0.0, self._now()
            self.print(f"[{clock(self._now() - self._start)}] {f'{part}: ' if part else ''}{text}")
            self._show()

    def steps(self, part: str, done: float, total: float, unit: str) -> None:
        """See :meth:`foldkv.progress.Sink.steps`."""
        with self._lock:
            row, now = self._part(part), self._now()
            if row.total != total or row.unit != unit or done < row.done:
                row.since, row.first = now, done
            row.done, row.total, row.unit = done, total, unit
            self._show()
            if self._live is None and now - row.told >= _EVERY:
                row.told = now
                said = f"{row.amount()}, {row.times(now)}"
                self.print(f"[{clock(now - self._start)}] {f'{part}: ' if part else ''}{said}")

    def expect(self, part: str, low: float, high: float) -> None:
        """See :meth:`foldkv.progress.Sink.expect`."""
        with self._lock:
            self._part(part).expected = low, high
            span = clock(high) if clock(low) == clock(high) else f"{clock(low)} to {clock(high)}"
            self.print(f"[{clock(self._now() - self._start)}] {f'{part}: ' if part else ''}comparable runs took {span}")
            self._show()

    def end(self, part: str) -> None:
        """See :meth:`foldkv.progress.Sink.end`."""
        with self._lock:
            self._parts.pop(part, None)

    def print(self, text: str) -> None:
        """Print one line, above the bars."""
        with self._lock:
            if self._silent:
                return
            if self._live is not None:
                self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                click.echo(text, file=self._stream or sys.stderr)

    def stop(self) -> None:
        """Remove the bars; the next report brings them back."""
        with self._lock:
            live, self._live = self._live, None
            if live is not None:
                live.stop()
                sys.stdout = self._stdout

    def silence(self) -> None:
        """Stop and show nothing more, whatever threads still report."""
        self._silent = True
        if self._lock.acquire(timeout=0.2):
            self.stop()
            self._lock.release()

    def _part(self, name: str) -> _Part:
        return self._parts.setdefault(name, _Part(name, self._now()))

    def _show(self) -> None:
        stream = self._stream or sys.stderr
        if self._live is not None or self._silent or not stream.isatty() or os.environ.get("TERM") == "dumb":
            return
        from rich.console import Console
        from rich.live import Live

        self._live = Live(
            console=Console(file=stream), get_renderable=self._render, refresh_per_second=4, transient=True,
            redirect_stdout=False,
        )  # fmt: skip
        self._stdout, sys.stdout = sys.stdout, cast(TextIO, _Stdout(sys.stdout, self))
        self._live.start()

    def _render(self) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.spinner import Spinner
        from rich.table import Table
        from rich.text import Text

        table, now = Table.grid(padding=(0, 1)), self._now()
        rows = [part for part in list(self._parts.values()) if part.total or part.expected or part.text]
        for part in rows:
            share = part.share(now)
            bar = ProgressBar(total=1.0, completed=share or 0.0, width=24, pulse=share is None)
            text = ": ".join(filter(None, (part.name, part.text)))
            text = text if len(text) <= _LABEL else f"{text[: _LABEL - 1]}…"
            table.add_row(Spinner("dots"), Text(text), bar, part.amount(), part.times(now))
        return table


class _Stdout:
    """Stdout that removes the bars before a result is written to the same terminal."""

    def __init__(self, stream: TextIO, display: Display) -> None:
        self._stream, self._display = stream, display

    def write(self, text: str) -> int:
        self._display.stop()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
