"""Bodies: what is refused is refused quickly, in few words, and with the place."""

from __future__ import annotations

import gc
import json
import time
from typing import Any

import pytest

from foldkv.runtime.server.bodies import Body, ChatBody, CompletionBody, read_body
from foldkv.runtime.server.problems import Problem

MANY = 200_000
UNKNOWN = {f"max_token{i}": 0 for i in range(MANY // 4)}
USER = [{"role": "user", "content": "Hi"}]


def refused(kind: type[Body], table: dict[str, Any]) -> Problem:
    with pytest.raises(Problem) as caught:
        read_body(kind, json.dumps(table).encode())
    return caught.value


@pytest.mark.parametrize(
    ("kind", "table", "param", "says"),
    [
        (ChatBody, {"messages": [0] * MANY}, "messages[0]", "messages[0] is 0; expected"),
        (ChatBody, {"messages": [{}] * MANY}, "messages", f"messages has {MANY} items; expected at most 16384."),
        (ChatBody, {"messages": USER, "tools": [0] * MANY}, "tools[0]", "tools[0] is 0"),
        (ChatBody, {"messages": USER, "modalities": ["x"] * MANY}, "modalities[0]", "modalities[0] is 'x'"),
        (CompletionBody, {"prompt": "x", "stop_token_ids": [-1] * MANY}, "stop_token_ids[0]", "stop_token_ids[0] is -1"),
        (CompletionBody, {"prompt": "x", "structured_outputs": {"choice": [1] * MANY}}, "structured_outputs.choice[0]", "is 1"),
        (ChatBody, UNKNOWN, "max_token0", "max_token4 is not a field that this server knows (did you mean 'max_tokens'?). And more."),
        (ChatBody, {"messages": USER, "stream_options": UNKNOWN}, "stream_options.max_token0", "And more."),
        (ChatBody, {"messages": USER, "tool_choice": UNKNOWN}, "tool_choice", "tool_choice is {'max_token0': 0"),
        (ChatBody, {"x" * MANY: 0}, None, "is not a field that this server knows"),
    ],
)  # fmt: skip
def test_bodies_of_many_mistakes_are_refused_for_the_first_ones(
    kind: type[Body], table: dict[str, Any], param: str | None, says: str, request: pytest.FixtureRequest
) -> None:
    """Each took seconds, because all mistakes were listed."""
    request.addfinalizer(gc.enable)
    gc.disable()  # after many tests a collection takes longer than this
    data, began = json.dumps(table).encode(), time.thread_time()
    with pytest.raises(Problem) as caught:
        read_body(kind, data)
    assert time.thread_time() - began < 1
    problem = caught.value
    assert problem.status == 400 and says in problem.message and len(problem.message) < 700
    assert problem.param == param or (param is None and "x" * 100 in str(problem.param)[:200])


def test_the_first_of_several_mistakes_are_all_told() -> None:
    table = {"messages": 5, "n": 0, "top_p": 7, "seed": "x", "stream": 1, "user": 5, "model": 3}
    problem = refused(ChatBody, table)
    assert problem.message.count("; expected ") == 5 and problem.message.endswith(" And more.")
    assert problem.code == "invalid_value" and problem.param == "model"
    two = refused(ChatBody, {"messages": 5, "n": 0})
    assert "messages is 5" in two.message and "n is 0" in two.message and "more" not in two.message


def test_fields_that_are_not_known_come_before_what_is_wrong_with_others() -> None:
    problem = refused(CompletionBody, {"prompt": 5, "colour": 1})
    assert problem.message == "colour is not a field that this server knows." and problem.code == "unknown_parameter"
