"""Calls of tools as a grammar: what it accepts, the parser reads as calls that are valid; what the encoding writes, it accepts."""

from __future__ import annotations

import itertools
import json
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from grammar_walks import Spelling, follow, small_bpe, walk
from hypothesis import given, settings
from hypothesis import strategies as st

from foldkv.errors import InputError
from foldkv.export.contract.chat import JINJA, ChatFile
from foldkv.runtime.chat import CallEnd, ChatFormat, chat_format, joined
from foldkv.runtime.serving import grammar_check
from foldkv.runtime.serving import tool_grammar as tool_grammar_module
from foldkv.runtime.serving.constraint import NewConstraint
from foldkv.runtime.serving.grammar_check import checker
from foldkv.runtime.serving.structured import Grammars
from foldkv.runtime.serving.tool_grammar import tool_grammar
from foldkv.runtime.tokenizer import Tokenizer

ROOT = Path(__file__).parents[3]
D = "｜DSML｜"
EOS = "<｜end▁of▁sentence｜>"


def _tool(name: str, parameters: Any = None) -> dict[str, Any]:
    function = {"name": name} if parameters is None else {"name": name, "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [
    _tool(
        "weather",
        {
            "type": "object",
            "properties": {
                "city": {"type": "string", "minLength": 1, "maxLength": 30},
                "days": {"type": "integer", "minimum": 1, "maximum": 14},
                "unit": {"enum": ["C", "F", None]},
                "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 2},
                "code": {"anyOf": [{"type": "string", "pattern": "^[a-z]{2}(x|y)$"}, {"type": "boolean"}]},
                "near": {
                    "type": "object",
                    "properties": {"km": {"type": "number", "format": "float"}},
                    "additionalProperties": False,
                },
            },
            "required": ["city", "days"],
            "$defs": {"tag": {"type": "string", "maxLength": 6}},
        },
    ),
    _tool("now"),
    _tool("note", {"type": "object", "properties": {"text": {"type": "string"}, "to": {"type": ["string", "null"]}}}),
]
SCHEMAS = {one["function"]["name"]: one["function"].get("parameters", {"type": "object"}) for one in TOOLS}
#: llguidance takes the one sign between ASCII and the others only as an escape.
_STRINGS = st.characters(codec="utf-8", exclude_characters="\x7f")
CALLS = {
    "weather": st.fixed_dictionaries(
        {"city": st.text(min_size=1, max_size=30), "days": st.integers(1, 14)},
        optional={
            "unit": st.sampled_from(["C", "F", None]),
            "tags": st.lists(st.text(_STRINGS, max_size=6), max_size=2),
            "code": st.sampled_from(["abx", "zzy", True]),
            "near": st.fixed_dictionaries({}, optional={"km": st.integers(-9, 9) | st.just(0.25)}),
        },
    ),
    "now": st.just({}),
    "note": st.fixed_dictionaries({}, optional={"text": st.text(max_size=40), "to": st.none() | st.just("<a></a>")}),
}
#: What leads out of free texts and values.
WISHES = [f"</{D}parameter>", f"</{D} parameter>", f"<{D}tool_calls>", f"<{D} calls>", "</think>", '"', "}", "]", "<"]


class Model:
    """A tokenizer and the grammars of a model with it."""

    def __init__(self, tokenizer: Tokenizer, eos: int) -> None:
        self.tokenizer, self.eos, self.spelling = tokenizer, eos, Spelling(tokenizer)
        self.grammars = Grammars(tokenizer, tokenizer.vocab_size, [eos])

    def answers(self, tools: Any = TOOLS, choice: Any = "auto", *, name: str = "v4", **options: Any) -> NewConstraint:
        """The constraint of answers."""
        grammar = tool_grammar(chat_format(name), tools, choice, tokenizer=self.tokenizer, **options)
        assert grammar is not None
        return self.grammars.lark(grammar)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Model]:
    """Models whose marks are many bytes, or tokens that are special, or that are not called so."""
    folder, found = tmp_path_factory.mktemp("models"), {}
    found["bytes"] = Model(Tokenizer(ROOT / "examples" / "tiny-v4" / "tokenizer.json"), 257)
    for name, special, added in (
        ("special", [EOS, D, "<think>", "</think>"], []), ("added", [EOS], [D, "<think>", "</think>"]),
    ):  # fmt: skip
        tokenizer = small_bpe(folder / f"{name}.json", special, added)
        found[name] = Model(tokenizer, tokenizer.encode(EOS)[0])
    return found


