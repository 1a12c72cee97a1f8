"""What is around every command: signals, errors as JSON, errors of the system, warnings, progress."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from command import environment, run, start
from processes import descendants, running

from foldkv import artifact, shell
from foldkv.artifact import only_writer, staged
from foldkv.cli import main
from foldkv.errors import SystemFailure
from foldkv.progress import Progress

IN_TIME = 2.0


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], object]], None]]:
    """Gives the command line a command `work` that does what a test wants."""

    def add(work: Callable[[], object]) -> None:
        def callback(as_json: bool) -> None:
            work()

        options: list[click.Parameter] = [click.Option(["--json", "as_json"], is_flag=True)]
        monkeypatch.setitem(main.commands, "work", shell.Command("work", callback=callback, params=options))

    yield add


# Signals


def said(process: subprocess.Popen[str], words: str) -> str:
    """What a process says on stderr up to these words."""
    assert process.stderr is not None
    text = ""
    while words not in text:
        line = process.stderr.readline()
        assert line, text
        text += line
    return text


def interrupted(
    process: subprocess.Popen[str], signum: int = signal.SIGINT, *, whole_group: bool = False
) -> tuple[str, str]:
    """Interrupt a process; it must end in time with the code of the signal, with its children, and one line. Its output."""
    family = descendants(process.pid)
    began = time.monotonic()
    (os.killpg if whole_group else os.kill)(process.pid, signum)
    out, err = process.communicate(timeout=60)
    took = time.monotonic() - began
    assert process.returncode == 128 + signum, err
    assert took < IN_TIME
    deadline = time.monotonic() + 2
    while any(map(running, family)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in family if running(pid)]
    lines = [line for line in err.splitlines() if not line.startswith("[")]
    assert lines == [f"interrupted by {signal.Signals(signum).name}; unfinished output was removed."], err
    return out, err


def children(process: subprocess.Popen[str], count: int) -> None:
    """Wait until a process has so many: between the builds of two segments there is none."""
    while len(descendants(process.pid)) < count:
        assert process.poll() is None


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where processes have their temporary files."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def left(folder: Path) -> list[str]:
    """What is in a folder beside locks."""
    return sorted(path.name for path in folder.rglob("*") if not path.name.endswith(".lock")) if folder.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize(("words", "after"), [("loading", 0.3), ("tracing", 0.5)])
def test_an_interrupted_export_ends_and_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, words: str, after: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOLDKV_CACHE", str(tmp_path / "cache"))  # traces that are kept would end before the signal
    with start("export", tiny_checkpoint, "-o", tmp_path / "out" / "graph", "--json") as process:
        said(process, words)
        time.sleep(after)
        out, _ = interrupted(process)
    assert json.loads(out)["error"] == {
        "type": "Interrupted", "message": "interrupted by SIGINT; unfinished output was removed.", "exit_code": 130,
    }  # fmt: skip
    assert not left(tmp_path / "out")


@pytest.mark.parametrize("whole_group", [False, True], ids=["process", "terminal"])
def test_an_interrupted_build_takes_its_child_and_its_threads_along(
    tiny_graph: Path, tmp_path: Path, scratch: Path, whole_group: bool
) -> None:
    targets = ("--target", "a100", "--target", "cpu", "--plugins", "off", "--jobs", "2")
    with start("build", tiny_graph, "-o", tmp_path / "out", *targets) as process:
        said(process, "parsing the graph")
        children(process, 1)
        interrupted(process, whole_group=whole_group)
    assert not [name for name in left(tmp_path / "out") if "staging" in name or "retired" in name]
    assert not list(scratch.glob("foldkv-*"))


def test_an_interrupted_compilation_of_kernels_leaves_no_process(
    tiny_graph: Path, tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOLDKV_CACHE", str(tmp_path / "cache"))
    with start("build", tiny_graph, "-o", tmp_path / "out", "--target", "a100") as process:
        said(process, "compiling")
        children(process, 2)
        time.sleep(1)
        interrupted(process, whole_group=True)
    assert not left(tmp_path / "out") and not list(scratch.glob("foldkv-*"))


def test_sigterm_ends_a_validation(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    with start("validate", tiny_bundle, "--reference", tiny_checkpoint, "--report", tmp_path / "report") as process:
        said(process, "text 1")
        interrupted(process, signal.SIGTERM)
    assert not left(tmp_path)


def test_an_interrupted_generation_ends(tiny_bundle: Path) -> None:
    with start("generate", tiny_bundle, "def", "-n", "100000") as process:
        assert process.stdout is not None
        assert process.stdout.read(4)
        interrupted(process)


def test_who_waits_for_a_lock_says_for_whom_and_can_be_interrupted(tiny_graph: Path, tmp_path: Path) -> None:
    with (
        only_writer(tmp_path / "cpu"),
        start("build", tiny_graph, "-o", tmp_path, "--target", "cpu") as process,
    ):
        text = said(process, "waiting for")
        assert f"cpu: waiting for process {os.getpid()} (since " in text and str(tmp_path / "cpu") in text
        interrupted(process)


NATIVE = """
import hashlib, sys, click
from foldkv.cli import main
from foldkv.artifact import staged
from pathlib import Path
@main.command("native")
def native():
    with staged(Path(sys.argv[-1]), kind="test") as folder:
        (folder / "half").write_text("x")
        click.echo("working", err=True)
        hashlib.pbkdf2_hmac("sha512", b"x", b"y", 10**9)
