"""Answers that keep to what the request says, whichever model answers: JSON, patterns, choices, grammars and calls."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from typing import Any

import openai
import pytest
from served import Running

from foldkv.runtime.server import structure
from foldkv.runtime.server.bodies import ChatBody, CompletionBody, read_body
from foldkv.runtime.server.problems import Problem
from foldkv.runtime.server.structure import chat_constraint, completion_constraint
from foldkv.runtime.serving import grammar_check
from foldkv.runtime.serving.constraint import Constraint

#: The model writes source code, with much white space.
NO_SPACE = {"logit_bias": {"32": -100, "10": -100, "9": -100, "13": -100}}
TALK: Any = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Hi"}],
    "max_tokens": 200,
    "temperature": 1,
    "seed": 3,
    **NO_SPACE,
}
QUIET = {"chat_template_kwargs": {"thinking": False}}
SCHEMA = {
    "type": "object", "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", "yy"]}}, "required": ["a", "b"],
    "additionalProperties": False,
}  # fmt: skip
ONE = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
ADD: Any = {"type": "function", "function": {"name": "add", "strict": True, "parameters": ONE}}
SUB: Any = {
    "type": "function",
    "function": {"name": "sub", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
}


def test_a_schema_holds_for_the_content_and_leaves_the_reasoning_free(running: Running) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    message = (
        running.client().chat.completions.create(**TALK, response_format=form, extra_body=QUIET).choices[0].message
    )
    value = json.loads(message.content or "")
    assert set(value) == {"a", "b"} and isinstance(value["a"], bool) and value["b"] in ("x", "yy")
    free: Any = running.client().chat.completions.create(**{**TALK, "max_tokens": 20}, response_format=form).choices[0]
    assert free.message.reasoning_content and not free.message.content and free.finish_reason == "length"
    whole = running.client().chat.completions.create(**TALK, response_format={"type": "json_object"}, extra_body=QUIET)
    assert (whole.choices[0].message.content or "").startswith("{")


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"guided_regex": "[ab]{3}-[0-9]{2}"}, "[ab]{3}-[0-9]{2}"),
        ({"structured_outputs": {"regex": "x+y"}}, "x+y"),
        ({"structured_outputs": {"choice": ["red", "green"]}}, "red|green"),
        ({"structured_outputs": {"json": {"enum": [1, "two"]}}}, '1|"two"'),
        ({"structured_outputs": {"grammar": 'start: "<" WORD ">"\nWORD: /[a-c]{2}/'}}, "<[a-c]{2}>"),
    ],
)
def test_texts_keep_to_patterns_choices_and_grammars(running: Running, asked: Any, pattern: str) -> None:
    client = running.client()
    text: Any = {
        "model": "tiny",
        "prompt": "The answer: ",
        "max_tokens": 60,
        "temperature": 1.2,
        "n": 2,
        "extra_body": asked,
    }
    for choice in client.completions.create(**text).choices:
        assert re.fullmatch(pattern, choice.text) and choice.finish_reason == "stop"
    talk = client.chat.completions.create(**TALK, extra_body={**asked, **QUIET})
    assert re.fullmatch(pattern, talk.choices[0].message.content or "")


def test_a_tool_that_must_be_called_is_called_with_arguments_of_its_schema(running: Running) -> None:
    client = running.client()
    asked: Any = {**TALK, "max_tokens": 600, "tools": [ADD, SUB], "parallel_tool_calls": False, "extra_body": QUIET}
    named: Any = {"type": "function", "function": {"name": "add"}}
    found = client.chat.completions.create(**asked, tool_choice=named).choices[0]
    assert found.finish_reason == "tool_calls" and found.message.tool_calls and not found.message.content
    (call,) = found.message.tool_calls
    assert call.type == "function" and call.function.name == "add"
    value = json.loads(call.function.arguments)
    assert set(value) == {"a"} and isinstance(value["a"], bool)
    chunks = list(client.chat.completions.create(**asked, tool_choice="required", stream=True))
    parts: Any = [one for chunk in chunks for one in chunk.choices[0].delta.tool_calls or []]
    assert {part.index for part in parts} == {0} and parts[0].function.name in ("add", "sub")
    json.loads("".join(part.function.arguments for part in parts))
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_tools_are_a_grammar_also_where_the_model_may_call_as_it_likes(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """Parameters that no grammar can hold are left to the model, and nothing else."""
    odd: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "not": {}}}}
    for tools, left in (([SUB], False), ([ADD, SUB], False), ([odd], True), ([SUB, odd], True)):
        caplog.clear()
        body = read_body(ChatBody, json.dumps({"model": "tiny", "messages": TALK["messages"], "tools": tools}).encode())
        made = chat_constraint(body, running.service, thinks=False)
        assert made is not None
        for text, right in (
            ("free text", True), (_calls("other"), False), (_calls(tools[-1]["function"]["name"]), True),
            (_calls("sub", '<｜DSML｜parameter name="a" string="true">x'), False),
        ):  # fmt: skip
            assert (_taken(made(), text) == text) == right
        assert ("parameters of the tool 'f' are left to the model" in caplog.text) == left


def _calls(name: str, inside: str = "") -> str:
    return f'\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="{name}">\n{inside}'


def _taken(constraint: Constraint, text: str) -> str:
    """As much of a text as may be written, byte by byte."""
    for n, token in enumerate(text.encode()):
        if not constraint.allowed()[token]:
            return text.encode()[:n].decode(errors="ignore")
        constraint.took(token)
    return text


def test_without_llguidance_calls_are_left_to_the_model_and_the_log_says_so(
    running: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structure, "installed", lambda module: False)
    body = read_body(ChatBody, json.dumps({"model": "tiny", "messages": TALK["messages"], "tools": [SUB]}).encode())
    assert chat_constraint(body, running.service, thinks=False) is None
    assert "calls of tools are not held to the tools, because llguidance is not installed" in caplog.text


def test_tools_that_are_too_complex_together_keep_their_names(
    running: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = {"properties": {f"p{n}": {"type": "integer", "multipleOf": 100_003 + 2 * n} for n in range(40)}}
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": many}}
    asked = {"model": "tiny", "messages": TALK["messages"], "tools": [tool]}
    monkeypatch.setattr(grammar_check, "SECONDS", 0.5)
    made = chat_constraint(read_body(ChatBody, json.dumps(asked).encode()), running.service, thinks=False)
    assert made is not None and "parameters of all tools" in caplog.text and "too complex" in caplog.text
    assert _taken(made(), _calls("f")) == _calls("f") and _taken(made(), _calls("g")) != _calls("g")
    required = read_body(ChatBody, json.dumps({**asked, "tool_choice": "required"}).encode())
    with pytest.raises(Problem, match="too complex") as refused:
        chat_constraint(required, running.service, thinks=False)
    assert refused.value.status == 400 and refused.value.param == "tools"


def test_an_answer_is_json_of_a_schema_or_calls_tools(running: Running) -> None:
    """What ``client.chat.completions.parse`` asks for where it has tools."""
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    client, found = running.client(), set()
    for seed in (0, 3):
        asked: Any = {
            **TALK,
            "seed": seed,
            "max_tokens": 600,
            "response_format": form,
            "tools": [ADD],
            "extra_body": QUIET,
        }
        if seed == 3:
            asked["logit_bias"] = {**NO_SPACE["logit_bias"], "10": 5, "123": -100}
        choice = client.chat.completions.create(**asked).choices[0]
        found.add(choice.finish_reason)
        if choice.message.tool_calls:
            assert choice.message.tool_calls[0].type == "function" and not choice.message.content
            assert set(json.loads(choice.message.tool_calls[0].function.arguments)) == {"a"}
        else:
            assert set(json.loads(choice.message.content or "")) == {"a", "b"}
    assert found == {"stop", "tool_calls"}


def test_a_hostile_schema_holds_up_nobody(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_check, "SECONDS", 0.5)
    client, refused, slow = running.client(), list[openai.BadRequestError](), list[float]()

    def ask(first: int) -> None:
        schema = {"allOf": [{"type": "string", "pattern": f"a.{{{n}}}b"} for n in range(first, first + 35)]}
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(
                model="tiny", prompt="x", max_tokens=4, extra_body={"structured_outputs": {"json": schema}}
            )
        refused.append(caught.value)

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(5, 8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        waiting = len(refused)
        assert client.completions.create(model="tiny", prompt="x", max_tokens=1).choices
        slow.append(waiting)
    assert slow.count(0) > 1, "others were answered before the first of them was"
    assert len(refused) == len(threads)
    for error in refused:
        assert error.param == "structured_outputs" and "too complex" in str(error) and "Use fewer" in str(error)


def test_grammars_that_clients_write_can_be_turned_off(running: Running) -> None:
    body = {"prompt": "x", "structured_outputs": {"grammar": 'start: "a"'}}
    service = dataclasses.replace(running.service, free_grammars=False)
    read = read_body(CompletionBody, json.dumps(body).encode())
    assert completion_constraint(read, running.service) is not None
    with pytest.raises(Problem, match="turned off") as refused:
        completion_constraint(read, service)
    assert refused.value.status == 400 and refused.value.param == "structured_outputs.grammar"
    for other in ({"regex": "a"}, {"choice": ["a"]}, {"json": {"const": 1}}):
        again = read_body(CompletionBody, json.dumps({**body, "structured_outputs": other}).encode())
        assert completion_constraint(again, service) is not None


def test_a_grammar_that_gives_up_is_no_matter_of_the_context(running: Running) -> None:
    asked: Any = {"model": "tiny", "prompt": "x", "max_tokens": 150, "temperature": 0}
    with pytest.raises(openai.BadRequestError, match="within its grammar") as refused:
        running.client().completions.create(
            **asked,
            extra_body={"structured_outputs": {"grammar": 'start: s\ns: s s | "a" | s s s'}},
            logit_bias={"97": 100},
        )
    assert refused.value.code == "grammar_failed"
    assert running.client().completions.create(**{**asked, "max_tokens": 2}).choices[0].text


def test_a_tool_that_must_not_be_called_is_not(running: Running) -> None:
    asked: Any = {**TALK, "tools": [ADD], "max_tokens": 30, "extra_body": QUIET}
    found = running.client().chat.completions.create(**asked, tool_choice="none")
    plain = running.client().chat.completions.create(**{**asked, "tools": openai.omit})
    assert not found.choices[0].message.tool_calls
    assert found.usage is not None and plain.usage is not None
    assert found.usage.prompt_tokens == plain.usage.prompt_tokens, (
        "the model is not told of tools that it must not call"
    )


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "thing"}}}}, "response_format", "thing"),
        ({"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs", "pattern"),
        ({"structured_outputs": {"regex": "["}}, "structured_outputs", "pattern"),
        ({"guided_regex": ""}, "guided_regex", "regular expression"),
        ({"structured_outputs": {"grammar": "start: nothing"}, **QUIET}, "structured_outputs", "grammar"),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "structured_outputs", "thinking off"),
        ({"structured_outputs": {"choice": ["a"]}, "tools": [ADD]}, "structured_outputs", "tools"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "thing"}}}, "tools": [SUB]}, "response_format", "thing"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "object", "not": {}}}}]}, "tools", "f"),
    ],
)  # fmt: skip
def test_a_grammar_that_nothing_can_be_held_to_is_refused(running: Running, fields: Any, param: str, says: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        running.client().chat.completions.create(model="tiny", messages=TALK["messages"], extra_body=fields)
    assert refused.value.param == param and says in str(refused.value)