@pytest.fixture(params=["bytes", "special", "added"])
def model(models: Mapping[str, Model], request: pytest.FixtureRequest) -> Model:
    return models[request.param]


def _read(text: str, name: str, *, thinking: bool) -> tuple[Any, list[bool]]:
    """The message of an answer, and whether each of its calls is complete."""
    parser = chat_format(name).parser(thinking=thinking)
    events = [
        *itertools.chain.from_iterable(parser.feed(text[at : at + 7]) for at in range(0, len(text), 7)),
        *parser.finish(),
    ]
    return joined(events), [event.complete for event in events if isinstance(event, CallEnd)]


def _call(name: str, *parameters: tuple[str, str, str]) -> str:
    rows = [f'<{D}parameter name="{key}" string="{text}">{value}</{D}parameter>\n' for key, text, value in parameters]
    return f'<{D}invoke name="{name}">\n{"".join(rows) or chr(10)}</{D}invoke>\n'


def _block(*calls: str) -> str:
    return f"\n\n<{D}tool_calls>\n{''.join(calls)}</{D}tool_calls>"


@pytest.mark.parametrize(
    ("choice", "name", "thinking"),
    [
        ("auto", "v4", True),
        ("auto", "v4.1", False),
        ("required", "v4-0731", True),
        ("required", "v4.1", False),
        ({"type": "function", "function": {"name": "weather"}}, "v4", False),
    ],
)
def test_what_is_accepted_is_read_as_calls_that_are_valid(model: Model, choice: Any, name: str, thinking: bool) -> None:
    new, called, ended = model.answers(choice=choice, name=name, thinking=thinking), 0, 0
    for seed in range(8):
        tokens = walk(new(), model.spelling, model.eos, seed, steps=900, wishes=WISHES)
        if tokens is None:
            continue
        ended += 1
        text = model.spelling.text(token for token in tokens if token != model.eos).decode()
        message, complete = _read(text, name, thinking=thinking)
        assert all(complete) and len(complete) == len(message.tool_calls)
        assert bool(message.tool_calls) or choice == "auto"
        if message.tool_calls:
            # Nothing follows the calls.
            assert model.eos not in tokens and text.endswith("calls>")
        for call in message.tool_calls:
            called += 1
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
        if isinstance(choice, dict):
            assert [call.name for call in message.tool_calls] == ["weather"]
    assert ended >= 4 and (called >= 3 or choice == "auto")


