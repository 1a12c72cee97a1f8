"""Text in, text out: a layer above the token ids of a session.

Prompts are encoded, and the session's tokens are decoded piece by piece. A text ends before a stop string, even if the string is
split across tokens. The names are vLLM's: ``stop``, ``finish_reason``, ``stop_reason``, ``skip_special_tokens``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import InputError, short
from .completion import Completion, Writer, joined, stop_strings
from .sampling import GREEDY, Sampling
from .session import Session, TokenStream
from .tokenizer import Tokenizer

Prompt = str | Sequence[int]


def generate_text(
    session: Session,
    tokenizer: Tokenizer,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop: str | Sequence[str] = (),
    stop_tokens: Collection[int] | None = None,
    add_special_tokens: bool | None = None,
    skip_special_tokens: bool = True,
    requests: Sequence[int] | None = None,
    resume: bool = False,
) -> list[Completion]:
    """The completion of each prompt. Arguments and errors are as in :func:`stream_text`."""
    pieces: dict[int, list[Completion]] = {}
    stream = stream_text(
        session,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        stop_tokens=stop_tokens,
        add_special_tokens=add_special_tokens,
        skip_special_tokens=skip_special_tokens,
        requests=requests,
        resume=resume,
    )
    for piece in stream:
        pieces.setdefault(piece.index, []).append(piece)
    return [joined(parts) for _, parts in sorted(pieces.items())]


def stream_text(
    session: Session,
    tokenizer: Tokenizer,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop: str | Sequence[str] = (),
    stop_tokens: Collection[int] | None = None,
    add_special_tokens: bool | None = None,
    skip_special_tokens: bool = True,
    requests: Sequence[int] | None = None,
    resume: bool = False,
) -> Iterator[Completion]:
    """Generate text and give it out as soon as it is final, in pieces of the type :class:`Completion`.

    The pieces of a prompt together are its completion; the last one has the ``finish_reason``. Text that may be the start of a
    stop string is held back until it is clear that it is not. Prompt and text joined are the text of all tokens, so a text may
    begin with a space.

    Args:
        session: gets prompt ``i`` in slot ``i``.
        tokenizer: the tokenizer of the session's bundle.
        prompts: one prompt, or at most as many as the session's batch. Each is text, or token ids that are fed unchanged.
        max_new_tokens: the most new tokens for each prompt.
        sampling: how tokens are chosen.
        stop: a text ends before any of these. If several match, the one that is complete first ends it; if several are
            complete at the same time, the longest.
        stop_tokens, requests: see :meth:`foldkv.runtime.session.Session.stream`.
        add_special_tokens: add the tokenizer's special tokens to texts, as ``AutoTokenizer`` does. None adds them only if
            the slot is empty, so that a conversation begins with them and continues without.
        skip_special_tokens: leave special tokens out of the text. Stop strings cannot match them then: use
            ``stop_tokens``.
        resume: continue after what the slots hold: the earlier text, and every token of its ``token_ids``, including those
            of a stop string.

    Raises:
        CapacityError, InputError: as :meth:`foldkv.runtime.session.Session.stream`; InputError also for an empty stop string.
    """
    if not isinstance(tokenizer, Tokenizer):
        raise InputError(f"tokenizer must be Tokenizer.from_bundle(session.bundle), got {short(tokenizer)}.")
    for name, value in (("skip_special_tokens", skip_special_tokens), ("resume", resume)):
        if type(value) is not bool:
            raise InputError(f"{name} must be True or False, got {value!r}.")
    if add_special_tokens is not None and type(add_special_tokens) is not bool:
        raise InputError(f"add_special_tokens must be True, False or None, got {add_special_tokens!r}.")
    marks = stop_strings(stop)
    encoded: list[list[int]] = []
    for slot, prompt in enumerate(_prompts(prompts)):
        empty = (
            not resume or slot >= session.batch or bool(session.positions[slot] == 0 and session.pending[slot] is None)
        )
        special = empty if add_special_tokens is None else add_special_tokens
        encoded.append(
            tokenizer.encode(prompt, add_special_tokens=special) if isinstance(prompt, str) else list(prompt)
        )
    tokens = session.stream(
        encoded,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_tokens=stop_tokens,
        requests=requests,
        resume=resume,
    )
    before = [_held(session, slot) if resume else [] for slot in range(len(encoded))]
    writers = [
        Writer(slot, tokenizer, [*held, *prompt], marks, skip_special_tokens)
        for slot, (held, prompt) in enumerate(zip(before, encoded, strict=True))
    ]
    return _pieces(tokens, writers, told=stop_tokens is not None)


def _pieces(tokens: TokenStream, writers: list[Writer], *, told: bool) -> Iterator[Completion]:
    """The pieces of all prompts; ``told`` means that the caller named the stop tokens."""
    try:
        for slot, token in tokens:
            piece = writers[slot].push(token)
            if piece is not None:
                if piece.finish_reason is not None:
                    tokens.stop(slot)
                yield piece
            yield from _ended(tokens, writers, told)
        yield from _ended(tokens, writers, told)
    finally:
        tokens.close()


def _ended(tokens: TokenStream, writers: list[Writer], told: bool) -> Iterator[Completion]:
    for writer in writers:
        reason = tokens.finish_reasons[writer.index]
        if reason is not None and not writer.ended:
            yield writer.finish(reason, tokens.stop_tokens[writer.index] if told else None)


def _held(session: Session, slot: int) -> list[int]:
    pending = session.pending[slot]
    return [] if pending is None else [pending]


def _prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    given = _list(prompts)
    if given and not any(isinstance(one, str | bytes) or hasattr(one, "__len__") for one in given):
        return [given]  # numbers: one prompt of token ids
    return [one if isinstance(one, str) else _list(one) for one in given]


def _list(value: object) -> list[Any]:
    if isinstance(value, bytes | Mapping) or not isinstance(value, Iterable):
        raise InputError(f"prompts must be texts or lists of token ids, got {short(value)}.")
    return list(value)
