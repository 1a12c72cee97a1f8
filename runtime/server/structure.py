"""What an answer must keep to, as a body says it: JSON, a pattern, a choice, a grammar, or calls of tools."""

from __future__ import annotations

from ...errors import InputError
from ...packages import installed
from ..chat.revisions import THOUGHT
from ..serving.constraint import NewConstraint
from .bodies import ChatBody, CompletionBody, ResponseFormat, SamplingBody
from .problems import Problem
from .service import Service


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
    after, form = THOUGHT if thinks else "", body.response_format
    calls = _calls(body, service, thinks=thinks)
    if form is None or form.type == "text":
        content = _structured(body, service, after=after)
        field = "structured_outputs" if body.structured_outputs is not None else "guided_regex"
    else:
        content, field = _json(form, service, after=after), "response_format"
    if content is not None and body.tools and body.tool_choice != "none":
        raise Problem(
            400, f"{field} is for all of the answer, and tools may be called in it. Give one of them, or tool_choice: 'none'.", field,
            "invalid_value",
        )  # fmt: skip
    return content or calls


def _json(form: ResponseFormat, service: Service, *, after: str) -> NewConstraint:
    try:
        if form.json_schema is None:
            return service.grammars.json_object(after=after)
        return service.grammars.json_schema(form.json_schema.schema_, after=after)
    except InputError as error:
        raise _refused(error, "response_format") from None


def _calls(body: ChatBody, service: Service, *, thinks: bool) -> NewConstraint | None:
    """What calls must keep to.

    Where the model may call as it likes and no tool says ``strict``, a schema that no grammar can hold is left to the model, and so
    are all where nothing can compile grammars.
    """
    chosen, tools = body.tool_choice or "auto", body.tools
    if not tools or service.chat is None:
        return None
    several = body.parallel_tool_calls is not False
    strict = any((tool.get("function") or {}).get("strict") is True for tool in tools)
    free = chosen == "auto" and several and not strict
    if (free or chosen == "none") and not installed("llguidance"):
        return None  # with "none" the model is not told of them
    from ..serving.tool_grammar import tool_grammar

    choice = chosen if isinstance(chosen, str) else chosen.model_dump()
    try:
        grammar = tool_grammar(
            service.chat, tools, choice, tokenizer=service.tokenizer, thinking=thinks, parallel=several
        )
        return None if grammar is None else service.grammars.lark(grammar, free=False)
    except InputError as error:
        if free:
            return None
        text = str(error)
        raise _refused(error, "tool_choice" if text.startswith("tool_choice") else "tools") from None


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