@settings(max_examples=10, deadline=None)
@given(
    data=st.data(),
    names=st.lists(st.sampled_from(sorted(CALLS)), min_size=1, max_size=3),
    name=st.sampled_from(["v4", "v4-0731", "v4.1"]),
    texts=st.tuples(st.text(max_size=20), st.text(max_size=20)),
    thinking=st.booleans(),
)
def test_what_the_encoding_writes_is_accepted(
    models: Mapping[str, Model],
    data: st.DataObject,
    names: list[str],
    name: str,
    texts: tuple[str, str],
    thinking: bool,
) -> None:
    """Calls with their parameters in any order, as the model was trained to write them."""
    calls = []
    for one in names:
        arguments = data.draw(CALLS[one])
        order = data.draw(st.permutations(sorted(arguments)))
        calls.append({"function": {"name": one, "arguments": {key: arguments[key] for key in order}}})
    asked = [{"role": "user", "content": "?"}]
    answer = {"role": "assistant", "reasoning": texts[0], "content": texts[1], "tool_calls": calls}
    chat = chat_format(name)
    options: dict[str, Any] = {"tools": TOOLS, "thinking": thinking}
    text = chat.encode([*asked, answer], **options)[len(chat.encode(asked, **options)) :].removesuffix(EOS)
    for model in models.values():
        constraint = model.answers(name=name, thinking=thinking)()
        assert follow(constraint, model.spelling, text) == "" and constraint.ended
        if not texts[1]:
            must = model.answers(choice="required", name=name, thinking=thinking)()
            assert follow(must, model.spelling, text) == "" and must.ended


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (_block(_call("snow")), "snow"),
        (_block(_call("weather", ("town", "true", "Rome"))), "own"),
        (_block(_call("weather", ("city", "true", "Rome"))), "/"),
        (_block(_call("weather", ("city", "true", "Rome"), ("city", "true", "Rome"))), "ity"),
        (_block(_call("weather", ("city", "false", '"Rome"'))), "false"),
        (_block(_call("weather", ("days", "false", "15"))), "5<"),
        (_block(_call("weather", ("days", "false", '"3"'))), '"3"'),
        (_block(_call("weather", ("unit", "true", "K"))), "K"),
        (_block(_call("weather", ("code", "true", "abz"))), "z<"),
        (_block(_call("weather", ("code", "false", '"abx"'))), '"abx"'),
        (_block(_call("weather", ("tags", "false", '["1234567"]'))), '7"]'),
        (_block(_call("weather", ("near", "false", '{"m": 1}'))), "m"),
        (_block(), "/"),
        (_block(_call("now")) + "\n", "\n"),
        (_block(_call("now")) + "more", "more"),
        ("text " + _block(_call("now")) + _block(_call("now")), "\n\n<"),
    ],
)  # fmt: skip
def test_what_is_no_call_of_a_tool_cannot_be_written(model: Model, text: str, left: str) -> None:
    constraint = model.answers()()
    found = follow(constraint, model.spelling, text)
    assert found.startswith(left) and found != text
    assert constraint.ended or not constraint.allowed()[model.eos]


def test_an_answer_without_calls_is_any_text(model: Model) -> None:
    for thinking, text in ((False, "It rains </p> in 日本 <｜DSM"), (True, "hm < </think>It rains")):
        for choice in ("auto", "none"):
            constraint = model.answers(choice=choice, thinking=thinking)()
            assert not (thinking and constraint.allowed()[model.eos])
            assert follow(constraint, model.spelling, text) == ""
            assert constraint.allowed()[model.eos] and not constraint.ended
            constraint.took(model.eos)
            assert constraint.ended


def test_with_none_no_call_begins(model: Model) -> None:
    for text in ("", "text ", "\n\n"):
        constraint = model.answers(choice="none")()
        assert follow(constraint, model.spelling, f"{text}<{D}tool_calls>\n") != ""


def test_required_is_a_call_at_once(model: Model) -> None:
    constraint = model.answers(choice="required")()
    assert not constraint.allowed()[model.eos] and follow(constraint, model.spelling, "Sure") == "Sure"
    assert follow(constraint, model.spelling, _block(_call("now"), _call("note"))) == "" and constraint.ended


def test_one_call_where_several_are_not_wanted(model: Model) -> None:
    named = {"type": "function", "function": {"name": "now"}}
    for new in (model.answers(parallel=False), model.answers(choice=named)):
        constraint = new()
        assert follow(constraint, model.spelling, _block(_call("now"))) == "" and constraint.ended
        assert follow(new(), model.spelling, _block(_call("now"), _call("now"))) != ""
    assert follow(model.answers(choice=named)(), model.spelling, _block(_call("note"))).startswith("te")


