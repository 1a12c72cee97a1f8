"""Calls of tools as a grammar: an answer can name only tools and parameters that there are, with values of their schemas.

The markup is that of DeepSeek's encoding, byte for byte as the model was trained to write it. What the grammar accepts, the parser of
:mod:`foldkv.runtime.chat.parser` reads as complete calls. One gap is known: a string inside a JSON value may spell out the tag that ends
the value, with other tokens than the tag's own; the parser would end the value there.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import InputError, short
from ...export.contract.chat import DEEPSEEK
from ...packages import require
from ..chat.formats import ChatFormat, Tools
from ..chat.messages import Tool, read_tools, wrong
from ..chat.revisions import DSML, EOS, REVISIONS, THOUGHT, Revision
from ..tokenizer import Tokenizer
from .grammar_check import Session, TooComplexError, checker
from .structured import LARGEST_GRAMMAR, any_text, json_rule, quoted, reason, single_token, text_before, written

#: A rule of llguidance's counts up to so many parameters that were written.
_MOST_PARAMETERS = 64
#: Schemas that the values of one parameter are split into, at most; one that has more is written as JSON alone.
_MOST_SPLITS = 1024
#: So many answers of llguidance about schemas are kept.
_KEPT = 1024
#: After the name of a parameter: its value is a text, or JSON.
_TRUE, _FALSE = '" string="true">', '" string="false">'
_TYPES = ("null", "boolean", "object", "array", "number", "string")
_OF_STRINGS = frozenset({"minLength", "maxLength", "pattern"})
_COMBINING = frozenset({"$ref", "$dynamicRef", "allOf", "anyOf", "if", "not", "oneOf"})
#: Keywords under which there are names, not keywords.
_NAMES = frozenset({"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"})
#: Keywords that are more than a note: what a schema without any of them describes is every value.
_ASSERTIONS = _OF_STRINGS | {
    "$ref", "$dynamicRef", "additionalItems", "additionalProperties", "allOf", "anyOf", "const", "contains", "dependencies",
    "dependentRequired", "dependentSchemas", "else", "enum", "exclusiveMaximum", "exclusiveMinimum", "if", "items", "maxItems",
    "maxProperties", "maximum", "minItems", "minProperties", "minimum", "multipleOf", "not", "oneOf", "patternProperties",
    "prefixItems", "properties", "propertyNames", "required", "then", "type", "unevaluatedItems", "unevaluatedProperties",
    "uniqueItems",
}  # fmt: skip
#: What a schema of parameters may not say, because a grammar cannot hold calls to it.
_NOT_OF_PARAMETERS = (
    "$dynamicRef", "allOf", "anyOf", "const", "dependencies", "dependentRequired", "dependentSchemas", "enum", "if", "not", "oneOf",
    "patternProperties", "propertyNames",
)  # fmt: skip
#: Formats that llguidance knows. Others are notes, as JSON Schema has it.
_FORMATS = frozenset({"date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"})


def tool_grammar(
    format: ChatFormat,
    tools: Tools | None,
    choice: str | Mapping[str, Any] = "auto",
    *,
    tokenizer: Tokenizer,
    thinking: bool = False,
    parallel: bool = True,
    content: Mapping[str, Any] | None = None,
    left_free: Callable[[str, InputError], None] | None = None,
    held: bool = True,
) -> str | None:
    """The grammar of answers that may, must or must not call tools, in Lark's syntax; None: nothing is to be constrained.

    Args:
        format: how the model writes calls.
        tools: what may be called, as OpenAI's API has it.
        choice: "auto": text, then calls or none; "required": calls alone; "none": text alone; a table as in
            ``{"type": "function", "function": {"name": "add"}}``: one call of this tool.
        tokenizer: the bundle's.
        thinking: whether the answer begins as reasoning; what the prompt's ``thinks`` says. Reasoning is any text up to its end.
        parallel: whether an answer may have several calls.
        content: a JSON schema. An answer without calls is JSON of it, and one with calls has no text before them. None: any text.
        left_free: told of a tool whose parameters may then be any, because no grammar can hold calls to their schemas. None: that is
            an error, as it is for a tool that says ``strict``.
        held: False: the parameters of all tools may be any.

    Raises:
        InputError: a tool or the choice is wrong, a schema says what a grammar cannot hold calls to, or calls are asked of a format
            whose calls are not known.
    """
    functions = read_tools(tools)
    chosen, must = _chosen(choice, functions)
    if format.file.encoding != DEEPSEEK:
        if must:
            raise InputError(
                f"tool_choice is {short(choice)}, which this model cannot be held to: it has a chat template, and no template says how "
                "calls are written. Use 'auto' or 'none'."
            )
        return None
    if not functions:
        return None
    require("structured output")
    with checker.session() as session:
        writer = _Writer(REVISIONS[format.name], tokenizer, session, left_free, held=held)
        return writer.grammar(
            chosen, must=must, thinking=thinking, several=parallel and isinstance(choice, str), content=content
        )


def _chosen(choice: str | Mapping[str, Any], tools: Sequence[Tool]) -> tuple[Sequence[Tool], bool]:
    """The tools that may be called, and whether one must be."""
    names = ", ".join(tool.name for tool in tools) or "none is given"
    if choice == "auto":
        return tools, False
    if choice == "none":
        return (), False
    if choice == "required":
        if not tools:
            raise wrong("tool_choice", choice, "'auto' or 'none' where no tools are given")
        return tools, True
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    if not isinstance(function, Mapping):
        raise wrong(
            "tool_choice", choice, "'auto', 'required', 'none' or {'type': 'function', 'function': {'name': ...}}"
        )
    found = [tool for tool in tools if tool.name == function.get("name")]
    if not found:
        raise wrong("tool_choice.function.name", function.get("name"), f"the name of a tool: {names}")
    return found, True


#: Says what llguidance has against a schema; "" for nothing.
_Check = Callable[[str], str]


class _Writer:
    """Writes the rules of one grammar."""

    def __init__(
        self, revision: Revision, tokenizer: Tokenizer, session: Session, left_free: Callable[[str, InputError], None] | None, *,
        held: bool,
    ) -> None:  # fmt: skip
        self._revision, self._left_free, self._held = revision, left_free, held
        self._check: _Check = lambda schema: _problem(schema, session)
        self._dsml, self._thought = single_token(tokenizer, DSML), single_token(tokenizer, THOUGHT)
        self._rules: list[str] = []
        self._size = 0  # characters of schemas, as given and as written
        self._any = ""  # the rule of a parameter that may be any

    def grammar(
        self, tools: Sequence[Tool], *, must: bool, thinking: bool, several: bool, content: Mapping[str, Any] | None
    ) -> str:
        """See :func:`tool_grammar`. Without tools the answer has no calls."""
        revision, start = self._revision, []
        block = f"<{revision.block}>"
        # Spelled out, too, these are what the parser takes them for.
        text, reasoning = any_text([block, EOS]), any_text([block, EOS, THOUGHT])
        if thinking:
            start.append(self._before(THOUGHT, THOUGHT, self._thought, "REASONING", reasoning))
        if tools:
            calls = [self._call(tool, number) for number, tool in enumerate(tools)]
            # The line break is a terminal of its own: terminals take as much as they can, so none may begin as another one ends.
            self._rules += [
                f'calls: (call "\\n"){"+" if several else ""} {self._own(f"</{revision.block}>")}',
                f"call: {' | '.join(calls)}",
            ]
        calls_alone = self._own("\n\n" + block + "\n") + " calls"
        if must:
            start.append(calls_alone)
        elif content is not None:
            self._rules.append(f"content: %json {json_rule(content)}")
            start.append(f"(content | {calls_alone})" if tools else "content")
        else:
            self._rules.append(f"CONTENT: {text}")
            before = self._before(block + "\n", DSML, self._dsml, "BEFORE", text) if tools else ""
            start.append(f"(CONTENT | {before} calls)" if tools else "CONTENT")
        return "\n".join([f"start: {' '.join(start)}", *self._rules])

    def _own(self, markup: str) -> str:
        return written(markup, DSML, self._dsml)

    def _before(self, end: str, mark: str, token: int | None, name: str, content: str) -> str:
        rule, terminal = text_before(end, mark, token, name=name, content=content)
        self._rules.append(terminal)
        return rule

    def _call(self, tool: Tool, number: int) -> str:
        """The name of a rule for calls of a tool. Each parameter comes once, in any order, and the required ones must."""
        name, parameters = f"call{number}", self._parameters_of(tool)
        head = self._own(f'<{self._revision.invoke} name="{tool.name}">\n')
        end = self._own(f"</{self._revision.invoke}>")
        if parameters is None:
            self._rules.append(f'{name}: {head} (({self._any_parameter()} "\\n")+ | "\\n") {end}')
            return name
        if not parameters:
            self._rules.append(f'{name}: {head} "\\n" {end}')
            return name
        # The rule counts in bits which parameters were written.
        required = sum(one.required for one in parameters)
        rows = [f'""  %if {f"is_ones([0:{required}])" if required else "bit_count_ge(_, 1)"}']
        for bit, one in enumerate(parameters):
            rule = self._parameter(one, f"{name}_{bit}")
            rows.append(f'{rule} "\\n" {name}_rest::set_bit({bit})  %if bit_clear({bit})')
        some = f"{name}_rest::0x0"
        if not required:
            some = f'({some} | "\\n")'
        self._rules += [f"{name}: {head} {some} {end}", f"{name}_rest::_: " + "\n  | ".join(rows)]
        return name

    def _parameters_of(self, tool: Tool) -> list[_Parameter] | None:
        """The parameters of a tool; None where they may be any."""
        if not self._held:
            return None
        before, parameters = self._size, []
        try:
            self._count(_size_of(tool))
            for one in _parameters(tool, self._check):
                self._count(len(one.schema or ""))
                parameters.append(one)
        except InputError as error:
            if self._left_free is None or tool.function.get("strict") is True:
                raise
            self._size = before
            self._left_free(tool.name, error)
            return None
        return parameters

    def _any_parameter(self) -> str:
        """The name of a rule for a parameter of any name and value."""
        if not self._any:
            self._any, end = "any_parameter", f"</{self._revision.parameter}>"
            text = self._before(end, DSML, self._dsml, "ANY_TEXT", any_text([end]))
            opening = self._own(f'<{self._revision.parameter} name="')
            self._rules += [
                'ANY_NAME: /[^"<>\\n]{1,256}/',
                f"any_json: %json {json_rule({})}",
                f"{self._any}: {opening} ANY_NAME ({quoted(_TRUE)} {text} | {quoted(_FALSE)} any_json {self._own(end)})",
            ]
        return self._any

    def _count(self, characters: int) -> None:
        """Schemas are copied for each parameter that refers to others: nothing goes on that is too large in the end."""
        self._size += characters
        if self._size > 2 * LARGEST_GRAMMAR:
            raise InputError(
                f"the schemas of the tools are too large: {self._size} characters and more; at most {2 * LARGEST_GRAMMAR} are read. Give "
                "fewer tools or simpler parameters."
            )

    def _parameter(self, parameter: _Parameter, name: str) -> str:
        revision, rows = self._revision, []
        end = f"</{revision.parameter}>"
        if parameter.texts:
            choices = " | ".join(text.expression([end]) for text in parameter.texts)
            opening = self._own(f'<{revision.parameter} name="{parameter.name}{_TRUE}')
            rows.append(f"{opening} {self._before(end, DSML, self._dsml, f'TEXT_{name.upper()}', f'({choices})')}")
        if parameter.schema is not None:
            opening = self._own(f'<{revision.parameter} name="{parameter.name}{_FALSE}')
            rows.append(f"{opening} {name}_json {self._own(end)}")
            self._rules.append(f"{name}_json: %json {parameter.schema}")
        self._rules.append(f"{name}: " + " | ".join(rows))
        return name


@dataclass(frozen=True)
class _Text:
    """Values that are written as they are: one of ``values``, or what matches ``pattern`` and is so long."""

    values: tuple[str, ...] | None = None
    pattern: str = ""
    shortest: int = 0
    longest: int | None = None

    def expression(self, without: Sequence[str]) -> str:
        """The terminal's expression."""
        if self.values is not None:
            return " | ".join(quoted(value) for value in self.values)
        parts = [any_text(without)]
        if self.shortest or self.longest is not None:
            parts.append(f"/(?s:.{{{self.shortest},{'' if self.longest is None else self.longest}}})/")
        if self.pattern:
            parts.append(f"/{self.pattern}/")
        return f"({' & '.join(parts)})"


