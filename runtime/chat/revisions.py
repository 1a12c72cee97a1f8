"""DeepSeek's encoding, and what differs between the revisions that its checkpoints come with.

Sources: ``encoding/encoding_dsv4.py`` of V4-Pro and its published cases; for ``v4-0731`` and ``v4.1`` public ports of the files in
V4-Flash-0731 and V4.1-Flash. All texts are data of the encoding: a model was trained on exactly these bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import InputError
from ...export.contract.chat import V4, V4_0731, V41
from .messages import TASKS, wrong

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
SYSTEM, USER, ASSISTANT, REMINDER = "<｜System｜>", "<｜User｜>", "<｜Assistant｜>", "<｜latest_reminder｜>"
THINK, THOUGHT = "<think>", "</think>"
DSML = "｜DSML｜"
TASK_MARKS = {task: f"<｜{task}｜>" for task in TASKS}
#: What the tokenizers have as one token each.
MARKS = frozenset([BOS, EOS, SYSTEM, USER, ASSISTANT, REMINDER, THINK, THOUGHT, DSML, *TASK_MARKS.values()])

_THOROUGH = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, "
    "rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, "
    "and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)
_RELENTLESS = (
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the "
    "problem into its most fundamental components, trace every causal chain to its root, and resolve the underlying cause "
    "rather than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple angles and are certain that no "
    "assumption remains unchecked and no error remains undiscovered.\n\n"
)
_TOOLS = """## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a "<{block}>" block like the following:

<{block}>
<{invoke} name="$TOOL_NAME">
<{parameter} name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{parameter}>
...
</{invoke}>
<{invoke} name="$TOOL_NAME2">
...
</{invoke}>
</{block}>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, objects), \
pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside <think>...</think> BEFORE any \
tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

"""
AFTER_SCHEMAS = """

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""
RESPONSE_FORMAT = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"


@dataclass(frozen=True)
class Revision:
    """One revision of the encoding.

    Attributes:
        name: as ``chat.json`` has it.
        efforts: the text that a level of reasoning effort puts before the first message, in thinking mode.
        default_effort: the level where none is given.
        numbers: that text for a level from 1 to 100, with {} for the number; "" where levels have names only.
        block, invoke, parameter: the tags of calls, with the token that they begin with.
        system: the token before a system message, and before the text of an effort; "" for none.
        later_system_asks: whether a system message after the first is answered, as a user's is.
        lone_argument: whether arguments that are not JSON are written as one parameter "arguments", not refused.
    """

    name: str
    efforts: Mapping[str, str]
    default_effort: str
    numbers: str = ""
    block: str = f"{DSML}tool_calls"
    invoke: str = f"{DSML}invoke"
    parameter: str = f"{DSML}parameter"
    system: str = ""
    later_system_asks: bool = False
    lone_argument: bool = True

    @property
    def tools(self) -> str:
        """What stands before the schemas of tools."""
        return _TOOLS.format(block=self.block, invoke=self.invoke, parameter=self.parameter)

    def effort_text(self, effort: str | int | None) -> str:
        """What an effort puts before the first message.

        Raises:
            InputError: this revision does not have it.
        """
        named = self.default_effort if effort is None else effort
        if isinstance(named, str) and named in self.efforts:
            return self.efforts[named]
        if self.numbers and type(named) is int and 1 <= named <= 100:
            return self.numbers.format(named)
        raise self._unknown(named)

    def _unknown(self, effort: object) -> InputError:
        levels = ", ".join(map(repr, self.efforts)) + (", or a number from 1 to 100" if self.numbers else "")
        return wrong("effort", effort, f"{levels}", f"These are the levels of the encoding {self.name}.")


_NUMBERS = "Reasoning Effort: {} (range 1-100, the higher the value, the more thorough the reasoning)\n\n"
_LEVELS = {"low": 25, "high": 50, "xhigh": 75, "max": 100}
REVISIONS = {
    one.name: one
    for one in (
        Revision(V4, {"high": "", "max": _THOROUGH}, "high"),
        Revision(V4_0731, {"low": "", "high": _THOROUGH, "max": _RELENTLESS}, "low"),
        Revision(
            V41,
            {name: _NUMBERS.format(number) for name, number in _LEVELS.items()},
            "high",
            numbers=_NUMBERS,
            block=f"{DSML} calls",
            invoke=f"{DSML} invoke",
            parameter=f"{DSML} parameter",
            system=SYSTEM,
            later_system_asks=True,
            lone_argument=False,
        ),
    )
}