def test_a_mark_that_is_spelled_out_is_the_mark(models: Mapping[str, Model]) -> None:
    """The parser reads text, so a model that has a token for a mark may not get around the grammar by its letters."""
    model = models["special"]
    for text in (f"<{D}tool_calls>", f"It rains.{EOS}"):
        constraint = model.answers()()
        *start, last = [model.spelling.bytes.index(bytes([byte])) for byte in text.encode()]
        for token in start:
            constraint.took(token)
        assert not constraint.allowed()[last] and constraint.allowed()[model.eos]


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"anyOf": [{"required": ["a"]}]}, "parameters of the tool f: anyOf is .*; expected a schema with properties alone"),
        ({"type": "array"}, r"parameters of the tool f: type is 'array'; expected 'object'"),
        ({"properties": ["a"]}, "f: properties is .*; expected a table of schemas"),
        ({"properties": {"a": 3}}, "f: a is 3; expected a JSON schema"),
        ({"properties": {'a"b': {}}}, "f: a name is .*; expected at most 256 letters without"),
        ({"properties": {"a": {"$ref": "#/$defs/b"}}}, r"f: a: \$ref is '#/\$defs/b'; expected a reference to a place that"),
        ({"properties": {"a": {"$ref": "#/properties/a"}}}, "f: a is .*; expected a schema that does not refer to itself"),
        ({"properties": {"a": {"$ref": "https://x"}}}, "f: a: .ref is 'https://x'; expected a reference within the schema"),
        ({"properties": {"a": {"type": "array", "not": {}}}}, 'f: a has a schema that calls cannot be held to: .*"not"'),
        ({"properties": {"a": {"type": "strin"}}}, "f: a has a schema that calls cannot be held to: Invalid type: strin"),
        ({"properties": {"a": {"type": "string", "pattern": "^(?=a)$"}}}, "f: a has a schema .*look-around"),
        ({"properties": {"a": False}, "required": ["a"]}, "f: a is False; expected a schema that some value has"),
        ({"properties": {str(i): {} for i in range(65)}}, "f: their number is 65; expected at most 64"),
        ({"properties": {"a": {}}, "minProperties": 1}, "f: minProperties and maxProperties is .*; expected neither"),
    ],
)  # fmt: skip
def test_schemas_that_calls_cannot_be_held_to_are_refused(
    models: Mapping[str, Model], schema: Any, problem: str
) -> None:
    with pytest.raises(InputError, match=problem) as caught:
        models["bytes"].answers([_tool("f", schema)])
    assert "\n" not in str(caught.value)


def test_values_of_schemas_in_their_many_forms(models: Mapping[str, Model]) -> None:
    """Texts as they are; what is no text, and texts of schemas that are not followed, as JSON."""
    model, root = models["special"], {"type": "string", "maxLength": 2}
    for schema, rows in {
        "true": [("true", "any </b>", True), ("false", "[1]", True), ("false", '"a"', False)],
        '{"$ref": "#/$defs/a"}': [("true", "ab", True), ("true", "abc", False), ("false", '"ab"', False)],
        '{"const": "a<"}': [("true", "a<", True), ("true", "a", False)],
        '{"enum": ["a", "ab", ""]}': [("true", "a", True), ("true", "ab", True), ("true", "", True), ("true", "b", False)],
        '{"type": "string", "pattern": "a"}': [("false", '"bab"', True), ("false", '"b"', False), ("true", "a", False)],
        '{"type": "string", "pattern": "^a|b$"}': [("false", '"ac"', True), ("true", "a", False)],
        '{"type": "string", "format": "color"}': [("true", "red", True)],
        '{"oneOf": [{"type": "string"}, {"type": "null"}]}': [("true", "x", True), ("false", "null", True), ("false", "1", False)],
        '{"allOf": [{"type": "string"}, {"maxLength": 1}]}': [("false", '"a"', True), ("false", '"ab"', False)],
        '{"type": "object", "properties": {"$ref": {"type": "null"}}}': [("false", '{"$ref": null}', True)],
        '{"type": "array", "items": {"$ref": "#/properties/a"}}': [("false", "[[], [[]]]", True), ("false", "[1]", False)],
    }.items():  # fmt: skip
        parameters = {"properties": {"a": json.loads(schema)}, "required": ["a"], "$defs": {"a": root}}
        new = model.answers([_tool("f", parameters)])
        for text, value, right in rows:
            left = follow(new(), model.spelling, _block(_call("f", ("a", text, value))))
            assert (left == "") == right, (schema, text, value, left)