@dataclass(frozen=True)
class _Parameter:
    """A parameter of a tool.

    Attributes:
        name: as the schema has it.
        required: whether each call has it.
        texts: the texts that it may be.
        schema: the schema of its other values, as it stands in a grammar; None if there are no others.
    """

    name: str
    required: bool
    texts: tuple[_Text, ...]
    schema: str | None


def _size_of(tool: Tool) -> int:
    try:
        return len(json.dumps(tool.function.get("parameters"), ensure_ascii=False, default=str))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the parameters of the tool {tool.name} cannot be read: {error}.") from None


def _parameters(tool: Tool, check: _Check) -> Iterator[_Parameter]:
    """The parameters of a tool, the required ones first."""
    where, root = f"parameters of the tool {tool.name}", tool.function.get("parameters") or {}
    schema = _followed(root, root, where)
    for key in _NOT_OF_PARAMETERS:
        if key in schema:
            raise wrong(f"{where}: {key}", schema[key], "a schema with properties alone", "Calls cannot be held to it.")
    kinds = schema.get("type", "object")
    if "object" not in (kinds if isinstance(kinds, list) else [kinds]):
        raise wrong(f"{where}: type", kinds, "'object'")
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, Mapping):
        raise wrong(f"{where}: properties", properties, "a table of schemas")
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise wrong(f"{where}: required", required, "a list of names")
    if schema.get("minProperties", 0) > len(set(required)) or schema.get("maxProperties", len(properties)) < len(
        properties
    ):
        raise wrong(f"{where}: minProperties and maxProperties", (schema.get("minProperties"), schema.get("maxProperties")), "neither")  # fmt: skip
    names = list(dict.fromkeys([*required, *properties]))
    if len(names) > _MOST_PARAMETERS:
        raise wrong(f"{where}: their number", len(names), f"at most {_MOST_PARAMETERS}")
    for name in names:
        at = f"{where}: {name}"
        if not name or any(sign in name for sign in '"<>\n') or DSML in name or len(name) > 256:
            raise wrong(f"{where}: a name", name, 'at most 256 letters without ", <, > and line breaks')
        own = properties.get(name, schema.get("additionalProperties", True))
        try:
            texts, others = _split(own, root, at, {}, check)
        except _TooManyError:
            texts, others = [], [own]
        if not texts and not others:
            if name in required:
                raise wrong(at, own, "a schema that some value has")
            continue
        yield _Parameter(
            name, name in required, tuple(texts), _json_values(others, root, at, check) if others else None
        )


