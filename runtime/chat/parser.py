"""Answers of DeepSeek-V4 parsed while they stream: reasoning, content and calls of tools.

Pieces may be cut anywhere, also inside a tag. Malformed text never raises, and no text is lost: what is not a tag at its place comes
out as content, or as reasoning before ``</think>``. More is taken than the published parser takes, because models write it: any
white space between tags, calls before ``</think>``, which end the reasoning, and several blocks of calls.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from typing import Protocol

from ..detokenizer import possible_start
from .events import Arguments, CallEnd, CallStart, Content, Event, Reasoning
from .revisions import DSML, EOS, THOUGHT, Revision

#: A tag's attributes may be so long; what is longer is no tag. Without a limit, one open quote would hold back all of the text.
_LONGEST_TAG = 1024
#: So much text is looked at together, so that the work does not grow with the square of a long text.
_PIECE = 4096


class Parser(Protocol):
    """Text in pieces, events out."""

    def feed(self, text: str) -> list[Event]:
        """The events that the text makes final. Text that may be the start of a tag is held back."""

    def finish(self) -> list[Event]:
        """The events of the text that was held back. Nothing may be fed afterwards."""


class PlainParser:
    """For templates, whose answers have no known markup: all of it is content."""

    def feed(self, text: str) -> list[Event]:
        """The text as content."""
        return [Content(text)] if text else []

    def finish(self) -> list[Event]:
        """Nothing is held back."""
        return []


def random_id() -> str:
    """An id for a call."""
    return f"call_{secrets.token_hex(12)}"


class DeepseekParser:
    """The parser of a revision of DeepSeek's encoding.

    Feed it the text with special tokens: with ``skip_special_tokens=False``, because a tokenizer may mark ``｜DSML｜`` or ``</think>``
    as special. An end of sequence in the text is taken as such, and what follows it is content.

    Arguments are always JSON of an object once a call is complete: a value that is marked as JSON and is not becomes a text. So values
    that are texts stream; others come when they are whole. Those of a call that breaks off stay open, so that nobody runs it.
    """

    def __init__(self, revision: Revision, *, thinking: bool, new_id: Callable[[], str] = random_id) -> None:
        """``thinking``: the prompt ended with ``<think>``, so the text begins as reasoning. ``new_id`` makes ids of calls."""
        start = f"<{revision.block}>"
        # The blank line before a block belongs to it; a model may leave it out.
        self._blocks = (f"\n\n{start}", start)
        self._block_end, self._call_end = f"</{revision.block}>", f"</{revision.invoke}>"
        self._value_end = f"</{revision.parameter}>"
        self._call = _Tag(f'<{revision.invoke} name="', '">')
        self._parameter = _Tag(f'<{revision.parameter} name="', '" string="(true|false)">')
        self._new_id = new_id
        self._text = ""  # not looked at yet, or held back
        self._markup = ""  # taken from the text as markup that may turn out to be none
        self._thinking = thinking
        self._state: Callable[[bool], bool] = self._outside
        self._events: list[Event] = []
        self._calls = 0
        self._keys: list[str] = []  # of the open call
        self._json = list[str]()  # of the open value
        self._as_text = False

    def feed(self, text: str) -> list[Event]:
        """The events that the text makes final."""
        for at in range(0, len(text), _PIECE):
            self._text += text[at : at + _PIECE]
            self._run(end=False)
        return self._given()

    def finish(self) -> list[Event]:
        """The events of the text that was held back; an open call ends as not complete."""
        self._run(end=True)
        return self._given()

    def _run(self, *, end: bool) -> None:
        while self._state(end):
            pass

    def _given(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    # Each state reads from the text, and says whether the next one can go on with what is left.

    def _outside(self, end: bool) -> bool:
        """Reasoning, then content."""
        marks = (THOUGHT, EOS, *self._blocks) if self._thinking else (EOS, *self._blocks)
        mark = self._until(marks, end, self._say)
        if mark == THOUGHT:
            self._thinking = False
        elif mark == EOS:
            self._thinking, self._state = False, self._after_end
        elif mark:
            self._markup, self._state = mark, self._between_calls
        return bool(mark)

    def _after_end(self, end: bool) -> bool:
        text, self._text = self._text, ""
        self._say(text)
        return False

    def _between_calls(self, end: bool) -> bool:
        self._skip_space()
        if self._text.startswith(self._block_end):
            self._take(len(self._block_end))
            # A block without a call is nothing that an event stands for.
            self._leave(lost=self._markup.startswith(self._blocks))
            return True
        found = self._call.at_start(self._text)
        if found is None:
            if not end and self._may_come(self._block_end, self._call):
                return False
            return self._leave(lost=True)
        self._take(found.end())
        self._markup, self._thinking, self._keys = "", False, []
        self._events.append(CallStart(self._calls, self._new_id(), found[1]))
        self._calls += 1
        self._state = self._between_parameters
        return True

    def _between_parameters(self, end: bool) -> bool:
        self._skip_space()
        if self._text.startswith(self._call_end):
            self._take(len(self._call_end))
            self._arguments("}" if self._keys else "{}")
            self._events.append(CallEnd(self._calls - 1, True))
            self._markup, self._state = "", self._between_calls
            return True
        found = self._parameter.at_start(self._text)
        if found is None or found[1] in self._keys:
            if found is None and not end and self._may_come(self._call_end, self._parameter):
                return False
            self._events.append(CallEnd(self._calls - 1, False))
            return self._leave(lost=True)
        self._take(found.end())
        self._markup, self._as_text, self._json = "", found[2] == "true", []
        self._arguments(("," if self._keys else "{") + (" " if self._keys else "") + _quoted(found[1]) + ": ")
        self._keys.append(found[1])
        self._arguments('"' if self._as_text else "")
        self._state = self._value
        return True

    def _value(self, end: bool) -> bool:
        give = self._text_value if self._as_text else self._json.append
        if self._until((self._value_end,), end, give):
            self._arguments('"' if self._as_text else _json_or_text("".join(self._json)))
            self._state = self._between_parameters
            return True
        if end:
            self._arguments("".join(self._json))
            self._events.append(CallEnd(self._calls - 1, False))
            self._json, self._state = [], self._outside
        return False

    # What the states are made of.

    def _until(self, marks: tuple[str, ...], end: bool, give: Callable[[str], object]) -> str:
        """Give out the text before the first mark, and take the mark; "" if there is none yet."""
        found = [(at, -len(mark), mark) for mark in marks if (at := self._text.find(mark)) >= 0]
        if found:
            at, _, mark = min(found)
            text, self._text = self._text[:at], self._text[at + len(mark) :]
        else:
            mark = ""
            final = len(self._text) - (0 if end else possible_start(self._text, marks))
            text, self._text = self._text[:final], self._text[final:]
        if text:
            give(text)
        return mark

    def _say(self, text: str) -> None:
        if text:
            self._events.append(Reasoning(text) if self._thinking else Content(text))

    def _arguments(self, text: str) -> None:
        if text:
            self._events.append(Arguments(self._calls - 1, text))

    def _text_value(self, text: str) -> None:
        self._arguments(_quoted(text)[1:-1])

    def _take(self, count: int) -> None:
        self._markup, self._text = self._markup + self._text[:count], self._text[count:]

    def _skip_space(self) -> None:
        self._take(len(self._text) - len(self._text.lstrip()))

    def _may_come(self, closing: str, tag: _Tag) -> bool:
        return closing.startswith(self._text) or tag.may_come(self._text)

    def _leave(self, *, lost: bool) -> bool:
        """Go on outside of calls. ``lost``: what was taken as markup was none, so it is text."""
        if lost and (self._text or not self._markup.isspace()):
            self._say(self._markup)
        self._markup, self._state = "", self._outside
        return True


class _Tag:
    """A tag with a name: how it opens, and a pattern of what ends the name."""

    def __init__(self, opening: str, closing: str) -> None:
        self._opening = opening
        # A name that went on into the next tag would swallow it.
        self._pattern = re.compile(f"{re.escape(opening)}((?:(?!{DSML}).)*?){closing}", re.DOTALL)

    def at_start(self, text: str) -> re.Match[str] | None:
        """The tag, if the text begins with all of it."""
        return self._pattern.match(text[: len(self._opening) + _LONGEST_TAG])

    def may_come(self, text: str) -> bool:
        """Whether more text could make it the tag."""
        if len(text) <= len(self._opening):
            return self._opening.startswith(text)
        rest = text[len(self._opening) :]
        return text.startswith(self._opening) and len(rest) < _LONGEST_TAG and DSML not in rest


def _json_or_text(value: str) -> str:
    try:
        json.loads(value, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _quoted(value)
    return value


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