main(["native"])
"""


def test_native_code_that_hears_nothing_is_ended_all_the_same(tmp_path: Path) -> None:
    with start(tmp_path / "out", code=NATIVE) as process:
        said(process, "working")
        assert left(tmp_path)
        interrupted(process)
    assert not left(tmp_path)


def test_an_interrupt_between_two_renames_leaves_the_old_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(text: str) -> None:
        with staged(tmp_path / "out", kind="test") as folder:
            artifact.write_manifest(folder, kind="test", content={})
            (folder / "file").write_text(text)

    write("old")
    rename = Path.rename

    def stop(self: Path, target: Path) -> Path:
        if "staging" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        write("new")
    assert (tmp_path / "out" / "file").read_text() == "old" and left(tmp_path) == ["file", "manifest.json", "out"]


def test_an_interrupt_without_a_signal_is_one_line(command: Any) -> None:
    def work() -> None:
        raise KeyboardInterrupt

    command(work)
    result = invoke("work")
    assert result.exit_code == 130 and result.stderr.startswith("interrupted by SIGINT") and result.stdout == ""


# Errors


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (("plan", "nowhere", "--json"), 2, "CheckpointError"),
        (("plan", "--json"), 2, "MissingParameter"),
        (("exprot", "--json"), 2, "NoSuchCommand"),
        (("plan", "x", "--contxt", "4", "--json"), 2, "NoSuchOption"),
        (("plan", "x", "--context", "much", "--json"), 2, "BadParameter"),
    ],
)
def test_errors_are_json_on_stdout_and_text_on_stderr(arguments: tuple[str, ...], code: int, kind: str) -> None:
    result = invoke(*arguments)
    error = json.loads(result.stdout)["error"]
    assert (result.exit_code, error["exit_code"], error["type"]) == (code, code, kind)
    assert error["message"] and error["message"].split("\n")[0] in result.stderr


def test_without_json_stdout_has_no_error() -> None:
    result = invoke("plan", "nowhere")
    assert result.stdout == "" and result.stderr.startswith("error: nowhere")
    # What follows -- is text.
    assert invoke("plan", "--", "--json").stdout == ""


def test_a_fault_of_foldkv_is_json_too_and_has_its_traceback_with_v(command: Any) -> None:
    def work() -> None:
        raise ValueError("unforeseen")

    command(work)
    result = invoke("work", "--json")
    error = {"type": "InternalError", "message": "ValueError: unforeseen", "exit_code": 4}
    assert json.loads(result.stdout) == {"error": error} and result.exit_code == 4
    assert "Traceback" not in result.stderr and "internal error: ValueError: unforeseen" in result.stderr
    assert "Traceback" in invoke("-v", "work").stderr


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), 2, "/a/b: Permission denied. Choose a place"),
        (OSError(errno.EROFS, "Read-only file system", "/a"), 2, "/a: Read-only file system."),
        (OSError(errno.EXDEV, "Invalid cross-device link", "/a", None, "/b"), 2, "/a -> /b: Invalid cross-device link."),
        (MemoryError(), 3, "memory ran out"),
    ],
)  # fmt: skip
def test_errors_of_the_system_are_the_users(command: Any, error: Exception, code: int, says: str) -> None:
    def work() -> None:
        raise error

    command(work)
    result = invoke("work", "--json")
    assert result.exit_code == code and f"error: {says}" in result.stderr
    assert json.loads(result.stdout)["error"]["message"].startswith(says)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(SystemFailure, match=r"out: No space left on device. Free some room") as caught,
        staged(tmp_path / "out", kind="test"),
        open("/dev/full", "w") as full,  # noqa: PTH123
    ):
        full.write("x" * 10**6)
    facts = caught.value.facts()
    assert (facts["path"], facts["reason"], facts["exit_code"]) == (str(tmp_path / "out"), "ENOSPC", 2)
    assert not left(tmp_path)


def test_a_stdout_that_is_full_is_exit_2(tiny_checkpoint: Path) -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        process = subprocess.run(
            [sys.executable, "-m", "foldkv", "plan", str(tiny_checkpoint)], stdout=full, stderr=subprocess.PIPE,
            text=True, env=environment(), check=False,
        )  # fmt: skip
    assert process.returncode == 2
    assert (
        process.stderr.startswith("error: the system refused: No space left on device")
        and process.stderr.count("\n") == 1
    )


WRITERS: dict[str, Callable[[Path, Path, Path], list[object]]] = {
    "export": lambda checkpoint, graph, out: ["export", checkpoint, "-o", out],
    "inject": lambda checkpoint, graph, out: ["inject", graph, "-o", out, "--target", "a100"],
    "build": lambda checkpoint, graph, out: ["build", graph, "-o", out, "--target", "cpu"],
    "plan": lambda checkpoint, graph, out: ["plan", checkpoint, "--plot", out.with_suffix(".svg")],
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("reason", [errno.EACCES, errno.EROFS], ids=["forbidden", "read-only"])
def test_a_folder_that_cannot_be_written_is_exit_2_with_its_name(
    tiny_checkpoint: Path, tiny_graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, reason: int
) -> None:
    # root may write anywhere, so the system is told to refuse
    for function in ("mkdir", "open", "write_text"):
        real = getattr(Path, function)

        def refused(self: Path, *args: Any, _real: Any = real, **kwargs: Any) -> Any:
            if self.is_relative_to(tmp_path) and (args[:1] != ("r",)):
                raise OSError(reason, os.strerror(reason), str(self))
            return _real(self, *args, **kwargs)

        monkeypatch.setattr(Path, function, refused)
    real_mkdir = os.mkdir

    def mkdir(path: Any, *args: Any, **kwargs: Any) -> None:
        if str(path).startswith(str(tmp_path)):
            raise OSError(reason, os.strerror(reason), str(path))
        real_mkdir(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", mkdir)
    result = invoke(*WRITERS[name](tiny_checkpoint, tiny_graph, tmp_path / "out"), "--json")
    assert result.exit_code == 2, result.output
    error = json.loads(result.stdout)["error"]
    assert str(tmp_path) in error["message"] and os.strerror(reason) in error["message"]


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_in_the_way_is_exit_2_with_its_name(
    tiny_checkpoint: Path, tiny_graph: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").write_text("mine")
    result = invoke(*WRITERS[name](tiny_checkpoint, tiny_graph, tmp_path / "file" / "out"))
    assert result.exit_code == 2 and str(tmp_path / "file") in result.stderr
    assert (tmp_path / "file").read_text() == "mine" and left(tmp_path) == ["file"]


# Warnings


def test_warnings_of_foldkv_are_shown_and_those_of_packages_only_with_v(command: Any) -> None:
    def work() -> None:
        logging.getLogger("foldkv.part").warning("rows are %s", "odd")
        logging.getLogger("foldkv.part").info("by the way")
        logging.getLogger("somepackage").warning("chatter")
        logging.getLogger("somepackage").error("broken")
        warnings.warn_explicit("deprecated", UserWarning, "/site-packages/torch/x.py", 1, registry={})
        warnings.warn_explicit("overflow", RuntimeWarning, "/site-packages/numpy/x.py", 1, registry={})

    command(work)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        quiet, verbose = invoke("work").stderr, invoke("-v", "work").stderr
    assert quiet.splitlines() == [
        "warning: rows are odd", "error: broken", "warning: overflow (/site-packages/numpy/x.py:1)",
    ]  # fmt: skip
    assert all(words in verbose for words in ("info: by the way", "warning: chatter", "warning: deprecated"))


def test_the_library_prints_nothing_by_itself() -> None:
    code, out, err = run(code="import logging, foldkv\nlogging.getLogger('foldkv.part').warning('rows are odd')")
    assert (code, out, err) == (0, "", "")


# Progress


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_log_gets_lines_with_their_time_and_what_is_left() -> None:
    clock, stream = Clock(), io.StringIO()
    report = Progress(shell.Display(stream, clock))
    report("reading")
    clock.now += 61
    with report.part("cpu") as part:
        part.expect(40, 80)
        part("loading")
        for done in range(5):
            clock.now += 20
            part.steps(done, 8, "texts")
    clock.now += 3600
    report("done")
    assert stream.getvalue().splitlines() == [
        "[00:00] reading",
        "[01:01] cpu: comparable runs took 00:40 to 01:20",
        "[01:01] cpu: loading",
        # a line each 30 s, and the speed counts from the first of these steps
        "[01:41] cpu: 1 of 8 texts, 00:40, about 02:20 left",
        "[02:21] cpu: 3 of 8 texts, 01:20, about 01:40 left",
        "[1:02:41] done",
    ]


def test_a_plain_callable_gets_the_lines_of_all_parts() -> None:
    lines: list[str] = []
    report = Progress.of(lines.append)
    with report.part("build") as build, build.part("cpu") as part:
        part("loading")
        part.steps(1, 2, "layers")
        part.expect(1, 2)
    report("done")
    assert lines == ["build: cpu: loading", "done"] and Progress.of(report) is report


def in_terminal(*arguments: object) -> tuple[int, str]:
    """The exit code of a command and what it shows on a terminal of 100 columns."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"TERM": "xterm-256color", "COLUMNS": "100"}
        os.execv(sys.executable, [sys.executable, "-m", "foldkv", *map(str, arguments)])
    shown = b""
    while select.select([terminal], [], [], 120)[0]:
        try:
            data = os.read(terminal, 65536)
        except OSError:
            break
        if not data:
            break
        shown += data
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode(errors="replace")


def test_a_terminal_gets_bars_and_then_the_result(tiny_graph: Path, tmp_path: Path) -> None:
    code, shown = in_terminal("build", tiny_graph, "-o", tmp_path / "out", "--target", "cpu")
    assert code == 0, shown
    assert "━" in shown and re.search(r"\x1b\[\?25l", shown)  # a bar, and the cursor is hidden while it moves
    assert shown.rstrip().endswith("\x1b[?25h" + shown.rstrip().rpartition("\x1b[?25h")[2])
    last = shown.rstrip().splitlines()[-1]
    assert re.search(rf"cpu: built \(.* s\): {re.escape(str(tmp_path))}/out/cpu", last)


def test_a_signal_in_a_destructor_still_interrupts() -> None:
    """Python prints an exception of a destructor and goes on."""
    script = """
import os, signal, time
from foldkv.shell import _Signals
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it

class Held:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass

with _Signals(lambda signum: None) as signals:
    try:
        Held()
        time.sleep(5)
        print("lost")
    except KeyboardInterrupt:
        print("interrupted by", signals.received)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == (f"interrupted by {int(signal.SIGINT)}\n", "", 0)