def _followed(schema: Any, root: Any, where: str) -> Mapping[str, Any]:
    """A schema, or the one that it only refers to."""
    for _ in range(64):
        if not isinstance(schema, Mapping):
            raise wrong(where, schema, "a JSON schema: a table")
        if schema.keys() & _ASSERTIONS != {"$ref"}:
            return schema
        schema = _target(schema["$ref"], root, where)
    raise wrong(where, schema, "a schema that does not refer to itself")


def _target(ref: object, root: Any, where: str) -> Any:
    found = root
    if not isinstance(ref, str) or not re.match(r"#(/|$)", ref):
        raise wrong(f"{where}: $ref", ref, "a reference within the schema, as in '#/$defs/city'")
    for step in ref.split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        elif isinstance(found, Mapping) and key in found:
            found = found[key]
        else:
            raise wrong(f"{where}: $ref", ref, "a reference to a place that there is")
    return found


class _TooManyError(Exception):
    """A schema is not worth splitting."""


def _split(
    schema: Any, root: Any, where: str, seen: dict[int, Any], check: _Check, depth: int = 0
) -> tuple[list[_Text], list[Any]]:
    """The values of a schema: those that are texts, and schemas of the others.

    Texts of a schema that combines others in ways that are not followed here stay with the others: they are written as JSON.

    ``seen`` has the schemas that were split, by their ids. References may lead to the same one again and again, and around in
    a circle: each is split once, so that this takes no more time than the schema is long.

    Raises:
        _TooManyError: there are too many, or one comes again.
    """
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    schema = _followed(schema, root, where)
    if id(schema) in seen or len(seen) >= _MOST_SPLITS:
        raise _TooManyError
    seen[id(schema)] = schema
    said = schema.keys() & _ASSERTIONS
    for key in said & {"anyOf", "oneOf"}:
        if len(said) > 1 or depth > 8 or not isinstance(schema[key], list):
            return [], [schema]
        parts = [_split(one, root, where, seen, check, depth + 1) for one in schema[key]]
        if key == "oneOf" and sum(bool(texts) for texts, _ in parts) > 1:
            return [], [schema]
        others = [one for _, found in parts for one in found]
        return [text for texts, _ in parts for text in texts], [{key: others}] if key == "oneOf" and others else others
    kinds = schema.get("type", _TYPES)
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    rest = [kind for kind in kinds if kind != "string"]
    if said & {"enum", "const"}:
        if not said <= {"enum", "const", "type"} or not isinstance(schema.get("enum", []), list):
            return [], [schema]
        values = [schema["const"]] if "const" in schema else schema["enum"]
        texts = tuple(one for one in values if isinstance(one, str)) if "string" in kinds else ()
        others = [one for one in values if not isinstance(one, str)] if rest else []
        typed = {"type": rest} if "type" in schema else {}
        return [_Text(texts)] if texts else [], [{**typed, "enum": others}] if others else []
    if "string" not in kinds or said & _COMBINING or ("type" not in said and not said <= _OF_STRINGS):
        return [], [schema]
    text = _text(schema, check)
    if text is None:
        return [], [schema]
    # A schema that speaks of texts alone says nothing of other values.
    return [text], [{**schema, "type": rest}] if rest else []


