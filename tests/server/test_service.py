"""The rest of the service: what events look like, metrics, the page, the description, and how it ends."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from crosslayer.cli import main
from crosslayer.engine import EngineConfig
from tests.server.servers import CONFIG, TOKENIZER, greedy, save_folder, serving, until


def test_events_on_the_wire() -> None:
    """The format that readers of server-sent events and OpenAI's clients expect."""
    with serving() as live:
        body = {"model": "tiny", "prompt": "three cats", "max_tokens": 3, "temperature": 0, "stream": True}
        connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=30)
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        assert response.getheader("content-type") == "text/event-stream; charset=utf-8"
        assert response.getheader("cache-control") == "no-cache"
        *events, done, end = response.read().decode().split("\n\n")
        connection.close()
        assert (done, end) == ("data: [DONE]", "")
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        assert all(event.startswith("data: ") and "\n" not in event for event in events)
        assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
        assert {chunk["object"] for chunk in chunks} == {"text_completion"}
        assert all("usage" not in chunk for chunk in chunks)
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert text == TOKENIZER.decode(greedy(TOKENIZER.encode("three cats"), 3))
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


def test_metrics_count_what_happened() -> None:
    with serving(CONFIG) as live:
        prompt = TOKENIZER.encode("three cats sat on mats and ate rats")
        for _ in range(2):
            assert live.complete(prompt=prompt, max_tokens=7)[0] == 200
        live.settle()
        assert live.metric("crosslayer_prompt_tokens_total") == 2 * len(prompt)
        assert live.metric("crosslayer_generated_tokens_total") == 14
        assert live.metric("crosslayer_time_to_first_token_seconds_count") == 2
        assert live.metric("crosslayer_inter_token_seconds_count") == 12
        assert live.metric("crosslayer_prefix_tokens_total") == (len(prompt) - 1) // 4 * 4 > 0
        assert live.metric('crosslayer_finished_total{reason="length"}') == 2
        assert live.metric("crosslayer_running") == live.metric("crosslayer_waiting") == 0
        assert live.metric("crosslayer_unshared_cache_ratio") == 2  # CLA2
        blocks = live.metric("crosslayer_cache_blocks")
        block_bytes = 4 * 2 * 3 * 2 * 10 * 4  # tokens, keys and values, owners, KV heads, head_dim, float32
        assert live.metric("crosslayer_cache_bytes") == blocks * block_bytes <= 2**20
        assert live.call("GET", "/metrics")[1].count("# TYPE crosslayer_") >= 14


def test_the_page_reads_metrics_that_there_are() -> None:
    with serving() as live:
        status, page = live.call("GET", "/")
        assert status == 200
        metrics = live.call("GET", "/metrics")[1]
        named = set(re.findall(r"values\.(\w+)", page)) | {
            f"{name}_sum" for name in re.findall(r"mean\(values, \"(\w+)\"\)", page)
        }
        assert len(named) >= 9
        for name in named:
            assert f"\ncrosslayer_{name} " in metrics
        assert "http" not in page  # nothing from elsewhere


