"""Requests that a server must refuse: what is sent, the status, and a word of the answer."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
JSON = {"content-type": "application/json"}
USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@dataclass(frozen=True)
class Bad:
    """A request, and how it is refused."""

    path: str
    content: bytes
    says: str
    status: int = 400
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: JSON)


def text(says: str, status: int = 400, **fields: Any) -> Bad:
    return Bad(TEXT, json.dumps({"prompt": "x", **fields}).encode(), says, status)


def chat(says: str, status: int = 400, **fields: Any) -> Bad:
    return Bad(CHAT, json.dumps({"messages": [USER], **fields}).encode(), says, status)


def talk(says: str, *messages: Any) -> Bad:
    return chat(says, messages=list(messages))


BAD = [
    # Not a body at all
    Bad(TEXT, b"", "not JSON"),
    Bad(TEXT, b"{", "not JSON"),
    Bad(TEXT, b"[]", "object"),
    Bad(TEXT, b"null", "object"),
    Bad(TEXT, b'"prompt"', "object"),
    Bad(TEXT, b"\xff\xfe", "UTF-8"),
    Bad(TEXT, b'{"prompt": "\xc3\x28"}', "UTF-8"),
    Bad(TEXT, b'{"prompt": "\\ud800"}', "UTF-8"),
    Bad(CHAT, b'{"messages": [{"role": "user", "content": "\\udfff"}]}', "UTF-8"),
    Bad(TEXT, b'{"prompt": "x", "temperature": NaN}', "NaN"),
    Bad(TEXT, b'{"prompt": "x", "temperature": -Infinity}', "Infinity"),
    Bad(TEXT, b'{"prompt": "x", "temperature": 1e999}', "finite"),
    Bad(TEXT, b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "digits"),
    Bad(TEXT, b"[" * 20000, "not JSON"),
    Bad(CHAT, b'{"messages": ' + b'{"a":' * 10000, "not JSON"),
    Bad(TEXT, b'{"prompt": "x"}', "content-type", 415, headers={}),
    Bad(TEXT, b"prompt=x", "content-type", 415, headers={"content-type": "application/x-www-form-urlencoded"}),
    Bad(TEXT, b'{"prompt": "x"}', "content-type", 415, headers={"content-type": "text/plain"}),
    # Places and methods
    Bad("/v1/embeddings", b"{}", "does not exist", 404),
    Bad("/v1/completions/", b"{}", "does not exist", 404),
    Bad("/v1/models/none", b"", "not here", 404, "GET"),
    Bad("/../etc/passwd", b"", "does not exist", 404, "GET"),
    Bad("/v1/%00", b"", "does not exist", 404, "GET"),
    Bad(TEXT, b"", "does not take", 405, "GET"),
    Bad(CHAT, b"", "does not take", 405, "DELETE"),
    Bad("/health", b"", "does not take", 405, "POST"),
    Bad("/metrics", b"", "does not take", 405, "PUT"),
    # Fields
    text("unknown_parameter", colour=1),
    text("did you mean 'max_tokens'", max_token=1),
    text("unknown_parameter", messages=[USER]),
    chat("unknown_parameter", prompt="x"),
    chat("use tools", functions=[]),
    chat("use structured_outputs.json", guided_json={}),
    text("prompt", prompt=None),
    text("prompt", prompt=[]),
    text("prompt", prompt=""),
    text("prompt", prompt=5),
    text("prompt", prompt={"text": "x"}),
    text("prompt", prompt=["x", 5]),
    text("prompt", prompt=[[]]),
    text("prompt", prompt=[1, -1]),
    text("prompt", prompt=[1, 2.5]),
    text("prompt", prompt=[True]),
    text("prompt", prompt=["x"] * 257),
    text("vocabulary", prompt=[258]),
    text("vocabulary", prompt=[10**30]),
    text("prompt", prompt=["x", ""]),
    Bad(TEXT, b"{}", "prompt is missing"),
    text("not here", 404, model="gpt-4"),
    text("model", model=5),
    text("temperature", temperature=-0.1),
    text("temperature", temperature=2.1),
    text("temperature", temperature="1"),
    text("temperature", temperature=True),
    text("top_p", top_p=-0.01),
    text("top_p", top_p=1.01),
    text("top_k", top_k=-2),
    text("top_k", top_k=1.5),
    text("min_p", min_p=1.5),
    text("presence_penalty", presence_penalty=2.5),
    text("frequency_penalty", frequency_penalty=-2.5),
    text("repetition_penalty", repetition_penalty=0),
    text("repetition_penalty", repetition_penalty=1e-50, temperature=1),
    text("max_tokens", max_tokens=0),
    text("max_tokens", max_tokens=1.0),
    text("max_tokens", max_tokens="8"),
    text("context_length_exceeded", max_tokens=2048),
    text("context_length_exceeded", prompt="x" * 2048),
    text("context_length_exceeded", max_tokens=10**12),
    text("n is", n=0),
    text("n is", n=129),
    text("more than 256", n=128, prompt=["x", "y", "z"]),
    text("prompt[1]", prompt=[[1], [1, 258]]),
    text("seed", seed=2**63),
    text("seed", seed="7"),
    text("stop", stop=""),
    text("stop", stop=["a", ""]),
    text("stop", stop=["a"] * 17),
    text("stop", stop=[1]),
    text("stop_token_ids", stop_token_ids=[-1]),
    text("stop_token_ids", stop_token_ids=[258]),
    text("logit_bias", logit_bias={"a": 1}),
    text("logit_bias", logit_bias={"1": 101}),
    text("logit_bias", logit_bias={"258": 1}),
    text("logit_bias", logit_bias=[1]),
    text("logprobs", logprobs=21),
    text("logprobs", logprobs=True),
    text("echo", echo=True),
    text("best_of", best_of=2),
    text("best_of", best_of=2, n=3),
    text("suffix", suffix="y"),
    text("stream", stream="yes"),
    text("stream_options", stream_options={"include_usage": True}),
    text("stream_options.colour", stream=True, stream_options={"colour": True}),
    text("structured_outputs", structured_outputs={}),
    text("structured_outputs", structured_outputs={"regex": "a", "choice": ["b"]}),
    text("structured_outputs", structured_outputs={"choice": []}),
    text("structured_outputs.json", structured_outputs={"json": 5}),
    text("guided_regex", guided_regex="a", structured_outputs={"regex": "a"}),
    # Chat
    Bad(CHAT, b"{}", "messages is missing"),
    chat("messages", messages="Hi"),
    talk("messages"),
    text("too much to be kept", n=100, max_tokens=1000, logprobs=20),
    chat("too much to be kept", n=128, max_tokens=1000, logprobs=True, top_logprobs=8),
    Bad(CHAT, b'{"messages": [{"role": "user", "content": "x"}], "tool_choice": "required", "tools": [{"function": {"name": "f", "parameters": '
        b'{"properties": {"a": ' + b'{"allOf": [' * 400 + b"{}" + b"]}" * 400 + b"}}" + b"}}]}", "nested"),
    talk("messages[0]", 5),
    talk("messages[0].role", {"content": "Hi"}),
    talk("messages[0].role", {"role": "wizard", "content": "Hi"}),
    talk("messages[1].content", USER, {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}),
    talk("messages[0].content", {"role": "user", "content": 5}),
    talk("messages[1].tool_calls", USER, {"role": "assistant", "tool_calls": [{"function": {"name": 'a"b'}}]}),
    talk("messages[0].tool_calls", {"role": "user", "content": "x", "tool_calls": [{}]}),
    chat("tools[0]", tools=[{}]),
    chat("tools[0]", tools=[{"type": "function", "function": "add"}]),
    chat("tools[1].function.name", tools=[TOOL, TOOL]),
    chat("tools", tools=TOOL),
    chat("tool_choice", tool_choice="required"),
    chat("tool_choice", tools=[TOOL], tool_choice="maybe"),
    chat("tool_choice", tools=[TOOL], tool_choice={"type": "function", "function": {"name": "sub"}}),
    chat("tool_choice", tools=[{"function": 1}], tool_choice={"type": "function", "function": {"name": "sub"}}),
    chat("tools[0].function", tools=[{"function": None}], tool_choice="none"),
    chat("top_logprobs", top_logprobs=3),
    chat("logprobs", logprobs=3),
    chat("top_logprobs", logprobs=True, top_logprobs=21),
    chat("max_tokens", max_tokens=3, max_completion_tokens=4),
    chat("max_completion_tokens", max_completion_tokens=0),
    chat("context_length_exceeded", messages=[{"role": "user", "content": "x" * 2100}]),
    chat("response_format", response_format={"type": "xml"}),
    chat("response_format", response_format={"type": "json_schema"}),
    chat("response_format", response_format={"type": "text", "json_schema": {"name": "a", "schema": {}}}),
    chat("response_format.json_schema.name", response_format={"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}),
    chat("response_format", response_format="json"),
    chat("reasoning_effort", reasoning_effort="colossal"),
    chat("reasoning_effort", reasoning_effort=3),
    chat("different things", reasoning_effort="none", chat_template_kwargs={"thinking": True}),
    chat("chat_template_kwargs", chat_template_kwargs={"colour": 1}),
    chat("thinking", thinking={"type": "perhaps"}),
    chat("store", store=1),
    chat("metadata", metadata={"a": 1}),
    chat("metadata", metadata={str(number): "" for number in range(17)}),
    chat("prompt_cache_retention", prompt_cache_retention="48h"),
    chat("modalities", modalities=["audio"]),
    chat("service_tier", service_tier="priority"),
]  # fmt: skip
