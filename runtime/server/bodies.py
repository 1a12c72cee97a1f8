"""The bodies of requests, with the names of OpenAI's API and some of vLLM's.

What a body says is taken or refused, and never dropped: a field that is not known, or asks for what this server does not do, is an
error with the field's name. null means what leaving the field out means.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from ...errors import nearest, short
from ..sampling import PENALTIES
from .problems import Problem

#: Strings that end a text, at most.
_STOPS = 16
#: Answers to one prompt, at most, as OpenAI has it.
_ANSWERS = 128
#: Prompts in one request, at most.
_PROMPTS = 256
#: Messages, tools, and ids or texts in other lists, at most.
_MESSAGES, _TOOLS, _LISTED = 1 << 14, 1 << 10, 1 << 16
#: Pairs of metadata, at most, as OpenAI has it.
_METADATA = 16
#: Findings that are told, at most.
_FINDINGS = 5
#: Letters of a place in a body that are told.
_SHOWN = 200
#: Letters of a name that may be a known one misspelt, at most.
_NAME = 64
#: A half of a surrogate pair, written as an escape. No text in UTF-8 has one.
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
#: Fields of OpenAI's API that this server does not have, and what to do instead.
_REFUSED = {
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "this model writes text only",
    "prediction": "leave it out",
    "web_search_options": "give a tool that searches",
    "verbosity": "say it in a message",
    "guided_json": "use structured_outputs.json",
    "guided_choice": "use structured_outputs.choice",
    "guided_grammar": "use structured_outputs.grammar",
    "use_beam_search": "this server samples",
}

Body = TypeVar("Body", bound="SamplingBody")


class Strict(BaseModel):
    """Values of exactly the declared types, and no others."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        """Fields that are not known come first, and only some: pydantic would list them all, which takes long for a million."""
        if isinstance(value, dict):
            known = {field.alias or name for name, field in cls.model_fields.items()}
            unknown = itertools.islice((name for name in value if name not in known), _FINDINGS + 1)
            found = [InitErrorDetails(type="extra_forbidden", loc=(name,), input=value[name]) for name in unknown]
            if found:
                raise ValidationError.from_exception_data(cls.__name__, found)
        return value


def _stops(value: Any) -> Any:
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list) or not all(isinstance(one, str) and one for one in given) or len(given) > _STOPS:
        raise ValueError(f"a text or a list of at most {_STOPS} texts, none of them empty")
    return tuple(given)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int and one >= 0 for one in value)


def _prompts(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    if _is_ids(value):
        return (tuple(value),)
    if isinstance(value, list) and 0 < len(value) <= _PROMPTS:
        if all(isinstance(one, str) for one in value):
            return tuple(value)
        if all(_is_ids(one) for one in value):
            return tuple(tuple(one) for one in value)
    raise ValueError(
        f"a text, a list of token ids, or a list of at most {_PROMPTS} texts or of as many lists of token ids; none may be empty"
    )


def _bias(value: Any) -> Any:
    if isinstance(value, dict):
        keys = [key for key in value if not (isinstance(key, str) and re.fullmatch(r"[0-9]{1,9}", key))]
        if not keys and all(type(bias) in (int, float) and -100 <= bias <= 100 for bias in value.values()):
            return {int(key): float(bias) for key, bias in value.items()}
    raise ValueError('a table from token ids, as texts, to numbers from -100 to 100: {"42": -100}')


def _schema(value: Any) -> Any:
    if isinstance(value, (dict, str)):
        return value
    raise ValueError("a JSON schema: a table, or its text")


def _given(check: Callable[[Any], Any]) -> BeforeValidator:
    """A check of what was given; null is as if it was not."""
    return BeforeValidator(lambda value: value if value is None else check(value))


class StreamOptions(Strict):
    """What a stream tells beside the text."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class StructuredOutputs(Strict):
    """What an answer must keep to: one of these."""

    regex: str | None = None
    grammar: str | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=_LISTED, fail_fast=True)] | None = None
    json_: Annotated[dict[str, Any] | str | None, _given(_schema)] = Field(default=None, alias="json")

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        if sum(one is not None for one in (self.regex, self.grammar, self.choice, self.json_)) != 1:
            raise ValueError("exactly one of regex, grammar, choice and json")
        return self


class SamplingBody(Strict):
    """What both kinds of requests have."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=_ANSWERS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Annotated[tuple[str, ...] | None, _given(_stops)] = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=_LISTED, fail_fast=True)] | None = (
        None
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=PENALTIES[0], le=10)] | None = None
    logit_bias: Annotated[dict[int, float] | None, _given(_bias)] = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_regex: str | None = None
    # These say who asks and what for, and ask for nothing.
    user: str | None = None
    metadata: Annotated[dict[str, str], Field(max_length=_METADATA)] | None = None

    @model_validator(mode="after")
    def _together(self) -> SamplingBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options only with stream: true")
        if self.guided_regex is not None and self.structured_outputs is not None:
            raise ValueError("one of guided_regex and structured_outputs")
        return self


class CompletionBody(SamplingBody):
    """The body of /v1/completions."""

    prompt: Annotated[tuple[str | tuple[int, ...], ...], BeforeValidator(_prompts)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    skip_special_tokens: bool | None = None
    echo: Literal[False] | None = None
    best_of: Annotated[int, Field(ge=1, le=_ANSWERS)] | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _all_of_the_best(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of equal to n: this server gives all answers that it makes")
        return self


class Named(Strict):
    """The name of a function."""

    name: str


class ToolChoice(Strict):
    """The one tool that must be called."""

    type: Literal["function"]
    function: Named


class Schema(Strict):
    """A JSON schema with a name."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Strict):
    """What an answer's content must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    @model_validator(mode="after")
    def _with_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('json_schema with the type "json_schema", and with no other')
        return self


class ThinkingSwitch(Strict):
    """DeepSeek's own way to turn thinking on or off."""

    type: Literal["enabled", "disabled"]


