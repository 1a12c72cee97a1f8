"""Prompts from a checkpoint's Jinja chat template, rendered in a sandbox as transformers does.

A template is a program of whoever made the checkpoint. The sandbox keeps it from Python's objects and from files, not from taking
long: use checkpoints that you trust.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...errors import ArtifactError, InputError, MissingDependencyError
from ...packages import require, requirement, version_of
from .messages import Message, Tool
from .prompt import Prompt, finder

#: Older sandboxes are known to leak.
_SAFE = (3, 1, 6)
#: What an assistant wrote itself.
_OWN = ("content", "reasoning_content", "thinking")


def render(
    template: str,
    tokens: Mapping[str, str],
    messages: Sequence[Message],
    *,
    special: frozenset[str] = frozenset(),
    tools: Sequence[Tool] = (),
    thinking: bool | None = None,
    effort: str | int | None = None,
    add_generation_prompt: bool = True,
    now: Callable[[], datetime.datetime] = datetime.datetime.now,
) -> Prompt:
    """Render a template.

    Special tokens that messages, calls and tools spell out are ordinary text in the prompt's token ids, but for those in the text and
    the reasoning of an assistant: templates look for ``</think>`` there.

    Args:
        template: the Jinja template.
        tokens: texts that the template knows by name, such as ``bos_token``.
        messages: the conversation.
        special: the tokenizer's special tokens.
        tools: what may be called.
        thinking: given to the template as ``enable_thinking`` and ``thinking``; None leaves both undefined.
        effort: given as ``reasoning_effort``; None leaves it undefined.
        add_generation_prompt: ask for an answer.
        now: the time of ``strftime_now``.

    Raises:
        InputError: the template refuses the messages.
        ArtifactError: the template is not valid, or does what the sandbox forbids.
        MissingDependencyError: jinja2 is not installed, or too old.
    """
    _require_jinja()
    import jinja2

    rows = [_row(message) for message in messages]
    functions = [{"type": "function", "function": tool.function} for tool in tools]
    try:
        hidden = _Hidden(special, template + json.dumps([rows, functions], ensure_ascii=False))
        shown = hidden.rows(rows), hidden.hide(functions)
    except RecursionError:
        raise InputError("the messages or tools are nested too deeply. Give flatter tables.") from None
    values: dict[str, Any] = {
        **tokens,
        "messages": shown[0],
        "tools": shown[1] or None,
        "add_generation_prompt": add_generation_prompt,
        "strftime_now": lambda layout: now().strftime(layout),
    }
    if thinking is not None:
        values |= {"enable_thinking": thinking, "thinking": thinking}
    if effort is not None:
        values["reasoning_effort"] = effort
    try:
        text = _compiled(template).render(values)
    except (jinja2.TemplateSyntaxError, jinja2.exceptions.SecurityError) as error:
        raise ArtifactError(
            f"the bundle's chat template cannot be used ({type(error).__name__}: {error}). Correct the checkpoint's template and "
            "make the bundle again."
        ) from None
    except jinja2.TemplateError as error:
        raise InputError(f"the model's chat template refuses the messages: {error}.") from None
    except Exception as error:  # noqa: BLE001 - a template is a program, and can fail in any way
        raise InputError(
            f"the model's chat template cannot render these messages ({type(error).__name__}: {error}). Compare their keys and "
            "roles with the model's documentation."
        ) from None
    return hidden.shown(text)


class _Hidden:
    """Special tokens in what is given, each replaced by one character that occurs nowhere, until the text is rendered."""

    def __init__(self, special: frozenset[str], text: str) -> None:
        """``text`` has every character that is given or that the template writes."""
        used = set(text)
        self._free = (one for one in map(chr, range(0xF0000, 0xFFFFE)) if one not in used)
        self._special, self._find = special, finder(special)
        self._signs = dict[str, str]()

    def hide(self, value: Any) -> Any:
        """A value of JSON, in all of whose texts and names no token is left."""
        match value:
            case str():
                return self._find.sub(self._sign, value)
            case list():
                return [self.hide(one) for one in value]
            case dict():
                return {self.hide(name): self.hide(one) for name, one in value.items()}
            case _:
                return value

    def rows(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages as templates read them, but for what an assistant wrote itself."""
        return [
            {
                name: value if row["role"] == "assistant" and name in _OWN else self.hide(value)
                for name, value in row.items()
            }
            for row in rows
        ]

    def shown(self, text: str) -> Prompt:
        """The rendered text with the tokens where they were given."""
        tokens = {sign: token for token, sign in self._signs.items()}
        # A template may write JSON in ASCII.
        tokens |= {json.dumps(sign)[1:-1]: json.dumps(token)[1:-1] for token, sign in self._signs.items()}
        parts, literal, length = list[str](), set[tuple[int, int]](), 0
        for part in re.split(f"({'|'.join(map(re.escape, tokens))})" if tokens else "(?!)", text):
            written = tokens.get(part, part)
            if part in tokens:
                literal.add((length, length + len(written)))
            parts.append(written)
            length += len(written)
        whole = "".join(parts)
        found = (match.span() for match in self._find.finditer(whole))
        return Prompt(whole, tuple(span for span in found if span not in literal), self._special)

    def _sign(self, found: re.Match[str]) -> str:
        if found[0] not in self._signs:
            self._signs[found[0]] = next(self._free)
        return self._signs[found[0]]


def _row(message: Message) -> dict[str, Any]:
    """A message as templates read it: arguments of calls are tables, and what there is nothing of is absent."""
    row: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        row |= {"reasoning_content": message.reasoning, "thinking": message.reasoning}
    if message.tool_calls:
        row["tool_calls"] = [
            {
                "type": "function",
                "id": call.id,
                "function": {"name": call.name, "arguments": _arguments(call.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        row["tool_call_id"] = message.tool_call_id
    return row


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _require_jinja() -> None:
    require("chat templates")
    version = version_of("jinja2") or "unknown"
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if numbers < _SAFE:
        install = f"pip install '{requirement('jinja2')}'"
        raise MissingDependencyError(
            f"chat templates need jinja2 {'.'.join(map(str, _SAFE))} or later, whose sandbox is safe; {version} is installed. "
            f"Run `{install}`.",
            packages=["jinja2"], install=install,
        )  # fmt: skip


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what an assistant wrote, for training; here it is only its content."""

        tags = frozenset({"generation"})  # type: ignore[assignment]

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes for HTML, which is not what models were trained on.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template)
