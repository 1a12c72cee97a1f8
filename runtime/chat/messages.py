"""Messages and tools, read from the dictionaries of OpenAI's API.

Every mistake is one :class:`~foldkv.errors.InputError` that says where (``messages[2].tool_calls[0].function.name``), what was found
and what was expected. Keys that no encoding reads are ignored, because clients send back what servers added.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import InputError, nearest, short

#: Short answers that V4 gives to a token of their own: whether to search, for what, how to call a conversation, and so on.
TASKS = ("action", "query", "authority", "domain", "title", "read_url")
ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")


@dataclass(frozen=True)
class Tool:
    """A function that the model may call: its name, and the whole of its ``function`` as given, keys in order."""

    name: str
    function: dict[str, Any]


@dataclass(frozen=True)
class ToolCall:
    """A call that the model wrote. ``arguments`` is JSON of an object, or whatever else the model wrote there."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        role: one of ``ROLES``. ``latest_reminder`` (date, place, language) and ``developer`` are V4's own.
        content: its text; parts of text are joined by blank lines. What an assistant refused with is its text.
        reasoning: what an assistant thought before it answered.
        tool_calls: the calls of an assistant.
        tool_call_id: which call a tool answers.
        tools, response_format: of a system or developer message: what it says the model may call, and how it must answer.
        task: asks for a short answer after this message; one of ``TASKS``.
        unfinished: an assistant's text that the model is to continue.
    """

    role: str
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    tools: tuple[Tool, ...] = ()
    response_format: Any = None
    task: str | None = None
    unfinished: bool = False


def wrong(where: str, found: object, expected: str, hint: str = "") -> InputError:
    """The error for a value that is not what was expected at a place."""
    return InputError(f"{where} is {short(found)}; expected {expected}.{f' {hint}' if hint else ''}")


def read_messages(messages: Iterable[Mapping[str, Any] | Message], where: str = "messages") -> tuple[Message, ...]:
    """Typed messages of a conversation; those that are typed already are taken as they are.

    Raises:
        InputError: there is none, or one is malformed.
    """
    rows = _list(messages, where, "a list of messages")
    if not rows:
        raise InputError(f"{where} is empty; expected at least one message.")
    return tuple(row if isinstance(row, Message) else _message(row, f"{where}[{i}]") for i, row in enumerate(rows))


def read_tools(tools: Iterable[Mapping[str, Any] | Tool] | None, where: str = "tools") -> tuple[Tool, ...]:
    """Typed tools; none for None.

    Raises:
        InputError: one is malformed, or two have the same name.
    """
    rows = [] if tools is None else _list(tools, where, "a list of tools")
    found = tuple(row if isinstance(row, Tool) else _tool(row, f"{where}[{i}]") for i, row in enumerate(rows))
    for i, tool in enumerate(found):
        if tool.name in [other.name for other in found[:i]]:
            raise wrong(f"{where}[{i}].function.name", tool.name, "a name that no other tool has")
    return found


def _message(row: object, where: str) -> Message:
    if not isinstance(row, Mapping):
        raise wrong(where, row, "a message: a table with role and content")
    role = row.get("role")
    if role not in ROLES:
        hint = nearest(role, ROLES).strip() if isinstance(role, str) else ""
        raise wrong(f"{where}.role", role, f"one of {', '.join(ROLES)}", hint)
    task = row.get("task")
    if task is not None and (task not in TASKS or role == "tool"):
        raise wrong(f"{where}.task", task, f"one of {', '.join(TASKS)}, in a message that is not a tool's")
    for key, owners in (
        ("tools", ("system", "developer")),
        ("response_format", ("system", "developer")),
        ("tool_calls", ("assistant",)),
        ("tool_call_id", ("tool",)),
    ):
        if row.get(key) and role not in owners:
            raise wrong(f"{where}.{key}", row[key], f"no such key in a message of the role {role}")
    assistant = role == "assistant"
    return Message(
        role=role,
        content=_content(row, where, role),
        reasoning=_text(row, ("reasoning_content", "reasoning"), where) if assistant else "",
        tool_calls=_calls(row.get("tool_calls"), f"{where}.tool_calls"),
        tool_call_id=_text(row, ("tool_call_id",), where),
        tools=read_tools(row.get("tools"), f"{where}.tools"),
        response_format=_json(row.get("response_format"), f"{where}.response_format"),
        task=task,
        unfinished=assistant and any(_flag(row, key, where) for key in ("prefix", "wo_eos")),
    )


def _content(row: Mapping[str, Any], where: str, role: str) -> str:
    where, content = f"{where}.content", row.get("content")
    if isinstance(content, str):
        if role == "developer" and not content:
            raise wrong(where, content, "a text that is not empty")
        return content
    if content is None and role == "assistant":
        return _text(row, ("refusal",), where.removesuffix(".content"))
    if content is None and role == "system":
        return ""
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise wrong(where, content, "a text, or a list of parts of the type text")
    parts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, Mapping) and kind == "text" and isinstance(part.get("text"), str):
            parts.append(part["text"])
        elif role == "assistant" and kind == "refusal" and isinstance(part.get("refusal"), str):
            parts.append(part["refusal"])  # what it said instead of an answer
        elif role == "tool" and isinstance(kind, str) and kind != "text":
            parts.append(f"[Unsupported {kind}]")  # the published rule: the model learns that something was there
        else:
            raise wrong(f"{where}[{i}]", part, '{"type": "text", "text": "..."}', "Only text can be read.")
    return "\n\n".join(parts)


def _calls(rows: object, where: str) -> tuple[ToolCall, ...]:
    if rows is None:
        return ()
    calls = []
    for i, row in enumerate(_list(rows, where, "a list of calls")):
        at = f"{where}[{i}]"
        function = _function(row, at)
        arguments = function.get("arguments")
        if isinstance(arguments, Mapping):
            arguments = json.dumps(_json(arguments, f"{at}.function.arguments"), ensure_ascii=False)
        if not isinstance(arguments, str):
            raise wrong(f"{at}.function.arguments", arguments, "JSON of an object, as a text")
        name = _name(function, f"{at}.function.name")
        calls.append(ToolCall(name, arguments, _text(row, ("id",), at) or _text(function, ("id",), f"{at}.function")))
    return tuple(calls)


def _tool(row: object, where: str) -> Tool:
    function = _function(row, where)
    name, at = _name(function, f"{where}.function.name"), f"{where}.function.parameters"
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise wrong(at, parameters, "a JSON schema: a table")
    return Tool(name, _json(function, f"{where}.function"))


def _function(row: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise wrong(where, row, 'a table: {"type": "function", "function": {"name": ...}}')
    if row.get("type", "function") != "function":
        raise wrong(f"{where}.type", row["type"], "'function'")
    function = row.get("function")
    if not isinstance(function, Mapping):
        raise wrong(f"{where}.function", function, "a table with a name")
    return function


def _name(function: Mapping[str, Any], where: str) -> str:
    name = function.get("name")
    # A quote would end the name early in the markup that the model reads and writes.
    if not isinstance(name, str) or not name.strip() or any(sign in name for sign in '"<>\n'):
        raise wrong(where, name, 'a name without ", <, > and line breaks')
    return name


def _text(row: Mapping[str, Any], keys: Sequence[str], where: str) -> str:
    """The text of the first key that is not null; "" without any."""
    for key in keys:
        value = row.get(key)
        if value is not None:
            if not isinstance(value, str):
                raise wrong(f"{where}.{key}", value, "a text")
            return value
    return ""


def _flag(row: Mapping[str, Any], key: str, where: str) -> bool:
    value = row.get(key, False)
    if type(value) is not bool:
        raise wrong(f"{where}.{key}", value, "true or false")
    return value


def _json(value: Any, where: str) -> Any:
    """A copy made of plain JSON types, so that nothing changes under a typed message."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise wrong(where, value, f"values that JSON has ({error})") from None


def _list(value: object, where: str, expected: str) -> list[Any]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise wrong(where, value, expected)
    return list(value)
