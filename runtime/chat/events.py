"""What a parser gives out while an answer streams, and the message that the pieces make up."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from .messages import Message, ToolCall


@dataclass(frozen=True)
class Content:
    """More of the answer."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A call begins. ``index`` counts the calls of an answer from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class Arguments:
    """More of a call's arguments, which are JSON of an object once the call has ended completely."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnd:
    """A call ends. It is not ``complete`` if the text ended or broke off inside it: do not run it."""

    index: int
    complete: bool


Event = Content | Reasoning | CallStart | Arguments | CallEnd


def joined(events: Iterable[Event]) -> Message:
    """The assistant's message that the events make up, with all its calls, also those that are not complete."""
    message = Message("assistant")
    calls: list[ToolCall] = []
    content, reasoning = list[str](), list[str]()
    arguments: dict[int, list[str]] = {}
    for event in events:
        match event:
            case Content(text):
                content.append(text)
            case Reasoning(text):
                reasoning.append(text)
            case CallStart(index, call_id, name):
                calls.append(ToolCall(name, "", call_id))
                arguments[index] = []
            case Arguments(index, text):
                arguments[index].append(text)
            case CallEnd():
                pass
    return dataclasses.replace(
        message,
        content="".join(content),
        reasoning="".join(reasoning),
        tool_calls=tuple(
            dataclasses.replace(call, arguments="".join(arguments[index])) for index, call in enumerate(calls)
        ),
    )