def _text(schema: Mapping[str, Any], check: _Check) -> _Text | None:
    """The texts of a schema; None where only JSON can be held to it."""
    import llguidance

    pattern, shortest, longest = schema.get("pattern", ""), schema.get("minLength", 0), schema.get("maxLength")
    if type(shortest) is not int or not (longest is None or type(longest) is int):
        return None
    if not pattern:
        return _Text(shortest=shortest, longest=longest)
    # The anchors are of the whole only where there is no choice around them, and a pattern without them is looked for in the text.
    whole = isinstance(pattern, str) and re.fullmatch(r"\^(.*)\$", pattern, re.DOTALL)
    if not whole or check(json_rule({"type": "string", "pattern": pattern})) or _has_choice_or_anchor(whole[1]):
        return None  # a pattern that is none is not looked into: that takes long where a bracket is never closed
    return _Text(pattern=llguidance.regex_to_lark(whole[1], "dw"), shortest=shortest, longest=longest)


def _has_choice_or_anchor(pattern: str) -> bool:
    signs, depth = re.sub(r"\\[^bB]|\[\^?\]?[^\]]*\]", "", pattern), 0
    for sign in signs:
        depth += (sign == "(") - (sign == ")")
        if sign in "^$\\" or (sign == "|" and not depth):
            return True
    return False


