"""Malformed messages and tools: one clear error each."""

from __future__ import annotations

import re
from typing import Any

import pytest

from foldkv.errors import EXIT_BAD_INPUT, InputError
from foldkv.runtime.chat import Message, Tool, read_messages, read_tools

USER = {"role": "user", "content": "Hi"}


def calls(*rows: Any) -> list[Any]:
    return [USER, {"role": "assistant", "content": "", "tool_calls": list(rows)}]


def function(**keys: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "arguments": "{}"} | keys}


LOOP: list[Any] = []
LOOP.append(LOOP)
MESSAGES: dict[str, tuple[Any, str]] = {
    "none": ([], "messages is empty; expected at least one message"),
    "a text": ("Hi", "messages is 'Hi'; expected a list of messages"),
    "one message": (USER, "expected a list of messages"),
    "null": (None, "messages is None; expected a list of messages"),
    "a message that is a text": (["Hi"], "messages[0] is 'Hi'; expected a message"),
    "no role": ([{"content": "Hi"}], "messages[0].role is None; expected one of system, developer, user"),
    "a role with a typo": ([USER, {"role": "assistent", "content": ""}], "messages[1].role is 'assistent'; expected"),
    "a role of an older API": ([{"role": "function", "content": ""}], "messages[0].role is 'function'"),
    "a role that is a list": ([{"role": ["user"], "content": ""}], "messages[0].role is ['user']"),
    "no content": ([{"role": "user"}], "messages[0].content is None; expected a text, or a list of parts"),
    "a number as content": ([{"role": "user", "content": 1}], "messages[0].content is 1"),
    "bytes as content": ([{"role": "user", "content": b"Hi"}], "messages[0].content is b'Hi'"),
    "a tool's answer without content": ([USER, {"role": "tool"}], "messages[1].content is None"),
    "a reminder without content": ([{"role": "latest_reminder"}], "messages[0].content is None"),
    "an empty developer message": ([{"role": "developer", "content": ""}], "expected a text that is not empty"),
    "an image": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}],
        "Only text can be read",
    ),
    "a part that is a text": ([{"role": "user", "content": ["Hi"]}], "messages[0].content[0] is 'Hi'"),
    "a part without text": ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0] is"),
    "reasoning that is a list": ([USER, {"role": "assistant", "reasoning_content": []}], "reasoning_content is []"),
    "an unknown task": ([USER | {"task": "search"}], "messages[0].task is 'search'; expected one of action, query"),
    "a tool's task": ([{"role": "tool", "content": "", "task": "query"}], "in a message that is not a tool's"),
    "a prefix that is a text": (
        [USER, {"role": "assistant", "prefix": "yes"}],
        "prefix is 'yes'; expected true or false",
    ),
    "calls of a user": ([USER | {"tool_calls": [function()]}], "no such key in a message of the role user"),
    "tools of a user": ([USER | {"tools": [function()]}], "messages[0].tools is"),
    "an answer's id at a user": ([USER | {"tool_call_id": "x"}], "messages[0].tool_call_id is 'x'"),
    "an id that is a number": (
        [{"role": "tool", "content": "", "tool_call_id": 7}],
        "tool_call_id is 7; expected a text",
    ),
    "a response format that JSON lacks": (
        [{"role": "system", "response_format": {"type": object}}],
        "messages[0].response_format is",
    ),
    "a response format without an end": ([{"role": "system", "response_format": LOOP}], "values that JSON has"),
    "calls that are a table": ([USER, {"role": "assistant", "tool_calls": {"a": 1}}], "expected a list of calls"),
    "a call that is a text": (calls("f"), "messages[1].tool_calls[0] is 'f'"),
    "a call of another type": (calls(function() | {"type": "custom"}), "tool_calls[0].type is 'custom'"),
    "a call without function": (calls({"type": "function"}), "messages[1].tool_calls[0].function is None"),
    "a call without name": (calls(function(), function(name=None)), "tool_calls[1].function.name is None"),
    "a call with a quote in its name": (calls(function(name='f"')), "tool_calls[0].function.name is 'f\"'"),
    "a call without arguments": (
        calls(function(arguments=None)),
        "function.arguments is None; expected JSON of an object",
    ),
    "arguments that are a list": (calls(function(arguments=[1])), "tool_calls[0].function.arguments is [1]"),
    "arguments that JSON lacks": (calls(function(arguments={"a": {1}})), "function.arguments is {'a': {1}}"),
    "a call with a number as id": (calls(function() | {"id": 1}), "messages[1].tool_calls[0].id is 1"),
    "tools of a system message": (
        [{"role": "system", "tools": [function(name="")]}],
        "messages[0].tools[0].function.name is ''",
    ),
}
TOOLS: dict[str, tuple[Any, str]] = {
    "a table": (function(), "tools is"),
    "a text": (["f"], "tools[0] is 'f'"),
    "a bare function": ([{"name": "f", "parameters": {}}], "tools[0].function is None; expected a table with a name"),
    "another type": ([{"type": "web_search"}], "tools[0].type is 'web_search'; expected 'function'"),
    "a name with a line break": ([function(name="a\nb")], "tools[0].function.name is 'a\\nb'"),
    "parameters that are a text": ([function(parameters="{}")], "tools[0].function.parameters is '{}'"),
    "a schema that JSON lacks": ([function(parameters={"a": ...})], "values that JSON has"),
    "two of one name": (
        [function(), function()],
        "tools[1].function.name is 'f'; expected a name that no other tool has",
    ),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_a_malformed_message_is_one_clear_error(case: str) -> None:
    messages, says = MESSAGES[case]
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        read_messages(messages)
    assert caught.value.exit_code == EXIT_BAD_INPUT and "expected" in str(caught.value)


@pytest.mark.parametrize("case", TOOLS)
def test_a_malformed_tool_is_one_clear_error(case: str) -> None:
    tools, says = TOOLS[case]
    with pytest.raises(InputError, match=re.escape(says)):
        read_tools(tools)


def test_what_clients_send_back_is_taken() -> None:
    """The message of a client's library, with all its empty keys."""
    row = {
        "role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None, "function_call": None,
        "reasoning": "Hm", "tool_calls": [{"id": "x", "index": 0} | function(arguments={"b": 1, "a": "é"})],
    }  # fmt: skip
    (message,) = read_messages([row])
    assert message.reasoning == "Hm" and message.content == ""
    assert message.tool_calls[0].arguments == '{"b": 1, "a": "é"}' and message.tool_calls[0].id == "x"


def test_what_an_assistant_refused_with_is_what_it_said() -> None:
    said = {"type": "refusal", "refusal": "No."}
    rows = [{"role": "assistant", "content": [said]}, {"role": "assistant", "content": None, "refusal": "No."}]
    assert [message.content for message in read_messages(rows)] == ["No.", "No."]
    with pytest.raises(InputError, match=r"messages\[0\]\.content\[0\]"):
        read_messages([{"role": "user", "content": [said]}])


def test_typed_ones_stay_and_own_what_they_hold() -> None:
    schema = {"name": "f", "parameters": {"type": "object"}}
    (tool,) = read_tools([{"function": schema}])
    schema["parameters"] = {}
    assert tool == Tool("f", {"name": "f", "parameters": {"type": "object"}})
    assert read_tools([tool]) == (tool,) and read_tools(None) == ()
    assert read_messages([Message("user", "Hi")]) == read_messages([USER])
