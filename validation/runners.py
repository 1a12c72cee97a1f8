"""Reference and subject behind one protocol: tokens in, logits at every position out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError, listing
from ..export.checkpoint.reader import Checkpoint
from ..packages import require
from ..runtime.backend import Observed
from ..runtime.bundle import Bundle
from ..runtime.model import Model
from ..runtime.session import Session
from .deployments import BOTH, ROWS, W8A8
from .jobs import Job
from .mapped import Gathered, mapped
from .selection import Ints, Selection, as_entries, mass_of, settle_ties, visible_scores

Logits = npt.NDArray[np.float32]
#: Tokens of a chunk in which a subject is fed.
CHUNK = 64
#: Tokens that are fed with a draft that is then taken back: one at every length mod 4, where windows of CSA begin and end.
ROLLBACKS = 4


@dataclass
class Reading:
    """What a reference computes for one text: logits [n, V], residual streams [n, N, C] after every layer, choices by layer."""

    logits: Logits
    streams: list[Logits] = field(default_factory=list)
    selections: dict[int, Selection] = field(default_factory=dict)


@dataclass
class Look:
    """What a subject computes for one text, and what can be seen inside: logits [n, V], streams [n, N, C] after every layer and
    before the first, and the rows of its state by name, as they are stored."""

    logits: Logits
    streams: list[Logits] = field(default_factory=list)
    rows: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    embedded: Logits | None = None

    def before(self, layer: int) -> Logits:
        """The streams that a layer takes."""
        found = self.streams[layer - 1] if layer else self.embedded
        assert found is not None
        return found


@dataclass
class Alone:
    """What every layer of a reference makes of a subject's own streams before it: streams [n, N, C] after it, and by layer with an
    indexer the entries [n, k] that it chooses (-1: none)."""

    streams: list[Logits]
    chosen: dict[int, Ints] = field(default_factory=dict)


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch compute with this many threads, then restore the number from before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Runner(Protocol):
    """Something that gives next-token logits."""

    name: str

    def logits(self, tokens: Sequence[int], *, last: int | None = None) -> Logits:
        """[n] tokens from an empty state -> [n, V] float32; or [last, V], those after the last tokens."""
        ...


class TailRunner(Protocol):
    """Something that reads a long stream in chunks and gives logits at its end."""

    def tail_logits(self, tokens: Sequence[int], tail: Sequence[int]) -> Logits:
        """[n] tokens and a tail of [m] from an empty state -> [m, V] float32, after each token of the tail."""
        ...


class TransformersRunner:
    """The reference: transformers' DeepseekV4ForCausalLM, eager, in float32; or the yardstick, the same in bfloat16.

    Raises:
        CheckpointError: the checkpoint does not load completely.
        MissingDependencyError: transformers is not installed.
    """

    def __init__(self, checkpoint: Path, *, allow_unknown_keys: Sequence[str] = (), precision: str = "float32") -> None:
        """Load a checkpoint, to compute in ``precision``: float32, or bfloat16 as transformers itself does it."""
        require("validate")
        from ..export.tensor_table import check_tensors

        check_tensors(Checkpoint(checkpoint, allow_unknown_keys=allow_unknown_keys))
        import transformers

        transformers.logging.disable_progress_bar()
        transformers.logging.set_verbosity_error()
        self.name, self.in_memory = f"transformers {transformers.__version__}, {precision}", True
        import torch

        self._dtype: Any = getattr(torch, precision)
        model, info = transformers.DeepseekV4ForCausalLM.from_pretrained(
            checkpoint, dtype=self._dtype, attn_implementation="eager", output_loading_info=True
        )
        problems = [f"{kind} {name}" for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
                    for name in info.get(kind, ())]  # fmt: skip
        if problems:
            raise CheckpointError(
                listing(f"transformers does not load {checkpoint} completely", problems, "Check the checkpoint.")
            )
        # What transformers dequantises stays bfloat16, which represents e4m3 and e2m1 times a power of two exactly.
        model = model.float() if precision == "float32" else model
        self.model: Any = model.eval().requires_grad_(False)

    def prepare(self, jobs: Sequence[Job]) -> None:
        """What will be asked; a model that is in memory needs no notice."""

    def logits(self, tokens: Sequence[int], *, last: int | None = None) -> Logits:
        """One pass over all tokens, without a cache; logits after the ``last`` of them, or after all."""
        return self._forward(tokens)[0 if last is None else -last :]

    def _forward(self, tokens: Sequence[int]) -> Logits:
        import torch

        with torch.no_grad():
            out = self.model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
        result: Logits = out.float().numpy()
        return result

    def tail_logits(self, tokens: Sequence[int], tail: Sequence[int], *, chunk: int = 256) -> Logits:
        """The tokens in chunks through transformers' own cache, then the tail in one."""
        import torch
        from transformers.cache_utils import DynamicCache

        cache = DynamicCache(config=self.model.config)
        with torch.no_grad():
            for at in range(0, len(tokens), chunk):
                part = torch.tensor([list(tokens[at : at + chunk])])
                self.model(input_ids=part, past_key_values=cache, logits_to_keep=1)
            logits = self.model(input_ids=torch.tensor([list(tail)]), past_key_values=cache).logits[0]
            result: Logits = logits.float().numpy()
        return result

    def read(self, tokens: Sequence[int], chosen: Mapping[int, Ints], *, streams: bool = False) -> Reading:
        """Logits and choices of the indexers from one pass over all tokens, without a cache.

        Args:
            tokens: [n].
            chosen: by layer, the subject's entries [n, places]; ties are settled in their favour. A layer that is not in it
                keeps its own choice.
            streams: keep the residual streams too.
        """
        import torch

        reading = Reading(torch.empty(0).numpy())
        count, masses, choices = len(tokens), dict[int, Any](), dict[int, Any]()
        hooks: list[Any] = []

        def settle(layer: int, ratio: int, scores: dict[int, Any], own: Any) -> Any:
            if layer not in chosen:
                choices[layer] = (own[0].numpy(), torch.zeros(count, dtype=torch.bool).numpy())
                return own
            seen = visible_scores(scores[layer].numpy(), ratio)
            best, tied = settle_ties(seen, own[0].numpy(), chosen[layer])
            choices[layer] = (best, tied)
            return torch.from_numpy(best)[None]

        def weigh(layer: int, weights: Any) -> None:
            # Without a cache the keys are the tokens, then the entries.
            masses[layer] = mass_of(weights[:, :, count:].float())

        def keep(_: Any, __: Any, out: Any) -> None:
            reading.streams.append((out[0] if isinstance(out, tuple) else out)[0].float().numpy())

        scores: dict[int, Any] = {}
        for index, layer in enumerate(self.model.model.layers):
            if streams:
                hooks.append(layer.register_forward_hook(keep))
            indexer = getattr(getattr(layer.self_attn, "compressor", None), "indexer", None)
            if indexer is None:
                continue
            hooks += [
                indexer.scorer.register_forward_hook(lambda _, __, out, i=index: scores.update({i: out[0]})),
                indexer.register_forward_hook(
                    lambda module, __, out, i=index: settle(i, module.compress_rate, scores, out)
                ),
                layer.self_attn.register_forward_hook(lambda _, __, out, i=index: weigh(i, out[1][0])),
            ]
        try:
            reading.logits = self._forward(tokens)
        finally:
            for hook in hooks:
                hook.remove()
        for index, (best, tied) in choices.items():
            reading.selections[index] = Selection(best, masses[index], tied)
        return reading

    def alone(self, tokens: Sequence[int], given: Sequence[Logits], keys: Mapping[int, Any] | None = None) -> Alone:
        """Every layer by itself: each takes the subject's streams after the layer before it. The first takes the embedding.

        Args:
            tokens: [n].
            given: the subject's streams [n, N, C] after every layer.
            keys: by layer, values of index rows [entries, D] that the indexer takes instead of its own.
        """
        import torch

        found = Alone([])
        hooks: list[Any] = []

        def take(layer: int, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            return (torch.from_numpy(given[layer - 1])[None].to(self._dtype), *arguments[1:])

        def swap(layer: int, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            query, own, *rest = arguments
            return (query, own if keys is None or layer not in keys else keys[layer][None].to(own.dtype), *rest)

        for index, layer in enumerate(self.model.model.layers):
            if index:
                hooks.append(layer.register_forward_pre_hook(lambda _, arguments, i=index: take(i, arguments)))
            hooks.append(layer.register_forward_hook(lambda _, __, out: found.streams.append(out[0].float().numpy())))
            indexer = getattr(getattr(layer.self_attn, "compressor", None), "indexer", None)
            if indexer is not None:
                hooks.append(indexer.scorer.register_forward_pre_hook(lambda _, args, i=index: swap(i, args)))
                hooks.append(
                    indexer.register_forward_hook(lambda _, __, out, i=index: found.chosen.update({i: out[0].numpy()}))
                )
        try:
            self._forward(tokens)
        finally:
            for hook in hooks:
                hook.remove()
        return found


class Reference(Protocol):
    """transformers in float32, in memory or layer by layer."""

    name: str
    in_memory: bool

    def prepare(self, jobs: Sequence[Job]) -> None:
        """What will be asked."""

    def logits(self, tokens: Sequence[int], *, last: int | None = None) -> Logits:
        """As :meth:`TransformersRunner.logits`."""
        ...

    def tail_logits(self, tokens: Sequence[int], tail: Sequence[int]) -> Logits:
        """As :meth:`TransformersRunner.tail_logits`."""
        ...

    def read(self, tokens: Sequence[int], chosen: Mapping[int, Ints], *, streams: bool = False) -> Reading:
        """As :meth:`TransformersRunner.read`."""
        ...

    def alone(self, tokens: Sequence[int], given: Sequence[Logits], keys: Mapping[int, Any] | None = None) -> Alone:
        """As :meth:`TransformersRunner.alone`."""
        ...


class Oracle(Protocol):
    """The oracle of the profile served, in memory or layer by layer."""

    name: str

    @property
    def deployments(self) -> tuple[str, ...]:
        """The names in :mod:`.deployments` that it can compute."""
        ...

    def prepare(self, jobs: Sequence[Job]) -> None:
        """What will be asked."""

    def read(self, tokens: Sequence[int], *, deployment: str = "", streams: bool = False) -> Reading:
        """As :meth:`OracleRunner.read`."""
        ...

    def alone(self, tokens: Sequence[int], given: Sequence[Logits], keys: Mapping[int, Any] | None = None) -> Alone:
        """As :meth:`TransformersRunner.alone`."""
        ...


def roundings(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the oracle of a checkpoint can round beside its profile (a :class:`~foldkv.export.served.Rounding`), by the names in
    :mod:`.deployments`; "" is nothing."""
    from ..export.served import NO_ROUNDING, Rounding, quantised_modules

    found, modules = {"": NO_ROUNDING, ROWS: Rounding(rows=True)}, quantised_modules(checkpoint)
    if modules:
        found |= {W8A8: Rounding(activations=modules), BOTH: Rounding(rows=True, activations=modules)}
    return found


class OracleRunner:
    """The profile ``served`` in plain PyTorch (export/served.py): what a served bundle must compute. Speed does not matter."""

    name = "foldkv's oracle of the profile served, float32"

    def __init__(self, checkpoint: Path, *, allow_unknown_keys: Sequence[str] = ()) -> None:
        from ..export.loading import decoder_from_checkpoint

        opened = Checkpoint(checkpoint, allow_unknown_keys=allow_unknown_keys)
        self._decoder = decoder_from_checkpoint(opened)
        self._roundings = roundings(opened)

    @property
    def deployments(self) -> tuple[str, ...]:
        """The names in :mod:`.deployments` that it can compute."""
        return tuple(name for name in self._roundings if name)

    def prepare(self, jobs: Sequence[Job]) -> None:
        """What will be asked; a model that is in memory needs no notice."""

    def read(self, tokens: Sequence[int], *, deployment: str = "", streams: bool = False) -> Reading:
        """Logits and streams from one pass over all tokens, without a cache. Ties go to the lowest entry, as in a bundle.

        With a name in :mod:`.deployments`, as that deployment rounds.
        """
        import torch

        from ..export.served import served_forward

        with torch.no_grad():
            run = served_forward(self._decoder, torch.tensor(list(tokens)), rounding=self._roundings[deployment])
        return Reading(run.logits.numpy(), [one.numpy() for one in run.streams] if streams else [])

    def alone(self, tokens: Sequence[int], given: Sequence[Logits], keys: Mapping[int, Any] | None = None) -> Alone:
        """As :meth:`TransformersRunner.alone`."""
        import torch

        from ..export.served import served_forward

        with torch.no_grad():
            streams = [torch.from_numpy(one) for one in given]
            run = served_forward(self._decoder, torch.tensor(list(tokens)), given=streams, keys=keys)
        chosen = {layer: as_entries(visible.numpy()) for layer, visible in run.chosen.items()}
        return Alone([one.numpy() for one in run.streams], chosen)


class Subject(Protocol):
    """A bundle that is measured: in a session, or a layer at a time over all texts (layered_subject.py)."""

    name: str
    model: Model
    bundle: Bundle
    context: int
    state_bytes: int
    in_memory: bool
    #: Where passes that go a layer at a time keep what they have, and streams; None: in memory.
    kept: Path | None

    def announce(
        self, *, looks: Sequence[Sequence[int]] = (), pieces: Sequence[tuple[Sequence[int], Sequence[int]]] = (),
        logits: Sequence[tuple[Sequence[int], int | None]] = (),
    ) -> None:  # fmt: skip
        """What will be asked: of :meth:`look`, of :meth:`logits_in`, and of :meth:`logits` with the last tokens that are wanted."""

    def look(self, tokens: Sequence[int]) -> Look:
        """As :meth:`logits`, with what can be seen inside."""
        ...

    def logits(self, tokens: Sequence[int], *, last: int | None = None) -> Logits:
        """[n] tokens from an empty state, in chunks -> [n, V] float32; or [last, V], those after the last tokens."""
        ...

    def logits_in(self, tokens: Sequence[int], sizes: Sequence[int]) -> Logits:
        """As :meth:`logits`, fed in pieces of these sizes."""
        ...

    def again(self, tokens: Sequence[int]) -> tuple[Logits, Logits]:
        """Logits [m, V] of the second half of the tokens after a snapshot of the first, and once more after restoring it, where the
        first ``ROLLBACKS`` tokens come as the first of two drafts, of which the second is taken back."""
        ...

    def tail_logits(self, tokens: Sequence[int], tail: Sequence[int]) -> Logits:
        """The tokens in chunks, of which only the state is kept, then the tail: [m, V] after each of its tokens."""
        ...

    def at(self, context: int) -> AbstractContextManager[Subject]:
        """The same with a state of its own for ``context`` tokens."""
        ...


class SessionRunner:
    """The subject: a bundle in a session, fed in chunks through its compressed caches."""

    in_memory = True

    def __init__(self, model: Model, *, context: int, chunk: int = CHUNK, folder: Path | None = None) -> None:
        """Open a session for texts of up to ``context`` tokens. ``folder``: streams are mapped from files there; None: in memory."""
        self.kept = folder
        self.session = Session(model, context=max(context, model.bundle.smallest("context")), chunk=chunk)
        self.model, self.bundle, self._chunk = model, model.bundle, chunk
        self.context, self.state_bytes = self.session.context, self.session.state_bytes
        self.name = f"{self.bundle.target} bundle"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.session.close()

    def at(self, context: int) -> SessionRunner:
        """The same in a session of its own for ``context`` tokens."""
        return SessionRunner(self.model, context=context, chunk=self._chunk, folder=self.kept)

    def announce(self, **_: Any) -> None:
        """A session answers questions when they are asked."""

    def logits(self, tokens: Sequence[int], *, last: int | None = None) -> Logits:
        """Prefill from an empty state in chunks."""
        self.session.reset()
        return self.session.forward([list(tokens)], logits="all")[0][0 if last is None else -last :]

    def look(self, tokens: Sequence[int]) -> Look:
        """As :meth:`logits`, with what can be seen inside."""
        found: dict[int | None, Gathered] = {}

        def keep(seen: Observed) -> None:
            found.setdefault(seen.layer, Gathered(self.kept)).add(seen.streams[0])

        with self.session.observed(keep):
            logits = mapped(self.logits(tokens), self.kept)
        streams = {layer: parts.array() for layer, parts in found.items()}
        embedded = streams.pop(None, None)
        return Look(logits, [streams[layer] for layer in range(len(streams))], self.session.state_rows(), embedded)

    def logits_in(self, tokens: Sequence[int], sizes: Sequence[int]) -> Logits:
        """As :meth:`logits`, fed in pieces of these sizes."""
        self.session.reset()
        parts, start = [], 0
        for size in sizes:
            parts.append(self.session.forward([list(tokens[start : start + size])], logits="all")[0])
            start += size
        return np.concatenate(parts)

    def again(self, tokens: Sequence[int]) -> tuple[Logits, Logits]:
        """See :class:`Subject`. Both times the tokens come in the same steps, so that a state that is the same gives the same bits."""
        half = max(1, len(tokens) // 2)
        self.session.reset()
        self.session.prefill([list(tokens[:half])])
        snapshot = self.session.snapshot()
        once = self._steps(tokens, half, drafts=False)
        self.session.restore(snapshot)
        return once, self._steps(tokens, half, drafts=True)

    def _steps(self, tokens: Sequence[int], start: int, *, drafts: bool) -> Logits:
        """Logits [m, V] of the tokens from ``start``: a few one by one, then the rest. With ``drafts`` each of the few comes with a
        wrong token after it first, as speculation does it; then the slot goes back, and the token comes alone."""
        end = min(start + ROLLBACKS, len(tokens))
        parts = []
        for at in range(start, end):
            if drafts:
                kept, right = self.session.snapshot_slot(0), tokens[(at + 1) % len(tokens)]
                self.session.forward([[tokens[at], (right + 1) % self.bundle.model.vocab_size]])
                self.session.restore_slot(0, kept)
            parts.append(self.session.forward([[tokens[at]]], logits="all")[0])
        if end < len(tokens):
            parts.append(self.session.forward([list(tokens[end:])], logits="all")[0])
        return np.concatenate(parts)

    def tail_logits(self, tokens: Sequence[int], tail: Sequence[int]) -> Logits:
        """The tokens in chunks, of which only the state is kept, then the tail."""
        self.session.reset()
        self.session.prefill([list(tokens)])
        return self.session.forward([list(tail)], logits="all")[0]