def test_schemas_that_refer_to_each_other_again_and_again_take_no_time(models: Mapping[str, Model]) -> None:
    """What each of them can be is looked at once; it was at most 4 ** 9 times."""
    model, began = models["bytes"], time.process_time()
    around = {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 4}}
    down = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 4} for i in range(8)} | {"d8": {"type": "null"}}
    many = {"a": {"anyOf": [{"anyOf": [{"const": f"{i} {j}"} for j in range(40)]} for i in range(40)]}}
    for first, definitions in (("a", around), ("d0", down), ("a", many)):
        schema = {"properties": {"x": {"$ref": f"#/$defs/{first}"}}, "$defs": definitions}
        new = model.answers([_tool("f", schema)])
        if definitions is around:  # it has no values
            continue
        right = "null" if definitions is down else '"7 9"'
        assert follow(new(), model.spelling, _block(_call("f", ("x", "false", right)))) == ""
        assert follow(new(), model.spelling, _block(_call("f", ("x", "false", "true")))) != ""
    assert time.process_time() - began < 3


def test_schemas_that_grow_when_they_are_written_are_refused_early(models: Mapping[str, Model]) -> None:
    """Each parameter that refers to another comes with all of them."""
    big, began = {"enum": [f"{i:06}" for i in range(15_000)]}, time.process_time()
    properties = {f"p{i}": {"type": "array", "items": {"$ref": "#/$defs/big"}} for i in range(64)}
    with pytest.raises(InputError, match=r"the schemas of the tools are too large: \d+ characters and more"):
        models["bytes"].answers([_tool("f", {"properties": properties, "$defs": {"big": big}})])
    long = {"properties": {"a": {"type": "string", "pattern": "^" + "[" * 200_000 + "$"}}}
    with pytest.raises(InputError, match="f: a has a schema that calls cannot be held to"):
        models["bytes"].answers([_tool("f", long)])
    assert time.process_time() - began < 5


def test_what_is_known_of_schemas_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool_grammar_module, "_KEPT", 2)
    monkeypatch.setattr(tool_grammar_module, "_problems", OrderedDict())
    asked: list[str] = []
    with checker.session() as session:
        real = session.schema
        monkeypatch.setattr(session, "schema", lambda schema: asked.append(schema) or real(schema))
        for name in ("strin", "strin", "nul", "strin", "boo", "nul"):
            assert f"Invalid type: {name}" in tool_grammar_module._problem(f'{{"type": "{name}"}}', session)
        assert "at most" in tool_grammar_module._problem(" " * 600_000, session)
    assert [json.loads(one)["type"] for one in asked] == ["strin", "nul", "boo", "nul"]
    assert len(tool_grammar_module._problems) == 2 and all(len(key) == 32 for key in tool_grammar_module._problems)


def test_a_tool_that_no_grammar_can_hold_keeps_its_name_and_the_others_their_parameters(model: Model) -> None:
    odd, left = _tool("odd", {"type": "object", "not": {}}), []
    new = model.answers([*TOOLS, odd], left_free=lambda name, error: left.append((name, str(error))))
    ((name, why),) = left
    assert name == "odd" and "not is {}; expected a schema with properties alone" in why
    for call in (
        _call("odd"), _call("odd", ("a b", "true", "any < </b>\n")), _call("odd", ("a", "false", '{"x": [1]}'), ("b", "true", "")),
    ):  # fmt: skip
        constraint = new()
        assert follow(constraint, model.spelling, _block(call, _call("now"))) == "" and constraint.ended
    for call in (
        _call("even"), _call("odd", ("a", "false", "{")), _call("odd", ("", "true", "")), _call("now", ("a", "true", "x")),
        _call("weather", ("city", "true", "Rome"), ("days", "false", "99")),
    ):  # fmt: skip
        assert follow(new(), model.spelling, _block(call)) != ""
    text = _block(_call("odd", ("a", "false", "[1]"), ("b", "true", "t")))
    message, complete = _read(text, "v4", thinking=False)
    assert complete == [True] and json.loads(message.tool_calls[0].arguments) == {"a": [1], "b": "t"}
    with pytest.raises(InputError, match="tool odd: not is"):
        model.answers([*TOOLS, odd])
    odd["function"]["strict"] = True
    with pytest.raises(InputError, match="tool odd: not is"):
        model.answers([*TOOLS, odd], left_free=lambda name, error: None)
    loose = model.answers(held=False)
    assert follow(loose(), model.spelling, _block(_call("weather", ("days", "false", "99")))) == ""
    assert follow(loose(), model.spelling, _block(_call("other"))) != ""