def test_a_preempting_engine_serves_the_same_text() -> None:
    small = EngineConfig(block_size=4, cache_bytes=34 * 4 * 2 * 3 * 2 * 10 * 4, max_running=8)
    with serving(small) as live:
        prompts = [f"{number} cats and rats" for number in range(6)]
        status, answer = live.complete(prompt=prompts, max_tokens=40, temperature=0)
        assert status == 200
        for choice, prompt in zip(answer["choices"], prompts, strict=True):
            assert choice["text"] == TOKENIZER.decode(greedy(TOKENIZER.encode(prompt), 40))
        assert live.metric("crosslayer_preemptions_total") > 0
        live.settle()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "70000"], "--port must be between 0 and 65535, got 70000"),
        (["--max-queue", "-1"], "--max-queue must not be negative"),
        (["--drain", "-1"], "--drain must not be negative"),
        (["--api-key", ""], "the API key is empty"),
        (["--api-key", " \n"], "the API key is empty"),
        (["--cache", "10"], "cache"),
        (["--host", "256.0.0.1"], "cannot listen on 256.0.0.1:0"),
        (["--host", "a..b"], "cannot listen on a..b:0"),
        (["--host", "a" * 70], "cannot listen on aaa"),
    ],
)
def test_what_the_command_refuses(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_folder(tmp_path / "model")
    port = [] if "--port" in arguments else ["--port", "0"]
    assert main(["serve", str(tmp_path / "model"), *port, *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_an_address_that_is_taken_is_told_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert main(["serve", str(tmp_path / "nothing"), "--port", str(other.getsockname()[1])]) == 2
    assert "Address already in use" in capsys.readouterr().err


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except (ConnectionRefusedError, ConnectionResetError):  # reset: closed before it was accepted
        return True
    return False


@contextmanager
def command(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`crosslayer serve` and its port."""
    save_folder(folder)
    parts = [sys.executable, "-m", "crosslayer", "serve", str(folder), "--port", "0", *arguments]
    process = subprocess.Popen(parts, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline().startswith("tiny: a cache of ")
        yield process, int(process.stdout.readline().rsplit(":", 1)[1])
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("drain", [60, 0])
def test_sigterm_lets_answers_end_for_a_while(tmp_path: Path, drain: int) -> None:
    body = {"model": "tiny", "prompt": "three cats", "max_tokens": 120, "temperature": 0, "ignore_eos": True}
    with command(tmp_path / "tiny", "--drain", str(drain)) as (process, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        content = json.dumps({**body, "stream": True, "n": 64})
        connection.request("POST", "/v1/completions", content, {"content-type": "application/json"})
        response = connection.getresponse()
        first = response.readline()
        process.send_signal(signal.SIGTERM)
        until(lambda: refuses(port))  # nobody new is let in
        *events, last, end = (first + response.read()).decode().split("\n\n")
        assert end == ""
        if drain:
            assert last == "data: [DONE]"
            pieces = [json.loads(event[6:])["choices"][0] for event in events]
            text = "".join(piece["text"] for piece in pieces if piece["index"] == 0)
            assert text == TOKENIZER.decode(greedy(TOKENIZER.encode("three cats"), 120))
        else:
            assert "the server is shutting down" in json.loads(last[6:])["error"]["message"]
        assert process.wait(timeout=30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


@pytest.mark.parametrize("delay", [0, 0.03])
def test_sigterm_counts_from_when_the_address_is_printed(tmp_path: Path, delay: float) -> None:
    with command(tmp_path / "tiny") as (process, _):
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_a_second_interrupt_under_load_ends_the_rest(tmp_path: Path) -> None:
    body = {"model": "tiny", "prompt": "three cats", "max_tokens": 120, "ignore_eos": True, "n": 100}
    with command(tmp_path / "tiny") as (process, port):
        connections = [http.client.HTTPConnection("127.0.0.1", port, timeout=30) for _ in range(12)]
        for number, connection in enumerate(connections):
            content = json.dumps({**body, "stream": number % 2 == 1})
            connection.request("POST", "/v1/completions", content, {"content-type": "application/json"})
        connections[-1].sock.recv(1, socket.MSG_PEEK)
        process.send_signal(signal.SIGINT)
        until(lambda: refuses(port))
        process.send_signal(signal.SIGINT)
        for connection in connections:
            assert "the server is shutting down" in connection.getresponse().read().decode()
        assert process.wait(timeout=30) == 128 + signal.SIGINT
        assert process.stderr is not None
        assert process.stderr.read() == "\ninterrupted\n"


def test_an_interrupt_of_what_a_script_started_in_the_background(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as shells do; inherited
    try:
        with command(tmp_path / "tiny") as (process, _):
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, before)


def test_who_comes_when_all_was_dropped_is_refused() -> None:
    """Such as a long text that was being encoded when the time was over."""
    with serving() as live:
        live.service.worker.drop_all()
        status, body = live.complete()
        assert (status, body["error"]["code"]) == (503, "shutdown")


def test_an_upload_that_does_not_end_is_refused_at_the_end(tmp_path: Path) -> None:
    with command(tmp_path / "tiny", "--drain", "0", "--api-key", "sesame\n") as (process, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.putrequest("POST", "/v1/completions")
        for name, value in {
            "content-type": "application/json",
            "content-length": "100",
            "authorization": "Bearer sesame",  # the key without the white space around it
        }.items():
            connection.putheader(name, value)
        connection.endheaders(b"{")
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        response = connection.getresponse()
        assert response.status == 503
        assert "the server is shutting down" in json.loads(response.read())["error"]["message"]
        assert process.wait(timeout=30) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


def test_the_example_in_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "openai" in block]
    with serving() as live:
        exec(block.replace("http://127.0.0.1:8000", live.url), {})
        printed = capsys.readouterr().out
        assert "CompletionUsage(completion_tokens=40" in printed
        assert len(printed) > 100
        for line in live.call("GET", "/metrics")[1].splitlines():
            if line.startswith("# TYPE crosslayer_") and not line.split()[2].endswith("_created"):
                assert f"`{line.split()[2].removeprefix('crosslayer_')}" in text, "a metric that the table lacks"


def test_the_description_is_complete() -> None:
    with serving(api_key="sesame") as live:
        description = json.loads(live.call("GET", "/openapi.json")[1])
    assert description["openapi"] == "3.1.0"
    assert description["security"] == [{"key": []}]
    text = json.dumps(description)
    for name in set(re.findall(r"#/components/schemas/(\w+)", text)):
        assert name in description["components"]["schemas"]
