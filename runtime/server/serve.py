"""The server as a process: it opens a model, listens, and stops without breaking off what runs."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from ...errors import ArtifactError, InputError, system_failure
from ...units import size_text
from ..bundle import Bundle
from ..chat import ChatFormat, chat_format
from ..model import Model
from ..serving.engine import Engine
from ..serving.grammar_check import checker
from ..tokenizer import Tokenizer
from .app import Application, Limits
from .connections import connection
from .keys import Keys
from .service import Service

if TYPE_CHECKING:
    from ..serving.prefixes import PrefixIndex

_log = logging.getLogger(__name__)
#: Seconds that the last answers have to reach their clients after the engine has ended them.
_LAST_WORDS = 5.0
#: Bytes of states in memory and on disk where nobody says how many.
_MEMORY, _DISK = 1 << 30, 64 << 30
#: Bytes of room that somebody meant; fewer are a number whose unit was forgotten.
_LEAST = 64 << 10
#: Tokens of a sequence where nobody says how many: the state is allocated for all slots at the start.
_CONTEXT = 32 << 10
#: Seconds between two looks at what still runs.
_LOOK = 0.05


@dataclass(frozen=True)
class Address:
    """Where a server listens.

    Attributes:
        host: a name or an address of this machine.
        port: 0 for one that is free.
    """

    host: str = "127.0.0.1"
    port: int = 8000

    def socket(self) -> socket.socket:
        """A socket that is bound and does not listen yet, so that nobody waits for a model that is being opened.

        Raises:
            SystemFailure: the address is in use, or is not of this machine.
        """
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, kind, protocol, _, place = found[0]
            made = socket.socket(family, kind, protocol)
            try:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                made.bind(place)
            except BaseException:
                made.close()
                raise
            return made
        except OSError as error:
            raise system_failure(error, f"{self.host}:{self.port}") from None
        except (UnicodeError, OverflowError):
            raise InputError(f"{self.host}:{self.port} is no address; give a host and a port below 65536.") from None

    @property
    def only_here(self) -> bool:
        """Whether no other machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True)
class Prefixes:
    """Where states are kept that later prompts begin with. Without memory and a folder, nowhere.

    Attributes:
        memory: bytes in memory.
        folder: on disk, for later servers too.
        disk: bytes of the folder.
        exact: use and keep only states that have the bits of a run without any; otherwise also those after prompts and answers.
    """

    memory: int | None = None
    folder: Path | None = None
    disk: int | None = None
    exact: bool = True

    def __post_init__(self) -> None:
        """Refuse what goes not together, before a model is opened.

        Raises:
            InputError: there is room for a folder and no folder; nothing is kept, and yet it is said what; or no state fits.
        """
        if self.disk is not None and self.folder is None:
            raise InputError("--prefix-disk is the room of --prefix-folder. Give that, too.")
        if not self.exact and self.memory is None and self.folder is None:
            raise InputError(
                "--no-prefix-exact says which states are kept, and none are. Give --prefix-memory or --prefix-folder, too."
            )
        for name, room in (("--prefix-memory", self.memory), ("--prefix-disk", self.disk)):
            if room is not None and room < _LEAST:
                raise InputError(f"{name} {room} is {size_text(room)}, which keeps no state. Give a size such as 4GiB.")

    def open(self, model: Model, chunk: int) -> PrefixIndex | None:
        """The index for a model that is fed in such chunks; None if nothing is kept.

        Raises:
            InputError: the folder cannot be used.
        """
        if self.memory is None and self.folder is None:
            return None
        from ..serving.prefixes import PrefixIndex

        return PrefixIndex.of(
            model, chunk=chunk, memory_bytes=self.memory or _MEMORY, folder=self.folder, disk_bytes=(self.disk or _DISK) if self.folder else 0
        )  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """How much an engine does at once.

    Attributes:
        context: tokens of a prompt and its answer; None for as many as the model takes, and at most 32k.
        slots: sequences.
        chunk: tokens of a prompt.
        max_queue: requests that may wait.
        batch_invariant: compute every sequence's steps alone.
    """

    context: int | None = None
    slots: int = 8
    chunk: int = 256
    max_queue: int = 64
    batch_invariant: bool = False

    def context_of(self, bundle: Bundle) -> int:
        """The context for a bundle."""
        longest = bundle.model.max_position_embeddings
        return self.context or min(longest, bundle.largest("context") or longest, _CONTEXT)


def who_may_ask(address: Address, keys: Path | None, *, no_keys: bool) -> Keys | None:
    """The keys of a file; None if everybody who reaches the address may ask.

    Raises:
        InputError: the file is wrong; or other machines reach the address, and nobody said that they may ask without a key.
    """
    if keys is not None and no_keys:
        raise InputError("--api-keys and --no-keys exclude each other. Give one of them.")
    if keys is not None:
        return Keys.from_file(keys)
    if not no_keys and not address.only_here:
        raise InputError(
            f"other machines can reach {address.host}, and the server would answer all of them. Give --api-keys FILE, or --no-keys if "
            "something in front of it decides who may ask."
        )
    return None


def find_chat(bundle: Bundle, name: str | None) -> tuple[ChatFormat | None, str]:
    """The chat format of a bundle, or that of this name; without one, None and why.

    Raises:
        InputError: there is none of this name.
    """
    if name is not None:
        return chat_format(name), ""
    try:
        return chat_format(bundle), ""
    except ArtifactError as error:
        _log.warning("/v1/chat/completions refuses requests: %s", error)
        return None, "Its bundle does not say how conversations are written; --chat-format names an encoding."


