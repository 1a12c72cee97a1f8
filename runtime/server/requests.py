"""From the body of a request to what the engine is asked."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...errors import short
from ..chat import ChatFormat, read_tools
from ..chat.parser import Parser
from ..sampling import Sampling
from ..serving.constraint import NewConstraint
from ..serving.request import Request
from .bodies import ChatBody, CompletionBody, SamplingBody, TemplateOptions
from .problems import Problem
from .service import Service
from .structure import chat_constraint, completion_constraint

#: New tokens of a completion where the body does not say it, as OpenAI has it.
_NEW_TOKENS = 16
#: Answers to all prompts of a request, at most.
_ANSWERS = 256
#: What an answer that is not a stream may take, in tokens of all its choices. A token whose probability is told takes as much as
#: four, and so does each of its alternatives: some 350 bytes.
_KEPT, _ROW = 1 << 22, 4
#: What an effort of OpenAI means where the encoding has no level of this name: the first of these that it has.
_EFFORTS = {
    "minimal": ("low", "high"), "low": ("low", "high"), "medium": ("high",), "high": ("high",), "xhigh": ("xhigh", "max"),
    "max": ("max",),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What a body asks for.

    Attributes:
        id: of the answer.
        requests: one for each prompt.
        prompts: their token ids.
        answers: to each prompt.
        stream: give out the answers while they grow.
        usage: end a stream with the numbers of tokens.
        logprobs: tell the probabilities of tokens.
        parser: for chat: makes what reads an answer.
    """

    id: str
    requests: tuple[Request, ...]
    prompts: Sequence[Sequence[int]]
    answers: int
    stream: bool
    usage: bool
    logprobs: bool
    parser: Callable[[], Parser] | None = None


def completion_job(body: CompletionBody, service: Service) -> Job:
    """What the engine is asked for a body of /v1/completions.

    Raises:
        Problem, InputError: the model cannot do it; the message says what.
    """
    _check_model(body, service)
    prompts = [service.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in body.prompt]
    for prompt in prompts:
        if not prompt:
            raise Problem(400, "prompt is empty; give at least one character.", "prompt", "invalid_value")
    return _job(
        f"cmpl-{secrets.token_hex(12)}", body, service, prompts, "prompt", most=body.max_tokens, usual=_NEW_TOKENS,
        logprobs=body.logprobs, skip_special_tokens=body.skip_special_tokens is not False,
        constraint=completion_constraint(body, service),
    )  # fmt: skip


def chat_job(body: ChatBody, service: Service) -> Job:
    """What the engine is asked for a body of /v1/chat/completions.

    Raises:
        Problem, InputError: the model cannot do it; the message says what.
    """
    _check_model(body, service)
    chat = service.chat
    if chat is None:
        raise Problem(
            400, f"This model takes no chat. {service.no_chat} /v1/completions continues texts.", code="no_chat"
        )
    thinking, effort = _thinking(body, chat)
    tools = read_tools(body.tools)
    prompt = chat.prompt(
        body.messages, tools=tools if body.tool_choice != "none" else None, thinking=thinking, effort=effort
    )
    ids = prompt.token_ids(service.tokenizer)
    return _job(
        f"chatcmpl-{secrets.token_hex(12)}", body, service, [ids], "messages",
        most=body.max_completion_tokens or body.max_tokens, usual=None,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        # DeepSeek's parser reads the special tokens.
        skip_special_tokens=not chat.efforts,
        constraint=chat_constraint(body, service, thinks=prompt.thinks),
        parser=lambda: chat.parser(thinking=prompt.thinks),
    )  # fmt: skip


def _check_model(body: SamplingBody, service: Service) -> None:
    if body.model is not None and body.model != service.name:
        raise Problem(
            404, f"The model {short(body.model)} is not here; this server has {service.name!r}.", "model", "model_not_found"
        )  # fmt: skip


def _job(
    name: str, body: SamplingBody, service: Service, prompts: list[list[int]], field: str, *, most: int | None, usual: int | None,
    logprobs: int | None, skip_special_tokens: bool, constraint: NewConstraint | None, parser: Callable[[], Parser] | None = None,
) -> Job:  # fmt: skip
    vocabulary = service.engine.model.bundle.model.vocab_size
    answers, sampling = body.n or 1, _sampling(body, vocabulary)
    if len(prompts) * answers > _ANSWERS:
        raise Problem(
            400, f"{len(prompts)} prompts with {answers} answers each are more than {_ANSWERS}. Ask for fewer at once.", "n",
            "invalid_value",
        )  # fmt: skip
    for number, prompt in enumerate(prompts):
        if unknown := [token for token in prompt if token >= vocabulary]:
            where = field if len(prompts) == 1 else f"{field}[{number}]"
            raise Problem(
                400, f"{where} has the token {unknown[0]}; the vocabulary has the ids 0 to {vocabulary - 1}.", where, "invalid_value"
            )  # fmt: skip
    requests = tuple(
        Request(
            prompt,
            max_new_tokens=_room(len(prompt), most, usual, service.context, field),
            sampling=sampling,
            n=answers,
            stop=body.stop or (),
            stop_tokens=_stop_tokens(body, service),
            logprobs=logprobs,
            skip_special_tokens=skip_special_tokens,
            constraint=constraint,
            exact=service.exact,
            id=name if len(prompts) == 1 else f"{name}-{number}",
        )
        for number, prompt in enumerate(prompts)
    )
    _check_kept(requests, body)
    usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return Job(name, requests, prompts, answers, bool(body.stream), usage, logprobs is not None, parser)


