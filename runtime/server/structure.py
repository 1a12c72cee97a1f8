"""What an answer must keep to, as a body says it: JSON, a pattern, a choice, a grammar, or calls of tools."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ...errors import InputError, short
from ...packages import installed
from ..chat.revisions import THOUGHT
from ..serving.constraint import NewConstraint
from .bodies import ChatBody, CompletionBody, ResponseFormat, SamplingBody
from .problems import Problem
from .service import Service

_log = logging.getLogger(__name__)


def needs_grammar(body: SamplingBody) -> bool:
    """Whether a grammar is to be compiled for a body, which may take seconds."""
    if body.structured_outputs is not None or body.guided_regex is not None:
        return True
    return isinstance(body, ChatBody) and (bool(body.tools) or _schema(body.response_format) is not None)


def completion_constraint(body: CompletionBody, service: Service) -> NewConstraint | None:
    """What a text must keep to; None for any text.

    Raises:
        Problem: the grammar is wrong, or nothing here can compile it.
    """
    return _structured(body, service, after="")


def chat_constraint(body: ChatBody, service: Service, *, thinks: bool) -> NewConstraint | None:
    """What an answer must keep to; ``thinks``: it begins as reasoning, which is free.

    Raises:
        Problem: a grammar is wrong, two were asked for, or nothing here can compile one.
    """
    after, form = THOUGHT if thinks else "", _schema(body.response_format)
    if not body.tools or body.tool_choice == "none":
        content = _structured(body, service, after=after) if form is None else _json(form, service, after=after)
        return content or _calls(body, service, None, thinks=thinks)
    if form is None and (body.structured_outputs is not None or body.guided_regex is not None):
        field = "structured_outputs" if body.structured_outputs is not None else "guided_regex"
        raise Problem(
            400, f"{field} is for all of the answer, and tools may be called in it. Give response_format, which may stand beside tools, or "
            "tool_choice: 'none'.", field, "invalid_value",
        )  # fmt: skip
    if form is not None:
        _json(form, service, after=after)  # its own mistakes are told as those of its field
    calls = _calls(body, service, form, thinks=thinks)
    if form is not None and calls is None:
        raise Problem(
            400, "response_format cannot stand beside tools here, because nobody knows how this model writes calls. Give one of them, or "
            "tool_choice: 'none'.", "response_format", "invalid_value",
        )  # fmt: skip
    return calls


def _schema(form: ResponseFormat | None) -> Mapping[str, Any] | None:
    """The schema of the answer; None for any text."""
    if form is None or form.type == "text":
        return None
    return {"type": "object"} if form.json_schema is None else form.json_schema.schema_


def _json(schema: Mapping[str, Any], service: Service, *, after: str) -> NewConstraint:
    try:
        return service.grammars.json_schema(schema, after=after)
    except InputError as error:
        raise _refused(error, "response_format") from None


def _calls(
    body: ChatBody, service: Service, content: Mapping[str, Any] | None, *, thinks: bool
) -> NewConstraint | None:
    """What calls must keep to; an answer without them is JSON of the schema ``content``, where one is given.

    Where the model may call as it likes, parameters that no grammar can hold are left to the model, unless their tool says ``strict``;
    the name is held. Where nothing can compile grammars and nothing needs one, all is left to the model. The log says so.
    """
    chosen, tools = body.tool_choice or "auto", body.tools
    if not tools or service.chat is None:
        return None
    several = body.parallel_tool_calls is not False
    strict = any((tool.get("function") or {}).get("strict") is True for tool in tools)
    free = chosen == "auto" and several and not strict and content is None
    if (free or chosen == "none") and not installed("llguidance"):
        if free:
            _log.warning("calls of tools are not held to the tools, because llguidance is not installed")
        return None  # with "none" the model is not told of them
    from ..serving.tool_grammar import tool_grammar

    choice = chosen if isinstance(chosen, str) else chosen.model_dump()

    def compiled(*, held: bool) -> NewConstraint | None:
        assert service.chat is not None
        grammar = tool_grammar(
            service.chat, tools, choice, tokenizer=service.tokenizer, thinking=thinks, parallel=several, content=content,
            left_free=_left_free if chosen == "auto" else None, held=held,
        )  # fmt: skip
        return None if grammar is None else service.grammars.lark(grammar, free=False)

    try:
        try:
            return compiled(held=True)
        except InputError as error:
            if chosen != "auto" or strict:
                raise
            found = compiled(held=False)
            _log.warning("the parameters of all tools of a request are left to the model: %s", short(str(error), 300))
            return found
    except InputError as error:
        text = str(error)
        raise _refused(error, "tool_choice" if text.startswith("tool_choice") else "tools") from None


def _left_free(name: str, error: InputError) -> None:
    _log.warning("the parameters of the tool %s are left to the model: %s", short(name), short(str(error), 300))


def _structured(body: SamplingBody, service: Service, *, after: str) -> NewConstraint | None:
    asked = body.structured_outputs
    try:
        if body.guided_regex is not None:
            return service.grammars.regex(body.guided_regex, after=after)
        if asked is None:
            return None
        if asked.regex is not None:
            return service.grammars.regex(asked.regex, after=after)
        if asked.choice is not None:
            return service.grammars.choice(asked.choice, after=after)
        if asked.grammar is not None:
            if not service.free_grammars:
                raise Problem(
                    400, "structured_outputs.grammar is turned off at this server. Use json, regex or choice.", "structured_outputs.grammar",
                    "not_available",
                )  # fmt: skip
            if after:
                raise InputError("a grammar is for all of the answer, and the model thinks first. Turn thinking off.")
            return service.grammars.lark(asked.grammar)
        assert asked.json_ is not None
        return service.grammars.json_schema(asked.json_, after=after)
    except InputError as error:
        raise _refused(error, "structured_outputs" if asked is not None else "guided_regex") from None


def _refused(error: InputError, field: str) -> Problem:
    text = str(error)
    return Problem(400, text if text.startswith(field) else f"{field}: {text}", field, "invalid_value")
