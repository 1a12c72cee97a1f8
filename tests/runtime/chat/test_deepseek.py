"""DeepSeek's encoding: the expected texts are written from its published rules, one for each rule."""

from __future__ import annotations

import json
from typing import Any

import pytest

from foldkv.errors import InputError
from foldkv.runtime.chat import Message, ToolCall, chat_format

V4, LATER, V41 = chat_format("v4"), chat_format("v4-0731"), chat_format("v4.1")
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
U, A, S, R = "<｜User｜>", "<｜Assistant｜>", "<｜System｜>", "<｜latest_reminder｜>"
ABSOLUTE = "Reasoning Effort: Absolute maximum with no shortcuts permitted.\nYou MUST be very thorough"
BEYOND = "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\nYou MUST reason with the"

ADD = {"type": "function", "function": {"name": "add", "description": "a+b, ≥ 0", "parameters": {"type": "object"}}}
NOW = {"type": "function", "function": {"parameters": {}, "name": "now", "strict": True}}
SCHEMAS = (
    '{"name": "add", "description": "a+b, ≥ 0", "parameters": {"type": "object"}}\n'
    '{"parameters": {}, "name": "now", "strict": true}'
)


def system(text: str, **keys: Any) -> dict[str, Any]:
    return {"role": "system", "content": text, **keys}


def user(text: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **keys}


def said(text: str | None, reasoning: str | None = None, *calls: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, "reasoning_content": reasoning, "tool_calls": list(calls), **keys}


def call(name: str, arguments: Any, call_id: str = "") -> dict[str, Any]:
    given = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": given}}


def result(text: Any, call_id: str = "") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": text}


def dsml(*calls: str) -> str:
    return "\n\n<｜DSML｜tool_calls>\n" + "\n".join(calls) + "\n</｜DSML｜tool_calls>"


def invoke(name: str, *parameters: str) -> str:
    return f'<｜DSML｜invoke name="{name}">\n' + "\n".join(parameters) + "\n</｜DSML｜invoke>"


def text(key: str, value: str) -> str:
    return f'<｜DSML｜parameter name="{key}" string="true">{value}</｜DSML｜parameter>'


def data(key: str, value: str) -> str:
    return f'<｜DSML｜parameter name="{key}" string="false">{value}</｜DSML｜parameter>'


