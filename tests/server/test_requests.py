"""What is refused, with which status and which words; and what happens to everybody else meanwhile."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from crosslayer.engine import EngineConfig
from crosslayer.server.app import MAX_BODY
from crosslayer.server.protocol import ChatRequest
from tests.server.servers import CONFIG, Live, serving, until

SAYS = {"role": "user", "content": "cats"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving(max_queue=4) as live:
        yield live
        live.settle()


def assert_error(status: int, body: Any, expected: int, words: str) -> None:
    """An error as OpenAI's clients read it."""
    assert status == expected, body
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": None}, "prompt: it is missing"),
        ({"prompt": ""}, "nothing to continue"),
        ({"prompt": []}, "there is none in the list"),
        ({"prompt": ["cats", ""]}, "nothing to continue"),
        ({"prompt": 3}, "prompt: input should be a valid string"),
        ({"prompt": ["cats", 3]}, "prompt: input should be"),
        ({"prompt": [1, True]}, "prompt: input should be"),
        ({"prompt": [1, 2, 100000]}, "token 100000 does not exist"),
        ({"prompt": [-1]}, "token -1 does not exist"),
        ({"prompt": [-(2**70)], "echo": True}, "does not exist"),
        ({"prompt": "cats " * 200}, "do not fit in the context, which holds 128"),
        ({"max_tokens": 128}, "do not fit in the context"),
        ({"max_tokens": 10**30}, "max_tokens: input should be"),
        ({"max_tokens": 0}, "max_tokens: input should be greater than or equal to 1"),
        ({"max_tokens": 2.5}, "max_tokens: input should be a valid integer"),
        ({"max_tokens": "5"}, "max_tokens: input should be a valid integer"),
        ({"min_tokens": 9, "max_tokens": 5}, "min_tokens is 9, more than max_tokens, 5"),
        ({"temperature": -1}, "temperature: input should be greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature: input should be a valid number"),
        ({"temperature": float("nan")}, "temperature: input should be a finite number"),
        ({"temperature": float("inf")}, "temperature: input should be"),
        ({"top_p": 0}, "top_p: input should be greater than 0"),
        ({"top_k": -1}, "top_k: input should be"),
        ({"presence_penalty": 3}, "presence_penalty: input should be"),
        ({"repetition_penalty": 0}, "repetition_penalty: input should be"),
        ({"seed": 1.5}, "seed: input should be a valid integer"),
        ({"stop": [""]}, "stop: "),
        ({"stop": ["x"] * 17}, "stop: "),
        ({"stop_token_ids": [100000]}, "token 100000 does not exist"),
        ({"n": 0}, "n: input should be"),
        ({"n": 13}, "13 samples in one request; this server takes 12"),
        ({"logprobs": 21}, "logprobs: input should be"),
        ({"logprobs": 1, "echo": True}, "echo with logprobs"),
        ({"stream": 1}, "stream: input should be a valid boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options goes with stream"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x: there is no such field"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "include_obfuscation: there is no such field",
        ),
        ({"best_of": 4, "n": 2}, "best_of: this server does not support it"),
        ({"temprature": 1}, "temprature: there is no such field"),
        ({"messages": []}, "messages: there is no such field"),
    ],
)
def test_what_a_completion_must_not_ask(live: Live, change: dict[str, Any], words: str) -> None:
    assert_error(*live.complete(**change), 400, words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"messages": []}, "messages: list should have at least 1 item"),
        ({"messages": [{"role": "user"}]}, "messages.0.content: it is missing"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role: input should be 'system', 'developer'"),
        (
            {"messages": [SAYS, {"role": "tool", "content": "a", "tool_call_id": "b"}]},
            "messages.1.role: input should be",
        ),
        (
            {"messages": [SAYS, {"role": "user", "content": [IMAGE]}]},
            "messages.1.content.0.type: input should be 'text'",
        ),
        ({"messages": [SAYS, {"role": "user", "content": 3}]}, "messages.1.content: input should be a valid array"),
        ({"messages": [SAYS, {**SAYS, "tool_calls": [{}]}]}, "messages.1.tool_calls: there is no such field"),
        ({"top_logprobs": 2}, "top_logprobs goes with logprobs"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "are the same thing"),
        ({"tools": [{"type": "function"}]}, "tools: this server does not support it"),
        ({"response_format": {"type": "json_object"}}, "response_format: this server does not support it"),
    ],
)
def test_what_a_chat_must_not_ask(live: Live, change: dict[str, Any], words: str) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "cats"}], **change}
    status, text = live.call("POST", "/v1/chat/completions", body)
    assert_error(status, json.loads(text), 400, words)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "EOF"),
        (b"{", "EOF"),
        (b"[]", "the body is not a JSON object"),
        (b"null", "the body is not a JSON object"),
        (b"\xff\xfe", "the body is not a JSON object"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', "the body is not a JSON object"),
        (b'{"model": "tiny", "prompt": ' + b"[" * 100_000, "recursion limit"),
        (b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 10_000 + b"}", "the body is not"),
    ],
)
def test_what_is_no_request_at_all(live: Live, raw: bytes, words: str) -> None:
    status, text = live.call("POST", "/v1/completions", raw=raw)
    assert_error(status, json.loads(text), 400, words)


