"""The process in which grammars are tried before the server compiles them: ``python grammar_worker.py``.

A short grammar can take hours and all memory to compile, and a compilation cannot be broken off. Here it can: each session of
requests is a fork of this process, with little time and memory of its own. It knows llguidance and the standard library alone, so
that it starts at once.

Messages come on stdin and answers go to stdout, each as four bytes of length and JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

#: Bytes of stack for llguidance, of which only those that it uses are taken. It follows rules and references by recursion, some
#: kilobytes for each, and a stack that is full ends the process. So the largest grammar with the longest chain fits.
_STACK = 512 << 20
#: Address space that a new thread takes for its allocations, beside those.
_ARENA = 128 << 20
_LENGTH = struct.Struct("<I")
_Made = TypeVar("_Made")
_starting = threading.Lock()


def with_deep_stack(make: Callable[[], _Made]) -> _Made:
    """What ``make`` returns or raises, on a thread with a stack that llguidance cannot fill with any grammar that is read."""
    made: Future[_Made] = Future()

    def run() -> None:
        try:
            made.set_result(make())
        except BaseException as error:  # noqa: BLE001 - raised again where it was called
            made.set_exception(error)

    with _starting:  # the size is of the process: of all threads that begin
        before = threading.stack_size(_STACK)
        try:
            threading.Thread(target=run, name="foldkv-grammar", daemon=True).start()
        finally:
            threading.stack_size(before)
    return made.result()


def framed(message: Any) -> bytes:
    """A message as it goes through a pipe."""
    data = json.dumps(message).encode()
    return _LENGTH.pack(len(data)) + data


def receive(read: Callable[[int], bytes]) -> Any:
    """The next message; None at the end of the pipe. ``read`` gives at most so many bytes, and none at the end."""
    head = _exactly(_LENGTH.size, read)
    data = None if head is None else _exactly(_LENGTH.unpack(head)[0], read)
    return None if data is None else json.loads(data)


def _exactly(size: int, read: Callable[[int], bytes]) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        part = read(size - len(data))
        if not part:
            return None
        data += part
    return bytes(data)


def compiled(vocabulary: Any, grammar: str, items: int, states: int) -> Any:
    """llguidance's matcher at the start of a text, which has had its first mask computed, so that it is known to work.

    Args:
        vocabulary: llguidance's tokenizer.
        grammar: in Lark's syntax.
        items: of a row of the parser, at most.
        states: of the lexer of one answer, at most.

    Raises:
        ValueError: llguidance cannot use the grammar.
    """
    import llguidance

    limits = llguidance.LLParserLimits(verbose_errors=False, max_items_in_row=items, max_lexer_states=states)
    matcher = llguidance.LLMatcher(
        vocabulary, llguidance.LLMatcher.grammar_from_lark(grammar), log_level=0, limits=limits
    )
    # Without a token yet: whether the end is all that can come, and whether anything can.
    matcher.consume_tokens([])
    tried = matcher.deep_copy()
    tried.compute_bitmask()
    if tried.is_error():
        raise ValueError(tried.get_error())
    return matcher


def vocabulary_of(text: str, size: int, end: int) -> Any:
    """llguidance's tokenizer from a tokenizer.json, for so many logits, with this token as the end.

    Raises:
        ValueError: it is of a kind that llguidance does not read.
    """
    import llguidance

    return llguidance.LLTokenizer(text, n_vocab=size, eos_token=end)


def trim() -> None:
    """Give memory that is not in use back to the system, where its library can."""
    given = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if given is not None:
        given(0)


def _memory() -> tuple[int, int]:
    """Bytes of address space, and of memory that is no file's."""
    pages = Path("/proc/self/statm").read_text().split()
    space, resident, files, *_ = (int(number) * resource.getpagesize() for number in pages)
    return space, resident - files


def _answer(message: Any, vocabularies: dict[int, Any]) -> Any:
    """What is told of one grammar or schema: ``error``, which is empty where there is none, and ``bytes`` that it takes."""
    import llguidance

    _, before = _memory()
    try:
        if "schema" in message:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(message["schema"])
            return {"error": str(llguidance.LLMatcher.validate_grammar(grammar)), "bytes": 0}
        kept = compiled(vocabularies[message["vocabulary"]], message["grammar"], message["items"], message["states"])
    except ValueError as error:
        return {"error": str(error)[:4000] or "it is wrong", "bytes": 0}
    trim()
    _, after = _memory()
    del kept
    return {"error": "", "bytes": max(after - before, 0)}


def _session(asked: int, answers: int, vocabularies: dict[int, Any], limits: Any) -> None:
    """Answer until the pipe ends. A signal ends the process where it takes too much time, and llguidance where it gets no memory."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    most = _memory()[0] + _STACK + _ARENA + limits["memory"]
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.setitimer(signal.ITIMER_PROF, limits["seconds"])
    nothing = os.open(os.devnull, os.O_RDWR)
    for pipe in (0, 1, 2):  # llguidance tells of its end there; the others are of the process that forked
        os.dup2(nothing, pipe)

    def run() -> None:
        while (message := receive(lambda size: os.read(asked, size))) is not None:
            os.write(answers, framed(_answer(message, vocabularies)))

    with_deep_stack(run)


class _Fork:
    """A process that answers one session."""

    def __init__(self, vocabularies: dict[int, Any], limits: Any) -> None:
        theirs, self._to = os.pipe()
        self._from, back = os.pipe()
        self._process = os.fork()
        if not self._process:
            code = 1
            try:
                os.close(self._to)
                os.close(self._from)
                _session(theirs, back, vocabularies, limits)
                code = 0
            finally:
                os._exit(code)
        os.close(theirs)
        os.close(back)

    def ask(self, message: Any) -> Any:
        """Its answer; ``limit`` where it died."""
        with contextlib.suppress(BrokenPipeError):
            data = memoryview(framed(message))
            while data:
                data = data[os.write(self._to, data) :]
        answer = receive(lambda size: os.read(self._from, size))
        if answer is not None:
            return answer
        _, status = os.waitpid(self._process, 0)
        self._process = 0
        late = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF
        return {"limit": "time" if late else "memory"}

    @property
    def dead(self) -> bool:
        """Whether it reached a limit."""
        return not self._process

    def end(self) -> None:
        """End it, whatever it does."""
        os.close(self._to)
        os.close(self._from)
        if self._process:
            os.kill(self._process, signal.SIGKILL)
            os.waitpid(self._process, 0)
            self._process = 0


def main() -> None:
    """Answer what comes on stdin, until it ends."""
    import llguidance  # noqa: F401 - here, so that no fork has to

    vocabularies: dict[int, Any] = {}
    fork: _Fork | None = None
    while (message := receive(lambda size: os.read(0, size))) is not None:
        answer: Any = {}
        if "forget" in message:
            vocabularies.pop(message["forget"], None)
        elif "text" in message:
            vocabularies[message["vocabulary"]] = vocabulary_of(message["text"], message["size"], message["end"])
        elif "end_session" in message:
            if fork is not None:
                fork.end()
            fork = None
        else:
            if fork is None:
                fork = _Fork(vocabularies, message["limits"])
            answer = {"limit": "time"} if fork.dead else fork.ask(message)
        data = memoryview(framed(answer))
        while data:
            data = data[os.write(1, data) :]


if __name__ == "__main__":
    main()