def test_schemas_that_take_long_to_check_are_refused(
    models: Mapping[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_check, "SECONDS", 0.2)
    slow = {"allOf": [{"type": "string", "pattern": f"a.{{{n}}}b"} for n in range(5, 40)]}
    tool = _tool("f", {"properties": {f"p{n}": {**slow, "title": str(n)} for n in range(30)}})
    began, left = time.monotonic(), []
    new = models["bytes"].answers([tool, *TOOLS], left_free=lambda name, error: left.append(name))
    assert left == ["f", "weather", "note"] or left == ["f"], "what comes after it in the request shares its time"
    assert follow(new(), models["bytes"].spelling, _block(_call("f", ("x", "true", "y")))) == ""
    with pytest.raises(InputError, match="f: p0 has a schema that calls cannot be held to: it is too complex"):
        models["bytes"].answers([tool])
    assert time.monotonic() - began < 30


def test_an_answer_is_json_or_calls(model: Model) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    for thinking, before in ((False, ""), (True, "hm</think>")):
        new = model.answers(content=schema, thinking=thinking)
        for text in ('{"a": true}', _block(_call("now"))):
            constraint = new()
            assert follow(constraint, model.spelling, before + text) == "" and constraint.ended
        for text in ("Sure", '{"a": 1}', '{"a": true}' + _block(_call("now")), _block(_call("other"))):
            assert follow(new(), model.spelling, before + text) != ""
    must = model.answers(content=schema, choice="required")()
    assert follow(must, model.spelling, "{") == "{"


def test_names_that_are_required_and_not_described_have_any_value(models: Mapping[str, Model]) -> None:
    model = models["bytes"]
    new = model.answers([_tool("f", {"required": ["a"]})])
    assert follow(new(), model.spelling, _block(_call("f"))) != ""
    assert follow(new(), model.spelling, _block(_call("f", ("a", "true", "x")))) == ""


def test_templates_have_no_known_calls(models: Mapping[str, Model]) -> None:
    chat, tokenizer = ChatFormat(ChatFile(JINJA, template="{{ messages }}")), models["bytes"].tokenizer
    assert tool_grammar(chat, TOOLS, "auto", tokenizer=tokenizer) is None
    assert tool_grammar(chat, TOOLS, "none", tokenizer=tokenizer) is None
    for choice in ("required", {"type": "function", "function": {"name": "now"}}):
        with pytest.raises(InputError, match="this model cannot be held to: it has a chat template"):
            tool_grammar(chat, TOOLS, choice, tokenizer=tokenizer)


def test_choices_that_are_none_are_refused(models: Mapping[str, Model]) -> None:
    model = models["bytes"]
    assert tool_grammar(chat_format("v4"), None, tokenizer=model.tokenizer) is None
    for tools, choice, problem in (
        (TOOLS, "any", "tool_choice is 'any'; expected 'auto', 'required', 'none' or"),
        (TOOLS, {"type": "function"}, "tool_choice is .*; expected 'auto'"),
        (
            TOOLS,
            {"type": "function", "function": {"name": "x"}},
            "tool_choice.function.name is 'x'; .*weather, now, note",
        ),
        ([], "required", "tool_choice is 'required'; expected 'auto' or 'none' where no tools are given"),
        ([{"type": "web"}], "auto", r"tools\[0\].type is 'web'"),
    ):
        with pytest.raises(InputError, match=problem):
            tool_grammar(chat_format("v4"), tools, choice, tokenizer=model.tokenizer)
