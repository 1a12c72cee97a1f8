"""Messages to the text of DeepSeek-V4, in any of its revisions.

There are no line breaks between turns. A user's turn is ``<｜User｜>text``, and ``<｜Assistant｜>`` with ``<think>`` or ``</think>``
asks for an answer, which ends with the end of sequence. A system message has no token of its own before V4.1. What tools answered
stands in a user's turn.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import InputError
from .messages import Message, Tool, ToolCall, wrong
from .prompt import Prompt, Writer
from .revisions import (
    AFTER_SCHEMAS,
    ASSISTANT,
    BOS,
    EOS,
    MARKS,
    REMINDER,
    RESPONSE_FORMAT,
    TASK_MARKS,
    THINK,
    THOUGHT,
    USER,
    Revision,
)


@dataclass(frozen=True)
class _Block:
    """A part of a user's turn: text, or what a tool answered."""

    text: str
    result: bool = False
    call_id: str = ""


@dataclass
class _Turn:
    """A message as it is written: those of users and tools that follow each other are one turn of the role user."""

    message: Message
    where: str
    blocks: list[_Block] = field(default_factory=list)

    @property
    def role(self) -> str:
        return self.message.role


def write_prompt(
    revision: Revision,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] = (),
    thinking: bool = True,
    effort: str | int | None = None,
    add_generation_prompt: bool = True,
    drop_reasoning: bool = True,
) -> Prompt:
    """The prompt of a conversation; see :class:`~foldkv.runtime.chat.formats.ChatFormat` for the arguments.

    Raises:
        InputError: the revision cannot write a message, or does not have the effort.
    """
    effort_text = revision.effort_text(effort)
    turns = _sorted_by_calls(_turns(_with_tools(messages, tools)))
    drop = thinking and drop_reasoning and not any(turn.message.tools for turn in turns)
    if drop:
        # Instructions of developers go with the reasoning: they are about the answer that followed them.
        last = _last_asking(revision, turns)
        turns = [turn for i, turn in enumerate(turns) if i >= last or turn.role != "developer"]
    writer = Writer(MARKS)
    writer.own(BOS)
    scribe = _Scribe(revision, writer, turns, thinking=thinking, drop=drop)
    for i in range(len(turns)):
        scribe.before(i, effort_text if thinking else "")
        scribe.turn(i)
        if i + 1 < len(turns) or add_generation_prompt:
            scribe.after(i)
    return writer.prompt()