CALL_2 = call("add", {"a": 2})
THINKING: dict[str, tuple[list[dict[str, Any]], str]] = {
    "one message": ([user("Hi")], f"{U}Hi{A}<think>"),
    "a system message has no token": ([system("Be kind."), user("Hi")], f"Be kind.{U}Hi{A}<think>"),
    "an empty system message": ([system(""), user("Hi")], f"{U}Hi{A}<think>"),
    "a system message without content": ([{"role": "system"}, user("Hi")], f"{U}Hi{A}<think>"),
    "two system messages touch": ([system("a"), system("b"), user("Hi")], f"ab{U}Hi{A}<think>"),
    "an empty message": ([user("")], f"{U}{A}<think>"),
    "white space and unicode stay": ([user("  é 中文\n😀\t ")], f"{U}  é 中文\n😀\t {A}<think>"),
    "parts of text": ([user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])], f"{U}a\n\nb{A}<think>"),
    "messages of a user are one turn": ([user("a"), user("b")], f"{U}a\n\nb{A}<think>"),
    "empty ones among them": ([user(""), user("b"), user("")], f"{U}\n\nb\n\n{A}<think>"),
    "an answer keeps its reasoning": ([user("Hi"), said("Yo", "Hm")], f"{U}Hi{A}<think>Hm</think>Yo{EOS}"),
    "an answer without reasoning": ([user("Hi"), said("Yo")], f"{U}Hi{A}<think></think>Yo{EOS}"),
    "an answer without content": ([user("Hi"), said(None, "Hm")], f"{U}Hi{A}<think>Hm</think>{EOS}"),
    "earlier reasoning is dropped": (
        [user("1"), said("one", "Hm"), user("2"), said("two", "Hmm")],
        f"{U}1{A}</think>one{EOS}{U}2{A}<think>Hmm</think>two{EOS}",
    ),
    "dropped up to the last message of a user": (
        [user("1"), said("one", "Hm"), user("2")],
        f"{U}1{A}</think>one{EOS}{U}2{A}<think>",
    ),
    "an answer that is to go on": ([user("Hi"), said("Yo", "Hm", prefix=True)], f"{U}Hi{A}<think>Hm</think>Yo"),
    "an answer comes first": ([said("Yo", "Hm"), user("Hi")], f"Yo{EOS}{U}Hi{A}<think>"),
    "tokens in a text stay as they are": ([user(f"{A}<think>｜DSML｜{EOS}")], f"{U}{A}<think>｜DSML｜{EOS}{A}<think>"),
    "a reminder before the question": (
        [system("s"), {"role": "latest_reminder", "content": "Monday"}, user("Hi")],
        f"s{R}Monday{U}Hi{A}<think>",
    ),
    "a reminder after the question": (
        [user("Hi"), {"role": "latest_reminder", "content": "Monday"}],
        f"{U}Hi{A}<think>{R}Monday",
    ),
    "developers ask as users do": ([{"role": "developer", "content": "d"}], f"{U}d{A}<think>"),
    "earlier developers go with the reasoning": (
        [user("1"), {"role": "developer", "content": "d"}, said("one", "Hm"), user("2")],
        f"{U}1{A}</think>one{EOS}{U}2{A}<think>",
    ),
    "a response format": (
        [system("s", response_format={"type": "object"}), user("Hi")],
        ("s\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
        f'{{"type": "object"}}{U}Hi{A}<think>'),
    ),
    "a call": (
        [user("Hi"), said("", "Hm", call("add", {"a": 1, "b": "x"}))],
        f"{U}Hi{A}<think>Hm</think>{dsml(invoke('add', data('a', '1'), text('b', 'x')))}{EOS}",
    ),
    "a call after content": (
        [user("Hi"), said("Wait.", "", call("add", {"a": 1}))],
        f"{U}Hi{A}<think></think>Wait.{dsml(invoke('add', data('a', '1')))}{EOS}",
    ),
    "a call without arguments": (
        [user("Hi"), said(None, None, call("now", {}))],
        f"{U}Hi{A}<think></think>{dsml(invoke('now', ''))}{EOS}",
    ),
    "every type of JSON": (
        [
            user("Hi"),
            said(
                "", "", call("f", '{"t":true,"n":null,"x":1.5,"l":[1,"é"],"o":{"k":"v"},"s":"a\\nb","e":"","中":"\\u4e2d"}')
            ),
        ],
        f"{U}Hi{A}<think></think>"
        + dsml(
            invoke(
                "f", data("t", "true"), data("n", "null"), data("x", "1.5"), data("l", '[1, "é"]'),
                data("o", '{"k": "v"}'), text("s", "a\nb"), text("e", ""), text("中", "中"),
            )
        )
        + EOS,
    ),
    "arguments that are not JSON are one parameter": (
        [user("Hi"), said("", "", call("add", "a=1"))],
        f"{U}Hi{A}<think></think>{dsml(invoke('add', text('arguments', 'a=1')))}{EOS}",
    ),
    "two calls, answered in the order of the calls": (
        [user("Hi"), said("", "", call("add", {"a": 1}, "x"), call("now", {}, "y")), result("noon", "y"), result("1", "x")],
        (f"{U}Hi{A}</think>{dsml(invoke('add', data('a', '1')), invoke('now', ''))}{EOS}"
        f"{U}<tool_result>1</tool_result>\n\n<tool_result>noon</tool_result>{A}<think>"),
    ),
    "answers without ids stay in order": (
        [user("Hi"), said("", "", CALL_2, CALL_2), result("b"), result("a")],
        (f"{U}Hi{A}</think>{dsml(*[invoke('add', data('a', '2'))] * 2)}{EOS}"
        f"{U}<tool_result>b</tool_result>\n\n<tool_result>a</tool_result>{A}<think>"),
    ),
    "text beside answers keeps its place": (
        [user("Hi"), said("", "", call("f", {"a": 1}, "x"), call("g", {"a": 1}, "y")), result("2", "y"), user("go"), result("1", "x")],
        (f"{U}Hi{A}</think>{dsml(invoke('f', data('a', '1')), invoke('g', data('a', '1')))}{EOS}"
        f"{U}<tool_result>1</tool_result>\n\ngo\n\n<tool_result>2</tool_result>{A}<think>"),
    ),
    "parts of an answer": (
        [user("Hi"), said("", "", CALL_2), result([{"type": "text", "text": "a"}, {"type": "image_url"}])],
        (f"{U}Hi{A}</think>{dsml(invoke('add', data('a', '2')))}{EOS}"
        f"{U}<tool_result>a\n\n[Unsupported image_url]</tool_result>{A}<think>"),
    ),
    "an empty answer": (
        [user("Hi"), said("", "", CALL_2), result("")],
        f"{U}Hi{A}</think>{dsml(invoke('add', data('a', '2')))}{EOS}{U}<tool_result></tool_result>{A}<think>",
    ),
    "the task action": ([user("Hi", task="action")], f"{U}Hi{A}<think><｜action｜>"),
    "the task query": ([user("Hi", task="query")], f"{U}Hi<｜query｜>"),
    "the answer of a task has no reasoning": (
        [user("Hi", task="domain"), said("law", "Hm")],
        f"{U}Hi<｜domain｜>law{EOS}",
    ),
    "a title after the answer": (
        [user("Hi"), said("Yo", "Hm", task="title"), said("Greeting")],
        f"{U}Hi{A}<think>Hm</think>Yo{EOS}<｜title｜>Greeting{EOS}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", THINKING)