def model_name(bundle: Bundle) -> str:
    """The name of a bundle's checkpoint: of its folder, or of its repository in the Hugging Face cache."""
    made = Path(bundle.manifest.inputs.checkpoint.path)
    if made.parent.name == "snapshots":
        return made.parent.parent.name.removeprefix("models--").replace("--", "/")
    return made.name or bundle.folder.resolve().name


def serve(
    model: Model,
    listening: socket.socket,
    *,
    limits: Limits,
    sizes: Sizes = Sizes(),
    prefixes: Prefixes = Prefixes(),
    chat: str | None = None,
    name: str | None = None,
    timeout: float | None = None,
    grace: float = 30.0,
    free_grammars: bool = True,
    say: Callable[[Started], None],
) -> None:
    """Answer requests until a signal comes, then end what runs and return.

    Args:
        model: opened; it stays open.
        listening: from :meth:`Address.socket`.
        limits: what is taken, and from whom.
        sizes: of the engine.
        prefixes: where states are kept that later prompts begin with.
        chat: a chat format by its name, for bundles that do not say theirs.
        name: of the model, for clients; default: that of its checkpoint.
        timeout: seconds that a request may take.
        grace: seconds that running requests have after a signal.
        free_grammars: clients may write grammars by hand.
        say: told once requests are answered.

    Raises:
        InputError: an argument is wrong, or the state does not fit into memory.
    """
    bundle = model.bundle
    tokenizer = Tokenizer.from_bundle(bundle)
    format, why = find_chat(bundle, chat)
    context = sizes.context_of(bundle)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_logging())
        index = prefixes.open(model, sizes.chunk)
        if index is not None:
            stack.enter_context(index)
        engine = stack.enter_context(
            Engine(
                model, tokenizer=tokenizer, slots=sizes.slots, context=context, chunk=sizes.chunk, max_queue=sizes.max_queue, prefixes=index,
                batch_invariant=sizes.batch_invariant,
            )
        )  # fmt: skip
        service = Service(
            engine,
            tokenizer,
            name or model_name(bundle),
            context,
            sizes.slots,
            format,
            why,
            timeout,
            index,
            free_grammars,
            prefixes.exact,
        )
        application = Application(service, limits, only_here=_only_here(listening))
        stack.callback(application.close)
        stack.callback(checker.interrupt)  # else the end of the process waits for what is tried
        started = Started(_url(listening), service.name, context, sizes.slots)
        server = Server(application, grace=grace, ready=lambda: say(started))
        stack.enter_context(_signals(server))
        asyncio.run(server.run(listening))


@dataclass(frozen=True)
class Started:
    """A server that answers: where, with which model, for how many tokens and sequences."""

    url: str
    model: str
    context: int
    slots: int

    def __str__(self) -> str:
        return f"{self.model} is served at {self.url} (context {self.context}, {self.slots} slots)"


def _only_here(listening: socket.socket) -> bool:
    """Whether no other machine can reach the socket."""
    return ipaddress.ip_address(listening.getsockname()[0].partition("%")[0]).is_loopback


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn over an application, which ends requests in its own order: no new ones, then those that run, then the sockets."""

    def __init__(
        self, application: Application, *, grace: float = 30.0, ready: Callable[[], None] = lambda: None
    ) -> None:
        """``ready`` is called once requests are answered."""
        limits = application.limits
        super().__init__(
            uvicorn.Config(
                application.asgi, http=connection(limits.connections, limits.head_timeout, limits.send_timeout),
                log_config=None, access_log=False, lifespan="off", ws="none", server_header=False,
                proxy_headers=False, timeout_graceful_shutdown=int(_LAST_WORDS),
            )
        )  # fmt: skip
        self._application, self._grace, self._ready = application, grace, ready
        self._asked, self._now = False, False

    def ask_to_stop(self) -> None:
        """Stop when what runs has ended; asked again, stop now. It can be called on any thread, and by a handler of signals."""
        self._asked, self._now = True, self._asked

    async def run(self, listening: socket.socket) -> None:  # type: ignore[override]
        """Answer requests until somebody asks to stop."""
        serving = asyncio.create_task(self.serve(sockets=[listening]))
        while not self._asked and not serving.done():
            await asyncio.sleep(_LOOK)
        self._application.stop()
        end = time.monotonic() + self._grace
        while self._application.running and time.monotonic() < end and not (self._now or serving.done()):
            await asyncio.sleep(_LOOK)
        self._application.cancel()
        end = time.monotonic() + _LAST_WORDS  # of streams, which are still to be sent
        while self._application.running and time.monotonic() < end:
            await asyncio.sleep(_LOOK)
        self.should_exit = True
        await serving

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; then tells that it listens."""
        await super().startup(sockets)
        self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's would end the process by the signal, and not by what is left to do."""
        yield


@contextlib.contextmanager
def _signals(server: Server) -> Iterator[None]:
    """Signals ask the server to stop, instead of what they do to other commands, which end at once."""
    waking = signal.set_wakeup_fd(-1)  # a thread of the command line reads it, and would end the process
    old = {
        number: signal.signal(number, lambda *_: server.ask_to_stop())
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(waking)


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    """Lines on stderr, with their time: for every request, for what fails with what led to it, and for what uvicorn warns of."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    with contextlib.ExitStack() as stack:
        for name, level in (("foldkv", logging.INFO), ("uvicorn", logging.WARNING), ("asyncio", logging.WARNING)):
            log = logging.getLogger(name)
            stack.callback(log.setLevel, log.level)
            stack.callback(setattr, log, "propagate", log.propagate)
            stack.callback(log.removeHandler, handler)
            log.addHandler(handler)
            log.setLevel(level)
            log.propagate = False  # the command line has a handler of its own, without the time
        yield
