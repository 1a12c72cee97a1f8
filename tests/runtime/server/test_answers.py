"""Answers from pieces: calls, reasoning and probabilities, whole and in chunks that clients put together again."""

from __future__ import annotations

import dataclasses
import itertools
import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from foldkv.runtime import Completion, Tokenizer
from foldkv.runtime.chat import chat_format
from foldkv.runtime.completion import Usage
from foldkv.runtime.sampling import TokenLogprob
from foldkv.runtime.server.answers import Answer
from foldkv.runtime.server.requests import Job
from foldkv.runtime.serving.request import Request

CALLS = (
    "I add.</think>Wait.\n\n<｜DSML｜tool_calls>\n"
    '<｜DSML｜invoke name="add">\n<｜DSML｜parameter name="a" string="false">2</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    '<｜DSML｜invoke name="say">\n<｜DSML｜parameter name="text" string="true">"two"\n</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    "</｜DSML｜tool_calls>"
)


class Served:
    """What answers tell of a server. It has no engine, because the pieces of these tests are given."""

    name, fingerprint = "tiny", "fp_test"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer


@pytest.fixture(scope="module")
def served(tiny_bundle: Path) -> Any:
    return Served(Tokenizer(tiny_bundle / "tokenizer.json"))


def job(*, stream: bool, logprobs: bool = False) -> Job:
    chat = chat_format("v4-0731")
    return Job(
        "chatcmpl-1", (Request([1]),), [[1]], 1, stream, True, logprobs, lambda: chat.parser(thinking=True, new_id=iter("ab").__next__)
    )  # fmt: skip


def pieces(texts: Sequence[str], reason: Any = "stop") -> list[Completion]:
    """A piece for each text, with its bytes as tokens."""
    given = [(text, tuple(text.encode())) for text in texts]
    rows = [Completion(0, text, ids, logprobs=tuple(TokenLogprob(one, -0.5) for one in ids)) for text, ids in given]
    count = sum(len(ids) for _, ids in given)
    return [*rows, Completion(0, "", (), reason, usage=Usage(9, 4, count))]


def whole(served: Any, given: list[Completion], **options: Any) -> ChatCompletion:
    answer = Answer(job(stream=False, **options), served)
    for piece in given:
        answer.feed(0, piece)
    return ChatCompletion.model_validate_json(json.dumps(answer.whole()))


@settings(max_examples=5, deadline=None)
@given(cuts=st.lists(st.integers(0, len(CALLS)), max_size=12))
def test_chunks_of_any_cut_are_together_the_whole_answer(served: Any, cuts: list[int]) -> None:
    edges = sorted({0, *cuts, len(CALLS)})
    given = pieces([CALLS[a:b] for a, b in itertools.pairwise(edges)])
    answer, state, reasoning = Answer(job(stream=True, logprobs=True), served), ChatCompletionStreamState(), ""
    logprobs = 0
    for chunk in [*(chunk for piece in given for chunk in answer.feed(0, piece)), answer.last_chunk()]:
        state.handle_chunk(ChatCompletionChunk.model_validate_json(json.dumps(chunk)))
        for choice in chunk["choices"]:
            reasoning += choice["delta"].get("reasoning_content") or ""
            logprobs += len((choice["logprobs"] or {"content": []})["content"])
    joined, expected = state.get_final_completion(), whole(served, pieces([CALLS]), logprobs=True)
    message, other = joined.choices[0].message, expected.choices[0].message
    assert reasoning == other.reasoning_content == "I add."  # type: ignore[attr-defined]
    assert message.content == other.content == "Wait."
    assert message.tool_calls is not None and other.tool_calls is not None
    calls = [(call.id, call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls]
    assert calls == [("a", "add", {"a": 2}), ("b", "say", {"text": '"two"\n'})]
    assert [call.id for call in other.tool_calls] == ["a", "b"]
    assert joined.choices[0].finish_reason == expected.choices[0].finish_reason == "tool_calls"
    assert joined.usage == expected.usage and joined.usage is not None
    assert joined.usage.prompt_tokens_details is not None and joined.usage.prompt_tokens_details.cached_tokens == 4
    assert logprobs == len(CALLS.encode())


def test_a_call_that_breaks_off_is_no_reason_to_run_tools(served: Any) -> None:
    for end in (CALLS.index("2<"), CALLS.index("two")):
        choice = whole(served, pieces([CALLS[:end]], "length")).choices[0]
        assert choice.finish_reason == "length" and choice.message.tool_calls
        with pytest.raises(ValueError):
            json.loads(choice.message.tool_calls[-1].function.arguments)  # type: ignore[union-attr]
        assert whole(served, pieces([CALLS[:end]], "stop")).choices[0].finish_reason == "stop"


def test_nothing_of_a_stream_is_kept(served: Any) -> None:
    """However long it is."""
    rows = (TokenLogprob(65, -0.5, tuple((token, -1.0) for token in range(66, 74))),)
    text = dataclasses.replace(job(stream=True, logprobs=True), parser=None)
    for one in (job(stream=True, logprobs=True), text):
        answer, told, chunks = Answer(one, served), list[int](), 0
        tracemalloc.start()
        for number in range(1500):
            piece = Completion(0, "A", (65,), logprobs=rows)
            chunks += sum(
                choice["logprobs"] is not None for chunk in answer.feed(0, piece) for choice in chunk["choices"]
            )
            if number % 500 == 499:
                told.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert chunks == 1500 and told[2] - told[0] < 20_000


def test_half_characters_have_their_bytes_and_what_cannot_come_has_a_number(served: Any) -> None:
    """These are the bytes of é. Clients put them together, which no text of either could do."""
    row = TokenLogprob(195, -0.1, ((195, -0.1), (169, -0.5), (65, float("-inf"))))
    given = [Completion(0, "", (195,), logprobs=(row,)), *pieces([], "length")]
    told = whole(served, given, logprobs=True).choices[0].logprobs
    assert told is not None and told.content is not None
    top = [(one.token, one.bytes, one.logprob) for one in told.content[0].top_logprobs]
    assert top == [("\\xc3", [195], -0.1), ("\\xa9", [169], -0.5), ("A", [65], -9999.0)]
    assert (told.content[0].token, told.content[0].bytes) == ("\\xc3", [195])
    text = Answer(dataclasses.replace(job(stream=False, logprobs=True), parser=None), served)
    for piece in given:
        text.feed(0, piece)
    (rows,) = [choice["logprobs"] for choice in text.whole()["choices"]]
    assert rows["tokens"] == ["bytes:\\xc3"]
    assert rows["top_logprobs"] == [{"bytes:\\xc3": -0.1, "bytes:\\xa9": -0.5, "A": -9999.0}]