@pytest.mark.parametrize(
    "change",
    [
        {"messages": [{}] * 1000},
        {"messages": [{"role": "user", "content": [{}] * 1000}]},
        {"messages": [SAYS | {str(number): 0 for number in range(1000)}]},
        {str(number): 0 for number in range(1000)},
    ],
    ids=["messages", "parts", "fields of a message", "fields"],
)
def test_what_is_wrong_a_million_times_is_not_counted(change: dict[str, Any]) -> None:
    """With millions of errors in 8 MB nobody else would be answered for half a minute."""
    with pytest.raises(ValidationError) as refused:
        ChatRequest.model_validate_json(json.dumps({"model": "tiny", "messages": [SAYS], **change}))
    assert refused.value.error_count() < 4


def test_others_are_answered_while_a_long_text_is_encoded(live: Live) -> None:
    started, waits = time.monotonic(), list[float]()
    long = threading.Thread(target=live.complete, kwargs={"prompt": "three cats sat on " * 100_000})
    long.start()
    while long.is_alive():
        asked = time.monotonic()
        assert live.call("GET", "/health")[0] == 200
        waits.append(time.monotonic() - asked)
    assert max(waits) < (time.monotonic() - started) / 2


def test_wrong_places_types_and_sizes(live: Live) -> None:
    def error(*request: Any, **headers: Any) -> tuple[int, Any]:
        status, text = live.call(*request, **headers)
        return status, json.loads(text)

    assert_error(*live.complete(model="gpt-4"), 404, "there is no model 'gpt-4' here; this is 'tiny'")
    assert_error(*error("GET", "/v1/nothing"), 404, "not found")
    assert_error(*error("GET", "/v1/completions"), 405, "not allowed")
    assert_error(*error("POST", "/v1/completions", {}, content_type="text/plain"), 415, "application/json")
    long = b'{"prompt": "' + b"a" * MAX_BODY
    assert_error(*error("POST", "/v1/completions", raw=long), 413, "8,388,608 bytes")


def test_no_template_no_chat() -> None:
    with serving(template=None) as live:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "cats"}]}
        status, text = live.call("POST", "/v1/chat/completions", body)
        assert_error(status, json.loads(text), 400, "no chat template")


def test_the_key() -> None:
    with serving(api_key="sesame") as live:
        for headers in (
            {},
            {"authorization": "Bearer"},
            {"authorization": "Bearer sesam"},
            {"authorization": "sesame"},
        ):
            for request in (("GET", "/v1/models"), ("POST", "/v1/completions", {}), ("GET", "/v1/nothing")):
                status, text = live.call(*request, **headers)
                assert_error(status, json.loads(text), 401, "Authorization: Bearer KEY")
        assert live.call("GET", "/v1/models", authorization="Bearer sesame")[0] == 200
        assert live.call("GET", "/v1/models", authorization="bearer sesame")[0] == 200
        for path in ("/health", "/metrics", "/", "/openapi.json"):
            assert live.call("GET", path)[0] == 200


def test_a_full_queue_refuses_and_then_takes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(block_size=4, cache_bytes=2**20, max_running=2)
    with serving(config, max_queue=3) as live:
        connections = [http.client.HTTPConnection("127.0.0.1", live.port, timeout=30) for _ in range(2)]
        # Slow enough that they are there for as long as is needed.
        step = live.engine.step
        monkeypatch.setattr(live.engine, "step", lambda: (until(lambda: released), step())[1])
        released = False
        for connection, n in zip(connections, (4, 1), strict=True):
            body = {"model": "tiny", "prompt": "cats", "n": n, "max_tokens": 5}
            connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        until(lambda: live.service.worker.num_samples == 5)
        try:
            assert_error(*live.complete(), 429, "the queue is full")
        finally:
            released = True
        for connection in connections:
            assert connection.getresponse().status == 200
            connection.close()
        assert live.complete(n=5)[0] == 200
        assert live.metric("crosslayer_refused_total") == 1
        live.settle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_step_is_reported_and_the_next_goes_well(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    with serving(CONFIG) as live:
        run = live.engine.runner.launch

        def fail(step: Any) -> Any:
            raise RuntimeError("no memory")

        monkeypatch.setattr(live.engine.runner, "launch", fail)
        status, text = live.call("POST", "/v1/completions", {"model": "tiny", "prompt": ["a", "b"], "stream": stream})
        if stream:  # the status has gone out already
            assert status == 200
            assert text.startswith("data: ")
            assert "[DONE]" not in text
            text = text.removeprefix("data: ")
            status = 500
        assert_error(status, json.loads(text), 500, "the engine failed")
        live.settle()
        assert live.call("GET", "/health")[0] == 503
        monkeypatch.setattr(live.engine.runner, "launch", run)
        assert live.complete()[0] == 200
        assert live.call("GET", "/health") == (200, "ok\n")
        assert live.metric('crosslayer_finished_total{reason="error"}') == 2
