"""What is asked of an engine, and whether it can be done: all checks of a request are here, before anything runs."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from ...errors import CapacityError, InputError, short
from ..bundle import Bundle
from ..completion import stop_strings
from ..sampling import GREEDY, Sampling
from ..tokenizer import Tokenizer
from .constraint import Constraint

#: The most completions and alternatives that a request can ask for.
MOST_COMPLETIONS, MOST_LOGPROBS = 128, 64


@dataclass(frozen=True)
class Request:
    """What is asked of an engine. Names are vLLM's and OpenAI's where they have one.

    Attributes:
        prompt: a text, or token ids that are fed unchanged; at least one token.
        max_new_tokens: the most new tokens; None for as many as the context has room for.
        sampling: how tokens are chosen.
        n: completions. The prompt is fed once; each completion draws for itself.
        stop: a completion ends before any of these texts.
        stop_tokens: a completion ends before it gives one of them out. None means the model's end-of-sequence tokens.
        logprobs: give out the logarithm of every token's probability, and those of this many most probable tokens; None for no such.
        add_special_tokens: put the tokenizer's special tokens around a text; None is True.
        skip_special_tokens: leave special tokens out of the text.
        constraint: makes what each completion must keep to; see :mod:`foldkv.runtime.serving.structured`.
        timeout: seconds from now until it must have ended; what is there by then is given out.
        use_prefixes: start from a kept state if there is one of a prefix of the prompt.
        exact: use, and keep, only states that have the bits of a run without any. Otherwise also states after prompts and answers,
            whose tokens were fed in other chunks: results then differ by rounding.
        id: for logs; None for a new one.
    """

    prompt: str | Sequence[int]
    max_new_tokens: int | None = None
    sampling: Sampling = GREEDY
    n: int = 1
    stop: str | Sequence[str] = ()
    stop_tokens: Collection[int] | None = None
    logprobs: int | None = None
    add_special_tokens: bool | None = None
    skip_special_tokens: bool = True
    constraint: Callable[[], Constraint] | None = None
    timeout: float | None = None
    use_prefixes: bool = True
    exact: bool = True
    id: str | None = None


@dataclass(frozen=True)
class Checked:
    """A request that can be done.

    Attributes:
        request: as it was given.
        prompt: its tokens.
        most: new tokens, at most.
        stop: its stop strings, each once.
        stop_tokens: which end a completion.
        named: those of them that are told as the reason: the request named them, and they are no end of sequence.
    """

    request: Request
    prompt: tuple[int, ...]
    most: int
    stop: tuple[str, ...]
    stop_tokens: frozenset[int]
    named: frozenset[int]


def check_request(request: Request, bundle: Bundle, tokenizer: Tokenizer | None, context: int) -> Checked:
    """A request with its tokens.

    Args:
        request: what is asked.
        bundle: what will answer.
        tokenizer: of the bundle; None if there is no text in or out.
        context: tokens that a sequence can hold.

    Raises:
        CapacityError: prompt and answer do not fit into the context.
        InputError: a field is of the wrong type or out of range.
    """
    if not isinstance(request, Request):
        raise InputError(f"expected a Request, got {short(request)}.")
    vocabulary = bundle.model.vocab_size
    if not isinstance(request.sampling, Sampling):
        raise InputError(
            f"sampling must be a Sampling, such as Sampling(temperature=0.7), got {short(request.sampling)}."
        )
    for name in ("skip_special_tokens", "use_prefixes", "exact"):
        if type(getattr(request, name)) is not bool:
            raise InputError(f"{name} must be True or False, got {getattr(request, name)!r}.")
    if request.add_special_tokens is not None and type(request.add_special_tokens) is not bool:
        raise InputError(f"add_special_tokens must be True, False or None, got {request.add_special_tokens!r}.")
    _in_range("n", request.n, 1, MOST_COMPLETIONS)
    if request.max_new_tokens is not None:
        _in_range("max_new_tokens", request.max_new_tokens, 1, None)
    if request.logprobs is not None:
        _in_range("logprobs", request.logprobs, 0, min(MOST_LOGPROBS, vocabulary))
    timeout = request.timeout
    if timeout is not None and (
        isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf
    ):
        raise InputError(f"timeout must be a number of seconds greater than 0, got {timeout!r}.")
    if request.id is not None and not isinstance(request.id, str):
        raise InputError(f"id must be a text, got {short(request.id)}.")
    if request.constraint is not None and not callable(request.constraint):
        raise InputError(f"constraint must be what Grammars makes, got {short(request.constraint)}.")
    wrong = [token for token in request.sampling.logit_bias if token >= vocabulary]
    if wrong:
        raise InputError(f"logit_bias has the token {wrong[0]}; the vocabulary has the ids 0 to {vocabulary - 1}.")
    stop = stop_strings(request.stop)
    if stop and tokenizer is None:
        raise InputError("stop strings need a tokenizer, and this engine has none. Use stop_tokens.")
    prompt = _tokens(request, tokenizer, vocabulary)
    room = context - len(prompt) + 1  # the last token that is given out is not fed
    most = room if request.max_new_tokens is None else request.max_new_tokens
    if room < 1 or most > room:
        asked = "at least 1 new token" if request.max_new_tokens is None else f"{most} new tokens"
        raise CapacityError(
            f"a prompt of {len(prompt)} tokens and {asked} exceed the context of {context}. "
            "Ask for less, or give a larger context."
        )
    ends = frozenset(bundle.model.eos_token_ids)
    stops = ends if request.stop_tokens is None else _stop_tokens(request.stop_tokens, vocabulary)
    return Checked(request, prompt, most, stop, stops, stops - ends)


def _in_range(name: str, value: object, least: int, most: int | None) -> None:
    if type(value) is not int or value < least or (most is not None and value > most):
        wanted = f"an integer of {least} or more" if most is None else f"an integer from {least} to {most}"
        raise InputError(f"{name} must be {wanted}, got {short(value)}.")


def _tokens(request: Request, tokenizer: Tokenizer | None, vocabulary: int) -> tuple[int, ...]:
    prompt = request.prompt
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InputError("the prompt is a text, and this engine has no tokenizer. Give token ids.")
        given = tokenizer.encode(prompt, add_special_tokens=request.add_special_tokens is not False)
        if not given:
            raise InputError("the prompt has no token; give at least one character.")
    else:
        try:
            given = [-1 if isinstance(token, bool) else operator.index(token) for token in prompt]
        except TypeError:
            raise InputError(f"the prompt must be a text or a list of token ids, got {short(prompt)}.") from None
        if not given:
            raise InputError("the prompt is empty; give at least one token, such as the beginning-of-sequence token.")
    where = next((at for at, token in enumerate(given) if not 0 <= token < vocabulary), None)
    if where is not None:
        raise InputError(
            f"token {where} of the prompt is {short(given[where])}; the vocabulary has the ids 0 to {vocabulary - 1}. "
            "Encode the text with the tokenizer of this bundle."
        )
    return tuple(given)


def _stop_tokens(tokens: Collection[int], vocabulary: int) -> frozenset[int]:
    try:
        stops = [-1 if isinstance(token, bool) else operator.index(token) for token in tokens]
    except TypeError:
        stops = [-1]
    if not all(0 <= token < vocabulary for token in stops):
        raise InputError(
            f"stop_tokens must be token ids, 0 to {vocabulary - 1}, got {short(tokens)}. For a text use `stop`."
        )
    return frozenset(stops)