def test_thinking(case: str) -> None:
    messages, expected = THINKING[case]
    assert V4.encode(messages) == BOS + expected
    assert LATER.encode(messages) == BOS + expected  # its default effort adds nothing


CHAT: dict[str, tuple[list[dict[str, Any]], str]] = {
    "one message": ([user("Hi")], f"{U}Hi{A}</think>"),
    "reasoning is never written": (
        [user("1"), said("one", "Hm"), user("2"), said("two", "Hm")],
        f"{U}1{A}</think>one{EOS}{U}2{A}</think>two{EOS}",
    ),
    "developers stay": (
        [{"role": "developer", "content": "d"}, said("one"), user("2")],
        f"{U}d{A}</think>one{EOS}{U}2{A}</think>",
    ),
    "a call": (
        [user("Hi"), said("", "Hm", CALL_2)],
        f"{U}Hi{A}</think>{dsml(invoke('add', data('a', '2')))}{EOS}",
    ),
    "the task action": ([user("Hi", task="action")], f"{U}Hi{A}</think><｜action｜>"),
    "the task authority": ([user("Hi", task="authority")], f"{U}Hi<｜authority｜>"),
    "a task's answer, then another question": (
        [user("Hi", task="action"), said("Answer"), user("Hi")],
        f"{U}Hi{A}</think><｜action｜>Answer{EOS}{U}Hi{A}</think>",
    ),
}


@pytest.mark.parametrize("case", CHAT)
def test_without_thinking(case: str) -> None:
    messages, expected = CHAT[case]
    for one in (V4, LATER):
        assert one.encode(messages, thinking=False) == BOS + expected
        assert one.encode(messages, thinking=False, effort="max") == BOS + expected


def tools_section(open_: str, before: str) -> tuple[str, str]:
    """How the section begins and ends, for the tags of a revision."""
    start = (
        f"{before}\n\n## Tools\n\nYou have access to a set of tools to help answer the user's question. You can invoke "
        f'tools by writing a "<{open_}>" block like the following:\n\n<{open_}>\n'
    )
    end = (
        f"### Available Tool Schemas\n\n{SCHEMAS}\n\nYou MUST strictly follow the above defined tool name and parameter "
        "schemas to invoke tool calls.\n"
    )
    return start, end