class TemplateOptions(Strict):
    """Whether the model thinks before it answers."""

    thinking: bool | None = None
    enable_thinking: bool | None = None


def _choice(value: Any) -> Any:
    if value in ("none", "auto", "required"):
        return value
    try:
        return ToolChoice.model_validate(value)
    except ValidationError:
        raise ValueError('"none", "auto", "required" or {"type": "function", "function": {"name": ...}}') from None


class ChatBody(SamplingBody):
    """The body of /v1/chat/completions. Messages and tools are read by foldkv.runtime.chat."""

    messages: Annotated[list[dict[str, Any]], Field(max_length=_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=_TOOLS, fail_fast=True)] | None = None
    tool_choice: Annotated[str | ToolChoice | None, _given(_choice)] = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None
    thinking: ThinkingSwitch | None = None
    chat_template_kwargs: TemplateOptions | None = None
    store: bool | None = None  # nothing here can ask for kept answers, so that they are not kept is not noticed
    service_tier: Literal["auto", "default"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1, fail_fast=True)] | None = None
    # As `user`; what prompts have in common is found without a key.
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    safety_identifier: str | None = None

    @model_validator(mode="after")
    def _fit(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs only with logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("one of max_tokens and max_completion_tokens")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice only with tools")
        if isinstance(self.tool_choice, ToolChoice):
            functions = [tool.get("function") for tool in self.tools or []]
            names = [function.get("name") for function in functions if isinstance(function, dict)]
            if self.tool_choice.function.name not in names:
                raise ValueError("tool_choice with the name of one of the tools")
        structured = self.structured_outputs is not None or self.guided_regex is not None
        if structured and self.response_format is not None and self.response_format.type != "text":
            raise ValueError("one of response_format, structured_outputs and guided_regex")
        return self


def read_body(kind: type[Body], data: bytes) -> Body:
    """The body of a request.

    Raises:
        Problem: it is not JSON of an object, or a field is wrong; the message lists the first findings.
    """
    try:
        table = json.loads(data.decode(), parse_constant=_no_constant)
        if _HALF.search(data):
            json.dumps(table, ensure_ascii=False).encode()
    except UnicodeError:
        raise Problem(400, "The body is not text in UTF-8.", code="invalid_json") from None
    except (ValueError, RecursionError) as error:
        raise Problem(400, f"The body is not JSON: {error}.", code="invalid_json") from None
    if not isinstance(table, dict):
        raise Problem(400, f"The body is {short(table)}; expected an object of JSON.", code="invalid_json")
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        found = error.errors(include_url=False)
        lines = [_finding(one, kind) for one in found[:_FINDINGS]]
        more = " And more." if len(found) > _FINDINGS else ""
        unknown = any(one["type"] == "extra_forbidden" for one in found)
        place = _where(found[0]["loc"])[:_SHOWN] or str(found[0].get("ctx", {}).get("error", "")).split(" ")[0]
        raise Problem(
            400, " ".join(lines) + more, param=place if re.split(r"[.\[]", place)[0] in names_of(kind, table) else None,
            code="unknown_parameter" if unknown else "invalid_value",
        ) from None  # fmt: skip


def names_of(kind: type[BaseModel], *tables: dict[str, Any]) -> frozenset[str]:
    """The fields that a body can have, and those that it has."""
    return frozenset(kind.model_fields).union(*tables)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _where(place: tuple[int | str, ...]) -> str:
    """A place as ``stop[0].name``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")


def _finding(item: Any, kind: type[BaseModel]) -> str:
    where, what = _where(item["loc"])[:_SHOWN], item["type"]
    if what == "extra_forbidden":
        name = str(item["loc"][-1])
        known = [field.alias or key for key, field in kind.model_fields.items()]
        hint = f": {_REFUSED[name]}" if name in _REFUSED else nearest(name[:_NAME], known)
        return f"{where} is not a field that this server knows{hint}."
    if what == "missing":
        return f"{where} is missing."
    if what == "too_long":
        return f"{where} has {item['ctx']['actual_length']} items; expected at most {item['ctx']['max_length']}."
    own = what == "value_error"
    expected = str(item["ctx"]["error"]) if own else item["msg"].removeprefix("Input should be ")
    return f"{where} is {short(item['input'])}; expected {expected}." if where else f"Expected {expected}."
