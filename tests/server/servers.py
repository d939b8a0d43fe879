"""Live servers on loopback, in a thread, with their engine in reach; and plain HTTP to talk to them."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn

import crosslayer
from crosslayer.data import Tokenizer
from crosslayer.engine import Engine, EngineConfig
from crosslayer.server import ChatTemplate, Service
from tests.conftest import tiny_config
from tests.engine.runs import assert_nothing_held
from tests.model.checks import random_model

TOKENIZER = Tokenizer.train(["three cats sat on seven mats and ate some rats " * 20], 280)
MODEL = random_model(tiny_config("cla2", vocab_size=TOKENIZER.vocab_size, max_position_embeddings=128))
CONFIG = EngineConfig(block_size=4, cache_bytes=2**20, max_running=8)
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


class Live:
    """A running server: where it is, and what is inside."""

    def __init__(self, service: Service, port: int) -> None:
        self.service, self.port = service, port
        self.engine = service.worker.engine
        self.url = f"http://127.0.0.1:{port}"

    def call(
        self, method: str, path: str, body: Any = None, *, raw: bytes | None = None, **headers: str
    ) -> tuple[int, str]:
        """Status and body; `body` is sent as JSON, `raw` as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        content = json.dumps(body).encode() if raw is None and body is not None else raw
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, content, {"content-type": "application/json"} | names)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def complete(self, **body: Any) -> tuple[int, Any]:
        """Status and JSON of a completion."""
        status, text = self.call("POST", "/v1/completions", {"model": "tiny", "prompt": "three cats", **body})
        return status, json.loads(text)

    def metric(self, name: str) -> float:
        lines = self.call("GET", "/metrics")[1].splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))

    def settle(self) -> None:
        """Wait until everything has ended; then nothing may be left of it."""
        until(lambda: not self.service.worker.num_samples)
        assert_nothing_held(self.engine)
        assert not self.service.worker._generations
        assert self.metric("crosslayer_cache_blocks_used") == 0


@contextmanager
def serving(
    config: EngineConfig = CONFIG, template: str | None = TEMPLATE, *, overlaps: bool = False, **settings: Any
) -> Iterator[Live]:
    """`overlaps`: the engine's steps come in the order of a GPU's."""
    engine = Engine(MODEL, TOKENIZER, config)
    engine.runner.overlaps = overlaps
    chat = None if template is None else ChatTemplate(template, TOKENIZER, Path())
    service = Service(engine, tokenizer=TOKENIZER, template=chat, name="tiny", **settings)
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    server = uvicorn.Server(uvicorn.Config(service.app, log_level="critical", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        until(lambda: server.started)
        yield Live(service, listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@torch.no_grad()
def greedy(prompt: Sequence[int], count: int) -> list[int]:
    """What the model itself says comes next, without a cache."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(MODEL(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def save_folder(folder: Path) -> None:
    crosslayer.save(MODEL, folder, tokenizer=TOKENIZER)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