def test_tools_follow_the_system_message_and_keep_all_reasoning() -> None:
    messages = [system("s"), user("1"), said("one", "Hm"), user("2")]
    text = V4.encode(messages, tools=[ADD, NOW])
    start, end = tools_section("｜DSML｜tool_calls", "s")
    assert text.startswith(BOS + start) and text.endswith(f"{end}{U}1{A}<think>Hm</think>one{EOS}{U}2{A}<think>")
    assert '<｜DSML｜invoke name="$TOOL_NAME">\n<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">' in text
    assert V4.encode([system("s", tools=[ADD, NOW]), *messages[1:]]) == text
    assert V4.encode(messages, tools=[]) == V4.encode(messages)


def test_tools_without_a_system_message_stand_alone() -> None:
    start, end = tools_section("｜DSML｜tool_calls", "")
    text = V4.encode([user("Hi")], tools=[ADD, NOW], thinking=False)
    assert text.startswith(BOS + start) and text.endswith(f"{end}{U}Hi{A}</think>")


def test_tools_of_a_developer_stand_in_its_turn() -> None:
    start, end = tools_section("｜DSML｜tool_calls", "d")
    text = V4.encode([system("s"), {"role": "developer", "content": "d", "tools": [ADD, NOW]}])
    assert text.startswith(f"{BOS}s{U}{start}") and text.endswith(f"{end}{A}<think>")


@pytest.mark.parametrize(
    ("revision", "effort", "expected"),
    [
        (V4, None, None), (V4, "high", None), (V4, "max", ABSOLUTE),
        (LATER, None, None), (LATER, "low", None), (LATER, "high", ABSOLUTE), (LATER, "max", BEYOND),
    ],
)  # fmt: skip
def test_an_effort_stands_before_everything_else(revision: Any, effort: str | None, expected: str | None) -> None:
    text = revision.encode([system("s"), user("Hi")], effort=effort)
    assert text.endswith(f"s{U}Hi{A}<think>")
    assert text.startswith(BOS + (expected or "s"))
    if expected:
        assert text[: text.index(f"s{U}Hi")].endswith(".\n\n")


@pytest.mark.parametrize(
    ("revision", "effort", "levels"),
    [
        (V4, "low", "'high', 'max'"), (V4, 50, "'high', 'max'"), (LATER, "xhigh", "'low', 'high', 'max'"),
        (V41, 0, "'low', 'high', 'xhigh', 'max', or a number from 1 to 100"), (V41, True, "a number from 1 to 100"),
    ],
)  # fmt: skip
def test_an_unknown_effort_is_refused_with_those_that_there_are(revision: Any, effort: Any, levels: str) -> None:
    with pytest.raises(InputError, match=rf"effort is {effort!r}; expected .*{levels}"):
        revision.encode([user("Hi")], effort=effort, thinking=False)


LEVEL = "Reasoning Effort: {} (range 1-100, the higher the value, the more thorough the reasoning)\n\n"
LATEST: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "the effort has a system token": ([user("Hi")], {}, f"{S}{LEVEL.format(50)}{U}Hi{A}<think>"),
    "by name": ([user("Hi")], {"effort": "xhigh"}, f"{S}{LEVEL.format(75)}{U}Hi{A}<think>"),
    "by number": ([user("Hi")], {"effort": 7}, f"{S}{LEVEL.format(7)}{U}Hi{A}<think>"),
    "before the system message, one token": ([system("s"), user("Hi")], {}, f"{S}{LEVEL.format(50)}s{U}Hi{A}<think>"),
    "no effort without thinking": ([user("Hi")], {"thinking": False}, f"{U}Hi{A}</think>"),
    "a system message": ([system("s"), user("Hi")], {"thinking": False}, f"{S}s{U}Hi{A}</think>"),
    "a later system message asks": ([user("Hi"), system("s")], {"thinking": False}, f"{U}Hi{S}s{A}</think>"),
    "and ends earlier reasoning": (
        [user("1"), said("one", "Hm"), system("s")],
        {},
        f"{S}{LEVEL.format(50)}{U}1{A}</think>one{EOS}{S}s{A}<think>",
    ),
    "tags of calls": (
        [user("Hi"), said("", "", CALL_2)],
        {"thinking": False},
        (f"{U}Hi{A}</think>\n\n<｜DSML｜ calls>\n<｜DSML｜ invoke name=\"add\">\n"
        f'<｜DSML｜ parameter name="a" string="false">2</｜DSML｜ parameter>\n</｜DSML｜ invoke>\n</｜DSML｜ calls>{EOS}'),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LATEST)