def _with_tools(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """Tools of a whole request belong to the system or developer message at the start, or to an empty one."""
    first = messages[0]
    if not tools:
        return list(messages)
    if first.role not in ("system", "developer"):
        return [Message("system", tools=tuple(tools)), *messages]
    if first.tools:
        raise InputError("tools are given, and messages[0].tools too; expected one of them.")
    return [dataclasses.replace(first, tools=tuple(tools)), *messages[1:]]


def _turns(messages: Sequence[Message]) -> list[_Turn]:
    turns: list[_Turn] = []
    for i, message in enumerate(messages):
        where, last = f"messages[{i}]", turns[-1] if turns else None
        if message.role not in ("user", "tool"):
            turns.append(_Turn(message, where))
            continue
        result = message.role == "tool"
        block = _Block(message.content, result, message.tool_call_id)
        if last is None or last.role != "user" or (last.message.task is not None and not result):
            turns.append(_Turn(dataclasses.replace(message, role="user"), where, [block]))
        elif message.task is not None:
            raise wrong(
                f"{where}.task", message.task, "no task after another message of a user or a tool",
                "Both are one turn, which would lose it: put them into one message.",
            )  # fmt: skip
        else:
            last.blocks.append(block)
    return turns


def _sorted_by_calls(turns: list[_Turn]) -> list[_Turn]:
    """Answers of tools in the order of their calls; texts between them stay where they are."""
    order: dict[str, int] = {}
    for turn in turns:
        if turn.message.tool_calls:
            order = {call.id: i for i, call in enumerate(turn.message.tool_calls) if call.id}
        results = [block for block in turn.blocks if block.result]
        if len(results) > 1 and order:
            in_order = iter(sorted(results, key=lambda block: order.get(block.call_id, 0)))
            turn.blocks = [next(in_order) if block.result else block for block in turn.blocks]
    return turns


def _asks(revision: Revision, turn: _Turn, index: int) -> bool:
    """Whether an answer follows the turn."""
    return turn.role in ("user", "developer") or (revision.later_system_asks and turn.role == "system" and index > 0)


def _last_asking(revision: Revision, turns: Sequence[_Turn]) -> int:
    return max((i for i, turn in enumerate(turns) if _asks(revision, turn, i)), default=-1)


class _Scribe:
    """Writes the turns of one conversation."""

    def __init__(
        self, revision: Revision, writer: Writer, turns: Sequence[_Turn], *, thinking: bool, drop: bool
    ) -> None:
        self._revision, self._writer, self._turns = revision, writer, turns
        self._thinking, self._drop = thinking, drop
        self._last = _last_asking(revision, turns)

    def before(self, i: int, effort: str) -> None:
        """The text of the effort stands before the first turn, whatever that is."""
        if self._turns[i].role == "system" or (i == 0 and effort):
            self._writer.own(self._revision.system)
        if i == 0:
            self._writer.own(effort)

    def turn(self, i: int) -> None:
        """The turn itself."""
        turn, writer = self._turns[i], self._writer
        message = turn.message
        if turn.role == "assistant":
            self._answer(i, message, turn.where)
        elif turn.role == "user":
            writer.own(USER)
            for number, block in enumerate(turn.blocks):
                writer.own("\n\n" if number else "")
                writer.own("<tool_result>" if block.result else "")
                writer.given(block.text)
                writer.own("</tool_result>" if block.result else "")
        else:
            writer.own({"developer": USER, "latest_reminder": REMINDER}.get(turn.role, ""))
            writer.given(message.content)
            self._instructions(message)

    def after(self, i: int) -> None:
        """What asks for the answer, if an answer, a reminder or nothing follows."""
        turn = self._turns[i]
        if i + 1 < len(self._turns) and self._turns[i + 1].role not in ("assistant", "latest_reminder"):
            return
        task = turn.message.task
        if task is not None and task != "action":
            self._writer.own(TASK_MARKS[task])
        elif task is not None or _asks(self._revision, turn, i):
            # Earlier answers are read without the reasoning that was dropped, so they begin where it ended.
            thinks = self._thinking and (task is not None or not self._drop or i >= self._last)
            self._writer.own(ASSISTANT + (THINK if thinks else THOUGHT) + TASK_MARKS.get(task or "", ""))

    def _instructions(self, message: Message) -> None:
        writer = self._writer
        if message.tools:
            writer.own("\n\n" + self._revision.tools)
            for number, tool in enumerate(message.tools):
                writer.own("\n" if number else "")
                writer.given(_json(tool.function))
            writer.own(AFTER_SCHEMAS)
        if message.response_format:
            writer.own("\n\n" + RESPONSE_FORMAT)
            writer.given(_json(message.response_format))

    def _answer(self, i: int, message: Message, where: str) -> None:
        writer = self._writer
        answers_task = i > 0 and self._turns[i - 1].message.task is not None
        if self._thinking and not answers_task and (not self._drop or i > self._last):
            writer.given(message.reasoning)
            writer.own(THOUGHT)
        writer.given(message.content)
        if message.tool_calls:
            writer.own(f"\n\n<{self._revision.block}>\n")
            for number, call in enumerate(message.tool_calls):
                writer.own("\n" if number else "")
                self._call(call, f"{where}.tool_calls[{number}].function.arguments")
            writer.own(f"\n</{self._revision.block}>")
        writer.own("" if message.unfinished else EOS)

    def _call(self, call: ToolCall, where: str) -> None:
        writer, revision = self._writer, self._revision
        writer.own(f'<{revision.invoke} name="')
        writer.given(call.name)
        writer.own('">\n')
        for number, (key, value) in enumerate(_arguments(revision, call, where).items()):
            is_text = isinstance(value, str)
            writer.own(("\n" if number else "") + f'<{revision.parameter} name="')
            writer.given(key)
            writer.own(f'" string="{"true" if is_text else "false"}">')
            writer.given(value if is_text else _json(value))
            writer.own(f"</{revision.parameter}>")
        writer.own(f"\n</{revision.invoke}>")


def _arguments(revision: Revision, call: ToolCall, where: str) -> dict[str, Any]:
    try:
        arguments = json.loads(call.arguments)
    except (ValueError, RecursionError):
        if revision.lone_argument:
            return {"arguments": call.arguments}
        raise wrong(where, call.arguments, "JSON of an object") from None
    if not isinstance(arguments, dict):
        raise wrong(where, call.arguments, "JSON of an object")
    return arguments


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
