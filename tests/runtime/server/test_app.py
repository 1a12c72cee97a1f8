"""The server over a real model, asked by OpenAI's own client, by curl and by sockets."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest
from bad_requests import BAD
from prometheus_client.parser import text_string_to_metric_families
from served import CONTEXT, Running, answering, http, serving

from foldkv.export.contract.chat import ChatFile
from foldkv.runtime import Model, Tokenizer, plan_bytes
from foldkv.runtime.chat import ChatFormat
from foldkv.runtime.server import app
from foldkv.runtime.server.app import Limits
from foldkv.runtime.server.bodies import CompletionBody, read_body
from foldkv.runtime.server.generations import Generations
from foldkv.runtime.server.keys import Keys
from foldkv.runtime.server.requests import completion_job
from foldkv.runtime.serving.request import Request

TEXT = "def scale(values, factor):\n    return"
ASKED: Any = {"model": "tiny", "prompt": TEXT, "max_tokens": 16, "temperature": 0}
TALK: Any = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12, "temperature": 0}


def metrics(running: Running) -> dict[tuple[str, str], float]:
    """Samples by name and the value of the label that matters."""
    text = http().get(f"{running.url}/metrics").text
    label = lambda sample: "".join(v for k, v in sorted(sample.labels.items()) if k != "model_name")
    return {
        (sample.name, label(sample)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def until(true: Callable[[], bool], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def idle(running: Running) -> bool:
    stats = running.service.engine.stats()
    return (
        until(lambda: not running.application.running and not running.service.engine.stats().running, 10)
        and stats is not None
    )


# What clients ask


def test_a_completion_is_the_text_of_the_engine_and_a_stream_of_it_is_the_same(running: Running) -> None:
    client, service = running.client(), running.service
    answer = client.completions.create(**ASKED)
    (expected,) = service.engine.complete(Request(TEXT, max_new_tokens=16))
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert answer.object == "text_completion" and answer.model == "tiny" and answer.id.startswith("cmpl-")
    assert answer.system_fingerprint == f"fp_{service.engine.model.bundle.digest[:12]}"
    assert answer.usage is not None and answer.usage.prompt_tokens == len(TEXT)
    assert answer.usage.completion_tokens == len(expected.token_ids)
    chunks = list(client.completions.create(**ASKED, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == choice.text
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + [choice.finish_reason]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == answer.usage.total_tokens
    assert len({chunk.id for chunk in chunks}) == 1 and len(chunks) > 4


def test_chat_reads_messages_as_the_encoding_has_it_and_streams_what_it_answers_whole(running: Running) -> None:
    client, service = running.client(), running.service
    for thinking in (True, False):
        more: Any = {"extra_body": {"chat_template_kwargs": {"thinking": thinking}}}
        answer = client.chat.completions.create(**TALK, **more)
        message: Any = answer.choices[0].message
        assert service.chat is not None and answer.usage is not None
        prompt = service.chat.prompt(TALK["messages"], thinking=thinking)
        assert answer.usage.prompt_tokens == len(prompt.token_ids(service.tokenizer))
        said = message.reasoning_content if thinking else message.content
        assert said and not (message.content if thinking else getattr(message, "reasoning_content", None))
        chunks: list[Any] = list(client.chat.completions.create(**TALK, **more, stream=True))
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert deltas[0].role == "assistant"
        name = "reasoning_content" if thinking else "content"
        assert "".join(getattr(delta, name, None) or "" for delta in deltas) == said
        assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason == "length"


def test_several_prompts_and_answers_are_choices_in_order(running: Running) -> None:
    client = running.client()
    ids = list(b"import os\n")
    asked: Any = {**ASKED, "max_tokens": 6}
    alone = [client.completions.create(**{**asked, "prompt": one}).choices[0].text for one in (TEXT, ids)]
    both = client.completions.create(**{**asked, "prompt": [list(TEXT.encode()), ids], "n": 2})
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in both.choices] == [alone[0], alone[0], alone[1], alone[1]]
    assert both.usage is not None and both.usage.prompt_tokens == len(TEXT) + len(ids)
    assert both.usage.completion_tokens == 4 * 6
    streamed: dict[int, str] = {}
    for chunk in client.completions.create(**{**asked, "prompt": [TEXT, "import os\n"]}, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + choice.text
    assert streamed == dict(enumerate(alone))


def test_a_seed_repeats_an_answer_and_answers_without_one_differ(running: Running) -> None:
    client = running.client()
    drawn: Any = {**ASKED, "max_tokens": 8, "temperature": 1.5, "n": 2}
    texts = [[c.text for c in client.completions.create(**drawn, seed=seed).choices] for seed in (-7, -7, 8)]
    assert texts[0] == texts[1] != texts[2] and texts[0][0] != texts[0][1]
    assert client.completions.create(**drawn).choices[0].text != client.completions.create(**drawn).choices[0].text


def test_stop_strings_penalties_and_bias_do_what_they_say(running: Running) -> None:
    client = running.client()
    text = client.completions.create(**ASKED).choices[0].text
    mark = text[6:9]
    stopped: Any = client.completions.create(**ASKED, stop=[mark, "\0"]).choices[0]
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == (text[: text.index(mark)], "stop", mark)
    token = ord(text[0])
    biased = client.completions.create(**ASKED, logit_bias={str(token): -100}).choices[0].text
    assert text[0] not in biased and biased
    ended: Any = client.completions.create(**ASKED, extra_body={"stop_token_ids": [ord(text[3])]}).choices[0]
    assert ended.text == text[: text.index(text[3])] and ended.stop_reason == ord(text[3])
    few = client.completions.create(**ASKED, extra_body={"repetition_penalty": 5.0}).choices[0].text
    assert len(set(few)) > len(set(text))


def test_probabilities_have_openais_shapes(running: Running) -> None:
    client = running.client()
    found = client.completions.create(**ASKED, logprobs=3).choices[0]
    rows = found.logprobs
    assert rows is not None and rows.tokens and rows.token_logprobs and rows.top_logprobs and rows.text_offset
    assert "".join(rows.tokens) == found.text and rows.text_offset == list(range(len(rows.tokens)))
    for token, logprob, top in zip(rows.tokens, rows.token_logprobs, rows.top_logprobs, strict=True):
        assert logprob is not None and logprob <= 0 and max(top, key=lambda one: top[one]) == token and len(top) == 3
        assert top[token] == logprob
    chat = client.chat.completions.create(**TALK, logprobs=True, top_logprobs=2)
    told = chat.choices[0].logprobs
    assert told is not None and told.content is not None and chat.usage is not None
    assert len(told.content) == chat.usage.completion_tokens
    assert all(one.top_logprobs[0].logprob == one.logprob and len(one.top_logprobs) == 2 for one in told.content)
    assert bytes(byte for one in told.content for byte in one.bytes or []).decode() == "".join(
        t.token for t in told.content
    )
    chunks = list(client.chat.completions.create(**TALK, logprobs=True, top_logprobs=2, stream=True))
    parts = [one for c in chunks if c.choices[0].logprobs for one in c.choices[0].logprobs.content or []]
    assert [(one.token, one.logprob) for one in parts] == [(one.token, one.logprob) for one in told.content]


def test_what_prompts_have_in_common_is_fed_once_and_counted(running: Running) -> None:
    before, talk = metrics(running), "Once more: " + "it was said before. " * 20
    first, second = (
        running.client().completions.create(model="tiny", prompt=talk + end, max_tokens=2).usage for end in ("a", "b")
    )
    assert first is not None and second is not None and second.prompt_tokens_details is not None
    assert first.prompt_tokens_details is not None and first.prompt_tokens_details.cached_tokens == 0
    cached = second.prompt_tokens_details.cached_tokens
    assert cached and cached <= len(talk) and cached % 128 == 0
    grown = {key: value - before.get(key, 0) for key, value in metrics(running).items()}
    assert grown["foldkv:prefix_cache_hits_total", ""] == cached
    assert grown["foldkv:prefix_cache_queries_total", ""] == 2 * len(talk) + 2
    assert metrics(running)["foldkv:snapshot_bytes", ""] > 0
    lookups = {name: grown["foldkv:prefix_cache_lookups_total", name] for name in ("exact_hit", "hit", "miss")}
    assert lookups == {"exact_hit": 1, "hit": 0, "miss": 1} and grown["foldkv:snapshot_entries", ""] > 0
    for name in ("evictions", "disk_evictions", "damaged", "unwritten"):
        assert grown[f"foldkv:snapshot_{name}_total", ""] == 0


def test_what_clients_send_and_nothing_here_depends_on_is_taken(running: Running) -> None:
    client = running.client()
    plain = client.chat.completions.create(**TALK).choices[0].message
    refused: Any = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
    more: Any = {
        "metadata": {"run": "7"},
        "store": True,
        "prompt_cache_retention": "24h",
        "user": "me",
        "safety_identifier": "x",
    }
    assert client.chat.completions.create(**TALK, **more).choices[0].message == plain
    talk = [*TALK["messages"], refused, *TALK["messages"]]
    assert client.chat.completions.create(**{**TALK, "messages": talk}).usage is not None
    both = client.completions.create(**ASKED, n=2, best_of=2).choices
    # As OpenAI has it, 0 leaves the most probable token alone.
    only = client.completions.create(**{**ASKED, "temperature": 1.9, "top_p": 0, "seed": 1}).choices[0].text
    assert [choice.text for choice in both] == [only, only]


@pytest.mark.parametrize("exact", [True, False])
def test_a_conversation_goes_on_where_it_ended_if_the_server_was_told_so(model: Model, exact: bool) -> None:
    """It is shorter than a chunk, so no state of it is exact."""
    plain: Any = {**TALK, "extra_body": {"chat_template_kwargs": {"thinking": False}}}
    with serving(model, prefixes=64 << 20, exact=exact) as service, answering(service) as running:
        first = running.client().chat.completions.create(**plain)
        said, more = first.choices[0].message.content, {"role": "user", "content": "And?"}
        talk = [*TALK["messages"], {"role": "assistant", "content": said}, more]
        second = running.client().chat.completions.create(**{**plain, "messages": talk})
        assert first.usage is not None and second.usage is not None and second.usage.prompt_tokens_details is not None
        # The last token of an answer is never fed.
        kept = 0 if exact else first.usage.total_tokens - 1
        assert second.usage.prompt_tokens_details.cached_tokens == kept
        assert second.usage.prompt_tokens > first.usage.total_tokens


def test_models_and_what_the_server_is(running: Running) -> None:
    (model,) = running.client().models.list().data
    assert model.id == "tiny" and running.client().models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="not here"):
        running.client().models.retrieve("other")
    for path, facts in (("health", {"status": "ok"}), ("ready", {"ready": True, "reasons": []})):
        answer = http().get(f"{running.url}/{path}")
        assert (answer.status_code, answer.json()) == (200, facts)


def test_curl_gets_a_stream_that_ends_with_done(running: Running) -> None:
    body = json.dumps({**ASKED, "stream": True})
    command = ["curl", "-sNi", f"{running.url}/v1/completions", "-H", "content-type: application/json", "-d", body]
    out = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    head, _, events = out.replace("\r\n", "\n").partition("\n\n")
    assert (
        head.startswith("HTTP/1.1 200") and "content-type: text/event-stream" in head and "x-request-id: req-" in head
    )
    rows = events.strip().split("\n\n")
    assert rows[-1] == "data: [DONE]" and all(row.startswith("data: ") for row in rows)
    assert json.loads(rows[0].removeprefix("data: "))["object"] == "text_completion"


def test_more_prompts_than_the_queue_is_long_are_answered_one_after_the_other(model: Model) -> None:
    with serving(model, slots=1, max_queue=1) as service, answering(service) as running:
        asked: Any = {**ASKED, "prompt": [f"x = {number}" for number in range(6)], "max_tokens": 2}
        answer = running.client().completions.create(**asked)
        assert [choice.index for choice in answer.choices] == list(range(6)) and all(c.text for c in answer.choices)


# What clients should not do


def test_every_bad_request_is_an_error_of_openais_shape_and_the_server_goes_on(running: Running) -> None:
    assert len(BAD) >= 80
    wrong = []
    for case in BAD:
        answer = http().request(case.method, running.url + case.path, content=case.content, headers=case.headers)
        try:
            error = answer.json()["error"]
            fine = set(error) == {"message", "type", "param", "code"} and len(error["message"]) > 10
            fine = fine and "Traceback" not in answer.text and ".py" not in answer.text
            fine = fine and answer.status_code == case.status and case.says in json.dumps(error)
        except (ValueError, KeyError, TypeError):
            fine = False
        if not fine:
            wrong.append(f"{str(case)[:200]}: {answer.status_code} {answer.text[:300]}")
    assert not wrong, "\n".join(wrong)
    assert running.client().completions.create(**ASKED).choices[0].text
    assert idle(running)


def test_bodies_that_are_too_long_are_refused(running: Running) -> None:
    long = json.dumps({**ASKED, "prompt": "x" * (70 << 10)}).encode()
    for content in (long, iter([long[:1000], long[1000:]])):  # with its length in the head, and in parts without
        answer = http().post(
            f"{running.url}/v1/completions", content=content, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_long"


def test_who_leaves_is_no_longer_answered(running: Running) -> None:
    host, port = running.url.removeprefix("http://").split(":")
    before = metrics(running)
    for stream in (True, False):
        body = json.dumps({**ASKED, "max_tokens": 450, "stream": stream, "n": 2}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        with closing(socket.create_connection((host, int(port)))) as connection:
            connection.sendall(head.encode() + body)
            assert until(lambda: running.service.engine.stats().running > 0)
            if stream:
                connection.recv(10)
        assert idle(running)
    grown = lambda *key: metrics(running).get(key, 0) - before.get(key, 0)
    assert grown("foldkv:request_success_total", "cancelled") == 4
    assert until(lambda: grown("foldkv:http_requests_total", "/v1/completions499") == 1), (
        "who waited for the whole answer"
    )


def test_metrics_count_what_was_answered(running: Running) -> None:
    before = metrics(running)
    answer = running.client().completions.create(**{**ASKED, "n": 2})
    list(running.client().completions.create(**ASKED, stream=True))
    after = metrics(running)  # at once: what a client has was counted before
    grown = {key: after[key] - before.get(key, 0) for key in after}
    assert answer.usage is not None
    assert grown["foldkv:prompt_tokens_total", ""] == 2 * len(TEXT)
    assert grown["foldkv:generation_tokens_total", ""] == 3 * 16
    assert grown["foldkv:request_success_total", "length"] == 3
    assert grown["foldkv:time_to_first_token_seconds_count", ""] == 3
    assert grown["foldkv:inter_token_latency_seconds_count", ""] == 3 * 15
    assert grown["foldkv:e2e_request_latency_seconds_count", ""] == 3
    # A prompt counts once, however many answers it has.
    times = {name: (grown[f"foldkv:{name}_count", ""], grown[f"foldkv:{name}_sum", ""]) for name in (
        "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds", "request_prompt_tokens",
        "request_generation_tokens", "e2e_request_latency_seconds",
    )}  # fmt: skip
    assert times["request_prompt_tokens"] == (2, 2 * len(TEXT)) and times["request_generation_tokens"] == (3, 3 * 16)
    whole = times.pop("e2e_request_latency_seconds")[1]
    for name, answers in (("queue", 2), ("prefill", 2), ("decode", 3)):
        count, seconds = times[f"request_{name}_time_seconds"]
        assert count == answers and 0 < seconds < whole, name
    assert grown["foldkv:http_requests_total", "/v1/completions200"] == 2
    assert idle(running)
    after = metrics(running)
    assert after["foldkv:num_requests_running", ""] == after["foldkv:num_requests_waiting", ""] == 0
    assert after["foldkv:kv_cache_usage_perc", ""] == 0
    with running.client().completions.create(**{**ASKED, "max_tokens": 200}, stream=True) as stream:
        next(stream)
        used = metrics(running)["foldkv:kv_cache_usage_perc", ""]
    assert len(TEXT) <= used * 2 * CONTEXT <= len(TEXT) + 200 and idle(running)
    states = {label: value for (name, label), value in after.items() if name == "foldkv:state_bytes"}
    assert states == plan_bytes(running.service.engine.model.bundle.state, CONTEXT, 2)


def test_the_page_is_whole_and_may_ask_only_this_server(running: Running) -> None:
    answer = http().get(f"{running.url}/")
    policy = answer.headers["content-security-policy"]
    assert answer.headers["content-type"] == "text/html; charset=utf-8" and "connect-src 'self'" in policy
    assert "http://" not in answer.text and "https://" not in answer.text and "innerHTML" not in answer.text
    assert "unsafe" not in policy


# Servers that are told otherwise


def test_a_model_with_a_template_is_asked_in_its_own_words_and_its_answer_is_content(model: Model) -> None:
    template = "{% for one in messages %}{{ one.role }}: {{ one.content }}\n{% endfor %}model:"
    with (
        serving(model, chat=ChatFormat(ChatFile("jinja", template=template))) as service,
        answering(service) as running,
    ):
        answer = running.client().chat.completions.create(**TALK)
        plain = running.client().completions.create(**{**ASKED, "prompt": "user: Hi\nmodel:", "max_tokens": 12})
        assert answer.usage == plain.usage and answer.choices[0].message.content == plain.choices[0].text
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
        with pytest.raises(openai.BadRequestError, match="tool_choice"):
            running.client().chat.completions.create(**TALK, tools=[tool], tool_choice="required")


def test_with_keys_only_who_has_one_is_answered(model: Model) -> None:
    with serving(model) as service, answering(service, Limits(keys=Keys(["first-key", "other-key"]))) as running:
        for key in ("first-key", "other-key"):
            assert running.client(key).models.list().data
        for key in ("first-ke", "first-key2", "-", "none"):
            headers = {"authorization": f"Bearer {key}"}
            for path in ("/v1/models", "/metrics", "/v1/x"):
                answer = http().get(f"{running.url}{path}", headers=headers)
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
        with pytest.raises(openai.AuthenticationError):
            running.client("wrong").chat.completions.create(**TALK)
        for path in ("/health", "/ready", "/"):
            assert http().get(f"{running.url}{path}").status_code == 200
        assert http().get(f"{running.url}/metrics", headers={"authorization": "Bearer other-key"}).status_code == 200


def test_why_a_server_is_not_ready_is_told_only_to_those_with_a_key(tiny_bundle: Path, tmp_path: Path) -> None:
    """It may name files."""
    copy = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    with (
        Model(copy, threads=1) as model,
        serving(model) as service,
        answering(service, Limits(keys=Keys(["key"]))) as running,
    ):
        os.utime(copy / "tokenizer.json", (1, 1))
        (inside,) = service.engine.not_ready()
        for headers, known in (
            ({}, False),
            ({"authorization": "Bearer no"}, False),
            ({"authorization": "Bearer key"}, True),
        ):
            answer = http().get(f"{running.url}/ready", headers=headers)
            assert answer.status_code == 503 and (inside in answer.json()["reasons"]) == known
            assert known or (str(copy) not in answer.text and "tokenizer.json" not in answer.text)


def test_a_server_of_this_machine_alone_is_not_asked_under_other_names(model: Model) -> None:
    """A page whose name is made to lead to 127.0.0.1 would be of the same origin as the server."""
    with serving(model) as service:
        names = {
            "evil.example": 403, "evil.example:8000": 403, "localhost.evil.example": 403, "10.0.0.1": 403, "": 403, "localhost": 200,
            "LocalHost:81": 200, "127.0.0.1": 200, "127.0.0.1:9": 200, "[::1]:80": 200, "[::1]": 200,
        }  # fmt: skip
        with answering(service, only_here=True) as running:
            for host, status in names.items():
                for path in ("/", "/v1/models", "/metrics"):
                    answer = http().get(f"{running.url}{path}", headers={"host": host})
                    assert answer.status_code == status, (host, path)
                    assert status == 200 or answer.json()["error"]["code"] == "host_not_allowed"
        for limits in (Limits(any_host=True), Limits(keys=Keys(["key"]))):
            with answering(service, limits, only_here=True) as running:
                headers = {"host": "proxy.example", "authorization": "Bearer key"}
                assert http().get(f"{running.url}/v1/models", headers=headers).status_code == 200


def test_a_full_queue_a_time_limit_and_a_stop_are_told_in_words(model: Model) -> None:
    long: Any = {**ASKED, "max_tokens": 450, "stream": True}
    with serving(model, slots=1, max_queue=1, timeout=60) as service, answering(service, grace=0) as running:
        client = running.client()
        first = client.completions.create(**long)
        next(first)
        second = client.completions.create(**long)
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(**ASKED)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        running.server.ask_to_stop()
        seen = []
        for stream in (first, second):  # ended at once, as the server was told, and not as if all had come
            with pytest.raises(openai.APIError, match="stopping"):
                for chunk in stream:
                    seen.append(chunk.choices[0].finish_reason)
        assert set(seen) <= {None}


def test_prompts_that_had_not_begun_when_somebody_cancelled_say_so(model: Model) -> None:
    """A stop between two prompts of a request would make the second one an answer without text otherwise."""
    with serving(model, slots=1) as service:

        async def reasons() -> dict[int, str | None]:
            requests = [Request(text, max_new_tokens=1 if text == "a" else 400) for text in "abc"]
            generations, found = Generations(service.engine, requests), dict[int, str | None]()
            async for number, piece in generations:
                found[number] = piece.finish_reason
                if piece.finish_reason is not None:
                    generations.cancel()
            return found

        assert asyncio.run(reasons()) == {0: "length", 1: "cancelled", 2: "cancelled"}


def test_slow_bodies_hold_up_no_others_and_are_limited(
    running: Running, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    free, real = threading.Event(), Tokenizer.encode
    request.addfinalizer(free.set)

    def encode(self: Tokenizer, text: str, **options: Any) -> list[int]:
        if text == "slow":
            free.wait(30)
        return real(self, text, **options)

    monkeypatch.setattr(Tokenizer, "encode", encode)
    monkeypatch.setattr(running.application._readers, "_most", app._READERS)
    asked: Any = {**ASKED, "max_tokens": 1}
    answers: list[str] = []

    def ask() -> None:
        answers.append(running.client().completions.create(**{**asked, "prompt": "slow"}).choices[0].text)

    threads = [threading.Thread(target=ask) for _ in range(app._READERS)]
    for thread in threads:
        thread.start()
    assert until(lambda: running.application._readers.count == len(threads))
    assert http().get(f"{running.url}/health").status_code == 200
    ready = http().get(f"{running.url}/ready")
    assert ready.status_code == 503 and "wait to be read" in ready.json()["reasons"][0]
    with pytest.raises(openai.RateLimitError, match="wait to be read") as refused:
        running.client().completions.create(**asked)
    assert int(refused.value.response.headers["retry-after"]) >= 1
    free.set()
    for thread in threads:
        thread.join(30)
    assert len(answers) == len(threads) and running.client().completions.create(**asked).choices[0].text


def test_what_is_too_much_to_keep_can_be_streamed(running: Running) -> None:
    """The whole of an answer with its probabilities is refused, see the bad requests; nothing of a stream is kept."""
    body = {"prompt": "x", "n": 100, "max_tokens": 1000, "logprobs": 20, "stream": True}
    assert completion_job(read_body(CompletionBody, json.dumps(body).encode()), running.service).stream


def test_an_answer_or_a_body_that_takes_too_long_is_a_timeout(model: Model) -> None:
    long: Any = {**ASKED, "max_tokens": 450}
    with serving(model, slots=1, timeout=0.05) as service, answering(service) as running:
        with pytest.raises(openai.APIStatusError) as late:
            running.client().completions.create(**long)
        assert late.value.status_code == 504 and late.value.code == "timeout"
        assert late.value.response.headers["x-should-retry"] == "false", "OpenAI's client would ask again"
        with pytest.raises(openai.APIError, match="more than"):
            list(running.client().completions.create(**long, stream=True))
        for path, asked in (("completions", long), ("chat/completions", {**TALK, "max_tokens": 450})):
            rows = http().post(f"{running.url}/v1/{path}", json={**asked, "stream": True}).text.strip().split("\n\n")
            *chunks, last = [json.loads(row.removeprefix("data: ")) for row in rows]
            assert last["error"]["code"] == "timeout", "and no [DONE]"
            assert all(one["choices"][0]["finish_reason"] is None for one in chunks), "OpenAI has no reason for this"
    with serving(model, slots=1) as service, answering(service, Limits(body_timeout=0.3)) as running:
        host, port = running.url.removeprefix("http://").split(":")
        with closing(socket.create_connection((host, int(port)))) as connection:
            head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{"
            connection.sendall(head)
            answer = b"".join(iter(lambda: connection.recv(4096), b""))  # up to the end of the connection
        assert answer.startswith(b"HTTP/1.1 408") and b'"code":"timeout"' in answer


def test_one_deadline_is_over_the_body_its_reading_the_queue_and_all_prompts(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, real, limit = threading.Event(), Tokenizer.encode, 0.5

    def encode(self: Tokenizer, text: str, **options: Any) -> list[int]:
        if text == "slow":
            free.wait(30)
        return real(self, text, **options)

    def late(running: Running, **asked: Any) -> None:
        before = time.monotonic()
        with pytest.raises(openai.APIStatusError) as refused:
            running.client().completions.create(**{**ASKED, **asked})
        assert (refused.value.status_code, refused.value.code) == (504, "timeout")
        assert time.monotonic() - before < 2.5 * limit

    monkeypatch.setattr(Tokenizer, "encode", encode)
    with serving(model, slots=1, max_queue=1, timeout=limit) as service, answering(service) as running:
        late(running, prompt="slow")
        assert running.application._readers.count == 1, "it still takes its thread"
        free.set()
        assert until(lambda: running.application._readers.count == running.application._held == 0)
        late(running, prompt=[f"x = {number}" for number in range(40)], max_tokens=60)
        assert idle(running)
        host, port = running.url.removeprefix("http://").split(":")
        with closing(socket.create_connection((host, int(port)), timeout=5)) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{"
            )
            assert connection.recv(4096).startswith(b"HTTP/1.1 504")
        assert running.application._held == 0


def test_bodies_that_arrive_are_counted_all_together(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_HELD", 1)
    most, part = running.application.limits.max_body, b" " * (33 << 10)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {most}\r\n\r\n"
    )
    host, port = running.url.removeprefix("http://").split(":")
    with closing(socket.create_connection((host, int(port)), timeout=5)) as connection:
        connection.sendall(head.encode() + part)
        assert until(lambda: running.application._held == len(part))
        answer = http().post(
            f"{running.url}/v1/completions", content=part + b"{}", headers={"content-type": "application/json"}
        )
        assert answer.status_code == 429 and answer.json()["error"]["code"] == "queue_full"
        assert until(lambda: running.application._held == len(part))
    assert until(lambda: running.application._held == 0)


def test_a_stop_lets_answers_end_and_takes_no_new_ones(model: Model) -> None:
    with serving(model, slots=1) as service, answering(service, grace=30) as running:
        stream = running.client().completions.create(**{**ASKED, "max_tokens": 100}, stream=True)
        text = next(stream).choices[0].text
        assert {http().get(f"{running.url}/ready").status_code for _ in range(5)} == {200}, (
            "a step on its way is no failure"
        )
        running.server.ask_to_stop()
        assert until(lambda: http().get(f"{running.url}/ready").status_code == 503)
        with pytest.raises(openai.InternalServerError, match="stopping"):
            running.client().completions.create(**ASKED)
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason == "length"
        assert len(text + "".join(chunk.choices[0].text for chunk in rest)) == 100


def test_pages_of_others_ask_only_where_the_server_was_told_so(running: Running, model: Model) -> None:
    origin = {"origin": "https://example.com"}
    assert "access-control-allow-origin" not in http().get(f"{running.url}/health", headers=origin).headers
    with serving(model) as service, answering(service, Limits(origins=("https://example.com",), page=False)) as other:
        assert (
            http().get(f"{other.url}/health", headers=origin).headers["access-control-allow-origin"] == origin["origin"]
        )
        asked = {
            **origin,
            "access-control-request-method": "POST",
            # What OpenAI's client for JavaScript sends.
            "access-control-request-headers": "authorization,content-type,x-stainless-arch,x-stainless-retry-count,x-stainless-timeout",
        }
        allowed = http().options(f"{other.url}/v1/completions", headers=asked)
        assert allowed.status_code == 200, allowed.text
        assert allowed.headers["access-control-allow-headers"] == asked["access-control-request-headers"]
        refused = http().post(f"{other.url}/v1/completions", headers=origin, content=b"{}")
        assert refused.status_code == 415 and "access-control-allow-origin" in refused.headers
        assert http().get(f"{other.url}/").status_code == 404


def test_an_unexpected_failure_is_a_number_that_the_log_knows(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a secret of the inside")

    monkeypatch.setattr(type(running.service.tokenizer), "encode", broken)
    with pytest.raises(openai.InternalServerError) as failed:
        running.client().completions.create(**ASKED)
    assert failed.value.code == "internal_error" and "secret" not in str(failed.value)
    number = str(failed.value.body["message"]).split()[-1].rstrip(".")  # type: ignore[index]
    assert number in caplog.text and "a secret of the inside" in caplog.text