def test_v4_1(case: str) -> None:
    messages, options, expected = LATEST[case]
    assert V41.encode(messages, **options) == BOS + expected


def test_tools_of_v4_1_show_its_tags() -> None:
    start, end = tools_section("｜DSML｜ calls", f"{S}s")
    text = V41.encode([system("s"), user("Hi")], tools=[ADD, NOW], thinking=False)
    assert text.startswith(BOS + start) and text.endswith(f"{end}{U}Hi{A}</think>")


def test_nothing_asks_for_an_answer_without_a_generation_prompt() -> None:
    messages = [user("1"), said("one"), user("2")]
    assert V4.encode(messages, add_generation_prompt=False) == f"{BOS}{U}1{A}</think>one{EOS}{U}2"
    assert V4.encode([user("1", task="query")], add_generation_prompt=False) == f"{BOS}{U}1"


def test_reasoning_stays_where_it_is_not_to_be_dropped() -> None:
    messages = [user("1"), said("one", "Hm"), user("2")]
    assert V4.encode(messages, drop_reasoning=False) == f"{BOS}{U}1{A}<think>Hm</think>one{EOS}{U}2{A}<think>"


@pytest.mark.parametrize(
    ("messages", "options", "thinks"),
    [
        ([user("Hi")], {}, True), ([user("Hi")], {"thinking": False}, False), ([user("Hi", task="action")], {}, False),
        ([user("Hi"), said("Yo", prefix=True)], {}, False), ([user("<think>")], {"add_generation_prompt": False}, False),
    ],
)  # fmt: skip
def test_a_prompt_says_whether_reasoning_comes_next(
    messages: list[dict[str, Any]], options: dict[str, Any], thinks: bool
) -> None:
    assert V4.prompt(messages, **options).thinks == thinks


def test_typed_messages_and_dictionaries_are_the_same() -> None:
    typed = [
        Message("user", "Hi"), Message("assistant", "", "Hm", (ToolCall("add", '{"a": 2}', "x"),)),
        Message("tool", "2", tool_call_id="x"),
    ]  # fmt: skip
    given = [user("Hi"), said("", "Hm", call("add", {"a": 2}, "x")), result("2", "x")]
    assert V4.encode(typed) == V4.encode(given)


@pytest.mark.parametrize(
    ("revision", "messages", "says"),
    [
        (V4, [user("Hi"), said("", "", call("f", "[1]"))], r"messages\[1\].tool_calls\[0\].function.arguments is '\[1\]'"),
        (V41, [user("Hi"), said("", "", call("f", "a=1"))], r"messages\[1\].tool_calls\[0\].function.arguments is 'a=1'"),
        (V41, [user("Hi"), said("", "", CALL_2, call("f", "[" * 99_999))], r"tool_calls\[1\].function.arguments"),
        (V4, [user("a"), user("b", task="query")], r"messages\[1\].task is 'query'; expected no task after another"),
        (V4, [result("1"), user("b", task="action")], r"messages\[1\].task"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_refused(revision: Any, messages: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(InputError, match=says):
        revision.encode(messages)


def test_tools_are_given_once() -> None:
    with pytest.raises(InputError, match=r"tools are given, and messages\[0\].tools too"):
        V4.encode([system("s", tools=[ADD]), user("Hi")], tools=[NOW])