def _check_kept(requests: Sequence[Request], body: SamplingBody) -> None:
    """Refuse what could take too much memory until all of it is there."""
    tokens, told = sum(request.n * (request.max_new_tokens or 0) for request in requests), requests[0].logprobs
    if body.stream or tokens * (1 if told is None else _ROW * (1 + told)) <= _KEPT:
        return
    what = "" if told is None else f", with their probabilities and {told} alternatives each,"
    raise Problem(
        400, f"The answers may have {tokens} tokens together{what} which is too much to be kept until the end. Ask for stream: true, a smaller "
        "max_tokens, or fewer answers or alternatives.", "n" if told is None else "logprobs", "invalid_value",
    )  # fmt: skip


def _room(prompt: int, most: int | None, usual: int | None, context: int, field: str) -> int:
    """How many new tokens a prompt of so many tokens gets."""
    room = context - prompt
    if room < 1 or (most is not None and most > room):
        asked = f" and {most} were asked for" if most is not None else ""
        raise Problem(
            400, f"The prompt has {prompt} tokens{asked}; together they may be {context}, and an answer takes at least one. "
            "Shorten the prompt or ask for less.", field if room < 1 else "max_tokens", "context_length_exceeded",
        )  # fmt: skip
    return most or min(usual or room, room)


def _sampling(body: SamplingBody, vocabulary: int) -> Sampling:
    for field, ids in (("logit_bias", body.logit_bias or {}), ("stop_token_ids", body.stop_token_ids or [])):
        if unknown := [token for token in ids if token >= vocabulary]:
            raise Problem(
                400, f"{field} names the token {unknown[0]}; the vocabulary has the ids 0 to {vocabulary - 1}.", field, "invalid_value"
            )  # fmt: skip
    top_k = None if body.top_k in (None, 0, -1) else body.top_k  # vLLM's ways to say all of them
    return Sampling(
        temperature=_or(body.temperature, 1.0),
        top_k=top_k,
        top_p=max(_or(body.top_p, 1.0), sys.float_info.min),  # 0 is the most probable token alone, as for OpenAI
        min_p=_or(body.min_p, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        logit_bias=body.logit_bias or {},
        seed=secrets.randbits(63) if body.seed is None else body.seed % 2**64,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _stop_tokens(body: SamplingBody, service: Service) -> frozenset[int] | None:
    """Beside the model's own; None for these alone."""
    if not body.stop_token_ids:
        return None
    return frozenset(body.stop_token_ids) | frozenset(service.engine.model.bundle.model.eos_token_ids)


def _thinking(body: ChatBody, chat: ChatFormat) -> tuple[bool, str | None]:
    """Whether the model thinks before it answers, and how much."""
    options = body.chat_template_kwargs or TemplateOptions()
    said = {
        "thinking": None if body.thinking is None else body.thinking.type == "enabled",
        "chat_template_kwargs.thinking": options.thinking,
        "chat_template_kwargs.enable_thinking": options.enable_thinking,
        "reasoning_effort": None if body.reasoning_effort is None else body.reasoning_effort != "none",
    }
    given = {name: value for name, value in said.items() if value is not None}
    if len(set(given.values())) > 1:
        raise Problem(
            400, f"{' and '.join(given)} say different things of thinking. Give one.", next(iter(given)), "invalid_value"
        )  # fmt: skip
    thinking = next(iter(given.values()), True)
    effort = body.reasoning_effort
    if not thinking or effort in (None, "none"):
        return thinking, None
    if chat.efforts and effort not in chat.efforts:
        means = [level for level in _EFFORTS.get(effort, ()) if level in chat.efforts]
        if not means:
            raise Problem(
                400, f"reasoning_effort is {short(effort)}; expected one of {', '.join(('none', *_EFFORTS))}.",
                "reasoning_effort", "invalid_value",
            )  # fmt: skip
        effort = means[0]
    return thinking, effort
