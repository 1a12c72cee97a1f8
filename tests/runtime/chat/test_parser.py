"""Answers parsed while they stream."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from foldkv.runtime.chat import (
    Arguments,
    CallEnd,
    CallStart,
    Content,
    Event,
    Message,
    Reasoning,
    ToolCall,
    chat_format,
    joined,
)

FORMATS = {name: chat_format(name) for name in ("v4", "v4.1")}
EOS = "<｜end▁of▁sentence｜>"
OPEN, CLOSE = "\n\n<｜DSML｜tool_calls>\n", "\n</｜DSML｜tool_calls>"
CALL, CALLED = '<｜DSML｜invoke name="f">\n', "</｜DSML｜invoke>"
TEXT, DATA, END = (
    '<｜DSML｜parameter name="t" string="true">',
    '<｜DSML｜parameter name="d" string="false">',
    "</｜DSML｜parameter>",
)


def parsed(text: str, cuts: Iterable[int] = (), *, thinking: bool = False, name: str = "v4") -> list[Event]:
    """The events of a text that is cut at these places, neighbours of one kind joined."""
    numbers = itertools.count()
    parser = FORMATS[name].parser(thinking=thinking, new_id=lambda: f"id{next(numbers)}")
    at, events = 0, list[Event]()
    for cut in [*cuts, len(text)]:
        events += parser.feed(text[at:cut])
        at = cut
    events += parser.finish()
    assert parser.finish() == []
    whole: list[Event] = []
    for event in events:
        last = whole[-1] if whole else None
        if isinstance(event, Content) and isinstance(last, Content):
            whole[-1] = Content(last.text + event.text)
        elif isinstance(event, Reasoning) and isinstance(last, Reasoning):
            whole[-1] = Reasoning(last.text + event.text)
        elif isinstance(event, Arguments) and isinstance(last, Arguments) and event.index == last.index:
            whole[-1] = Arguments(event.index, last.text + event.text)
        else:
            whole.append(event)
    return whole


def called(arguments: str, index: int = 0, name: str = "f", complete: bool = True) -> list[Event]:
    given = [Arguments(index, arguments)] if arguments else []
    return [CallStart(index, f"id{index}", name), *given, CallEnd(index, complete)]


CASES: dict[str, tuple[str, bool, list[Event]]] = {
    "nothing": ("", True, []),
    "content": ("Hi <b>there</b>\n\n", False, [Content("Hi <b>there</b>\n\n")]),
    "reasoning, then content": ("Hm</think>Hi" + EOS, True, [Reasoning("Hm"), Content("Hi")]),
    "reasoning only": ("Hm, <thi", True, [Reasoning("Hm, <thi")]),
    "empty reasoning": ("</think>Hi", True, [Content("Hi")]),
    "the end of reasoning, without any": ("Hi</think>", False, [Content("Hi</think>")]),
    "a second end of reasoning": ("a</think>b</think>", True, [Reasoning("a"), Content("b</think>")]),
    "text after the end": (f"a{EOS}b{OPEN}", False, [Content(f"ab{OPEN}")]),
    "a call": (f"{OPEN}{CALL}{TEXT}x{END}\n{DATA}1{END}\n{CALLED}{CLOSE}{EOS}", False, called('{"t": "x", "d": 1}')),
    "no arguments": (f"{OPEN}{CALL}\n{CALLED}{CLOSE}", False, called("{}")),
    "a call after content": (f"Wait.{OPEN}{CALL}\n{CALLED}{CLOSE}", False, [Content("Wait."), *called("{}")]),
    "a call after reasoning": (
        f"Hm</think>Wait.{OPEN}{CALL}\n{CALLED}{CLOSE}", True, [Reasoning("Hm"), Content("Wait."), *called("{}")]
    ),
    "a call ends reasoning": (f"Hm{OPEN}{CALL}\n{CALLED}{CLOSE}x", True, [Reasoning("Hm"), *called("{}"), Content("x")]),
    "two calls": (f"{OPEN}{CALL}\n{CALLED}\n{CALL}\n{CALLED}{CLOSE}", False, [*called("{}"), *called("{}", 1)]),
    "two blocks": (
        f"{OPEN}{CALL}\n{CALLED}{CLOSE}a{OPEN}{CALL}\n{CALLED}{CLOSE}", False, [*called("{}"), Content("a"), *called("{}", 1)]
    ),
    "without blank lines and white space": (f"{OPEN.strip()}{CALL.strip()}{CALLED}{CLOSE.strip()}", False, called("{}")),
    "a text is escaped": (f'{OPEN}{CALL}{TEXT}"\\\n</b>é中{END}\n{CALLED}{CLOSE}', False, called('{"t": "\\"\\\\\\n</b>é中"}')),
    "names with spaces, and none": (
        (f'{OPEN}{CALL}<｜DSML｜parameter name=" string= m " string="false">{{"a":[]}}{END}'
        f'<｜DSML｜parameter name="" string="true">{END}{CALLED}{CLOSE}'),
        False, called('{" string= m ": {"a":[]}, "": ""}'),
    ),
    "a value that is no JSON becomes a text": (f"{OPEN}{CALL}{DATA}1, 2{END}{CALLED}{CLOSE}", False, called('{"d": "1, 2"}')),
    "nor is NaN JSON": (f"{OPEN}{CALL}{DATA}NaN{END}{CALLED}{CLOSE}", False, called('{"d": "NaN"}')),
    "an empty value": (f"{OPEN}{CALL}{DATA}{END}{CALLED}{CLOSE}", False, called('{"d": ""}')),
    "it ends inside a text": (f"{OPEN}{CALL}{TEXT}rm -rf /tm</｜DS", False, called('{"t": "rm -rf /tm</｜DS', complete=False)),
    "it ends inside a value": (f"{OPEN}{CALL}{DATA}[1", False, called('{"d": [1', complete=False)),
    "it ends between values": (f"{OPEN}{CALL}{DATA}1{END}\n", False, called('{"d": 1', complete=False)),
    "it ends inside a tag": (f"{OPEN}{CALL}<｜DSML｜para", False, [*called("", complete=False), Content("\n<｜DSML｜para")]),
    "it ends after a call": (f"{OPEN}{CALL}\n{CALLED}\n", False, called("{}")),
    "only the start of a block": (f"Hi{OPEN}", False, [Content(f"Hi{OPEN}")]),
    "a block without calls": (f"{OPEN}{CLOSE}Hi", False, [Content(f"{OPEN}{CLOSE}Hi")]),
    "text where a call should be": (f"{OPEN}Hi{CALL}", False, [Content(f"{OPEN}Hi{CALL}")]),
    "in reasoning it stays reasoning": (f"a{OPEN}b</think>c", True, [Reasoning(f"a{OPEN}b"), Content("c")]),
    "text where a value should be": (
        f"{OPEN}{CALL}Hi\n{CALLED}{CLOSE}", False, [*called("", complete=False), Content(f"\nHi\n{CALLED}{CLOSE}")]
    ),
    "a value without its type": (
        f'{OPEN}{CALL}<｜DSML｜parameter name="a">1{END}', False,
        [*called("", complete=False), Content(f'\n<｜DSML｜parameter name="a">1{END}')],
    ),
    "a value twice": (
        f"{OPEN}{CALL}{DATA}1{END}{DATA}2{END}", False, [*called('{"d": 1', complete=False), Content(f"{DATA}2{END}")]
    ),
    "a block after a broken call": (
        f"{OPEN}{CALL}oops{OPEN}{CALL}\n{CALLED}{CLOSE}", False,
        [*called("", complete=False), Content("\noops"), *called("{}", 1)],
    ),
    "a name without an end": (
        f'{OPEN}<｜DSML｜invoke name="{"x" * 2000}', False, [Content(f'{OPEN}<｜DSML｜invoke name="{"x" * 2000}')]
    ),
    "tags of another revision": ("\n\n<｜DSML｜ calls>\n", False, [Content("\n\n<｜DSML｜ calls>\n")]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_events(case: str) -> None:
    text, thinking, expected = CASES[case]
    assert parsed(text, thinking=thinking) == expected
    assert parsed(text, range(len(text)), thinking=thinking) == expected


def test_what_cannot_be_markup_is_given_out_at_once() -> None:
    parser = FORMATS["v4"].parser(thinking=True)
    assert parser.feed("Hm") == [Reasoning("Hm")]
    assert parser.feed("</thin") == [] and parser.feed("g") == [Reasoning("</thing")]
    assert parser.feed("</think>Hi\n") == [Content("Hi")]
    assert parser.feed("\n<｜DSML｜tool_") == [] and parser.feed("x") == [Content("\n\n<｜DSML｜tool_x")]
    start, *rest = parser.feed(f"{OPEN}{CALL}{TEXT}a")
    assert isinstance(start, CallStart) and "".join(e.text for e in rest if isinstance(e, Arguments)) == '{"t": "a'
    assert parser.feed("b") == [Arguments(0, "b")]


def test_ids_are_unlike() -> None:
    text = f"{OPEN}{CALL}{CALLED}{CALL}{CALLED}{CLOSE}"
    ids = [e.id for _ in range(2) for e in FORMATS["v4"].parser(thinking=False).feed(text) if isinstance(e, CallStart)]
    assert len(set(ids)) == 4 and all(one.startswith("call_") for one in ids)


PIECES = [
    OPEN, OPEN.strip(), CLOSE, CALL, CALLED, TEXT, DATA, END, "</think>", "<think>", EOS, "\n", "\n\n", " ", '"', '">', "<", "｜",
    "<｜DSML｜", '<｜DSML｜invoke name="', "12", "[1]", "\\",
]  # fmt: skip
MARKED = st.lists(st.sampled_from([*PIECES, None, None]), max_size=24).map(
    lambda parts: "".join(chr(0x4E00 + i) if part is None else part for i, part in enumerate(parts))
)
#: Of these every second one begins as a call, so that the inside of calls is reached.
TEXTS = st.tuples(st.sampled_from(["", OPEN + CALL]), st.one_of(MARKED, st.text(max_size=40))).map("".join)


@settings(max_examples=120, deadline=None)
@given(TEXTS, st.booleans(), st.data())
def test_any_text_in_any_pieces_gives_the_same_events_and_loses_nothing(text: str, thinking: bool, data: Any) -> None:
    whole = parsed(text, thinking=thinking)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    assert parsed(text, cuts, thinking=thinking) == whole
    assert parsed(text, range(len(text)), thinking=thinking) == whole
    shown = "".join(e.name if isinstance(e, CallStart) else e.text for e in whole if not isinstance(e, CallEnd))
    for sign in set(text):
        if "\u4e00" <= sign < "\u5000":  # each was put there once, and nothing escapes it
            assert shown.count(sign) == text.count(sign)
    message = joined(whole)
    for event in whole:
        if isinstance(event, CallEnd) and event.complete:
            assert isinstance(json.loads(message.tool_calls[event.index].arguments), dict)
    ends = [e.index for e in whole if isinstance(e, CallEnd)]
    assert ends == [e.index for e in whole if isinstance(e, CallStart)] == list(range(len(message.tool_calls)))


WORDS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="｜"), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
CALLS = st.builds(
    lambda name, arguments: ToolCall(name, json.dumps(arguments, ensure_ascii=False)),
    st.from_regex(r"[a-zA-Z0-9_.:-]{1,12}", fullmatch=True),
    st.dictionaries(
        st.text(st.characters(exclude_categories=("Cs",), exclude_characters='｜"'), max_size=8), VALUES, max_size=4
    ),
)


@settings(max_examples=80, deadline=None)
@given(WORDS, WORDS, st.lists(CALLS, max_size=3), st.booleans(), st.sampled_from(sorted(FORMATS)))
def test_what_was_written_is_read_and_what_was_read_is_written_again(
    reasoning: str, content: str, calls: Sequence[ToolCall], thinking: bool, name: str
) -> None:
    assume("</think>" not in reasoning)
    question, form = Message("user", "Hi"), FORMATS[name]
    answer = Message("assistant", content, reasoning if thinking else "", tuple(calls))
    prompt = form.encode([question], thinking=thinking)
    text = form.encode([question, answer], thinking=thinking).removeprefix(prompt)
    read = joined(parsed(text, thinking=thinking, name=name))
    assert (read.content, read.reasoning) == (answer.content, answer.reasoning)
    assert [(c.name, c.arguments) for c in read.tool_calls] == [(c.name, c.arguments) for c in calls]
    assert prompt + text == form.encode([question, read], thinking=thinking)


def test_long_answers_take_time_in_proportion_to_their_length() -> None:
    calls = f"{CALL}{TEXT}{'x' * 40}{END}\n{CALLED}\n"

    def seconds(count: int) -> float:
        parser = FORMATS["v4"].parser(thinking=False)
        started = time.process_time()
        parser.feed(OPEN + calls * count)
        return time.process_time() - started

    seconds(10)
    small, large = seconds(300), seconds(3000)
    assert large < 40 * small + 0.1
    deep = "[" * 100_000
    assert parsed(f"{OPEN}{CALL}{DATA}{deep}{END}{CALLED}{CLOSE}") == called('{"d": "' + deep + '"}')