def _json_values(others: Sequence[Any], root: Any, where: str, check: _Check) -> str:
    """Schemas of a parameter as one that stands in a grammar, by itself.

    Raises:
        InputError: llguidance cannot hold values to it.
    """
    schema = others[0] if len(others) == 1 else {"anyOf": list(others)}
    found = _moved(schema)
    if found != _moved(schema, refer=False):
        # References are to the schema of all parameters, which comes along under a name of its own.
        found = {**found, "$defs": {"parameters": _moved(root)}}
    text = json_rule(found)
    problem = check(text)
    if problem:
        raise InputError(
            f"{where} has a schema that calls cannot be held to: {problem}. Change it, or do not constrain the answer."
        )
    return text


def _moved(schema: Any, *, refer: bool = True) -> Any:
    """A schema with its references to what is to be at ``#/$defs/parameters``, and without formats that are only notes."""
    if isinstance(schema, list):
        return [_moved(one, refer=refer) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    made = {}
    for key, value in schema.items():
        if key in ("const", "enum", "default", "examples"):
            made[key] = value
        elif key in _NAMES and isinstance(value, Mapping):
            made[key] = {name: _moved(one, refer=refer) for name, one in value.items()}
        elif key == "$ref" and isinstance(value, str) and value.startswith("#") and refer:
            made[key] = f"#/$defs/parameters{value[1:]}"
        elif key != "format" or not isinstance(value, str) or value in _FORMATS:
            made[key] = _moved(value, refer=refer)
    return made


#: What is wrong with schemas, by their digests.
_problems: OrderedDict[bytes, str] = OrderedDict()
_lock = threading.Lock()


def _problem(schema: str, session: Session) -> str:
    """What llguidance has against a schema; "" for nothing."""
    if len(schema) > LARGEST_GRAMMAR:
        return f"it has {len(schema)} characters; at most {LARGEST_GRAMMAR} are read"
    key = hashlib.sha256(schema.encode()).digest()
    with _lock:
        found = _problems.get(key)
    if found is None:
        try:
            found = reason(session.schema(schema))
        except TooComplexError as error:
            return str(error)  # or one before it was
    with _lock:
        _problems[key] = found
        _problems.move_to_end(key)
        while len(_problems) > _KEPT:
            _problems.popitem(last=False)
    return found
