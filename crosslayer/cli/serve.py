"""crosslayer serve"""

from __future__ import annotations

import argparse
import os
import socket
from pathlib import Path

from crosslayer.cli.common import add_device_argument, load_model
from crosslayer.errors import UserError
from crosslayer.plan.units import parse_bytes

HELP = "serve a model over HTTP, as OpenAI's API does"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="FOLDER", help="model folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine)")
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s; 0: a free one)")
    parser.add_argument("--name", help="what clients call the model (default: the folder's name)")
    parser.add_argument(
        "--api-key", metavar="KEY", help="clients must send it (default: CROSSLAYER_API_KEY, else none is needed)"
    )
    parser.add_argument("--cache", metavar="BYTES", help="memory for keys and values, such as 8GiB")
    parser.add_argument("--cache-dtype", default="auto", metavar="DTYPE", help="auto (the model's) or fp8")
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens of prompt and answer (default: context)")
    parser.add_argument("--max-running", type=int, default=256, metavar="N", help="samples at a time (default: 256)")
    parser.add_argument("--max-queue", type=int, default=1024, metavar="N", help="... and waiting (default: 1024)")
    parser.add_argument(
        "--drain", type=int, default=30, metavar="SECONDS", help="after SIGTERM, to finish answers (default: 30)"
    )
    add_device_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.port < 65536:
        raise UserError(f"--port must be between 0 and 65535, got {arguments.port}")
    if arguments.max_queue < 0:
        raise UserError(f"--max-queue must not be negative, got {arguments.max_queue}")
    if arguments.drain < 0:
        raise UserError(f"--drain must not be negative, got {arguments.drain}")
    api_key = arguments.api_key if arguments.api_key is not None else os.environ.get("CROSSLAYER_API_KEY")
    if api_key is not None and not (api_key := api_key.strip()):  # a file with a secret may end with a new line
        raise UserError("the API key is empty; leave it out where clients need none")
    try:
        from crosslayer.server import ChatTemplate, Service
        from crosslayer.server import run as serve
    except ModuleNotFoundError as error:
        raise UserError(f"serving needs {error.name}: pip install 'crosslayer[serve]'") from None
    from crosslayer.engine import Engine, EngineConfig
    from crosslayer.train.host import choose_device

    config = EngineConfig(
        cache_bytes=None if arguments.cache is None else parse_bytes(arguments.cache),
        cache_dtype=arguments.cache_dtype,
        max_length=arguments.max_length,
        max_running=arguments.max_running,
    )
    device = choose_device(arguments.device)
    # Loading may take minutes; whether the address can be had is known now. Nobody is to wait there meanwhile.
    _listen(arguments.host, arguments.port).close()
    model, tokenizer, _ = load_model(arguments.model, "cpu")  # the engine puts a copy of the weights where it runs
    engine = Engine(model, tokenizer, config, device=device)
    del model  # what the engine has copied is not needed twice
    service = Service(
        engine,
        tokenizer=tokenizer,
        template=ChatTemplate.load(arguments.model, tokenizer),
        name=arguments.name or Path(arguments.model).resolve().name,
        api_key=api_key,
        max_queue=arguments.max_queue,
    )
    listener = _listen(arguments.host, arguments.port)
    host, port = listener.getsockname()[:2]
    greeting = (
        f"{service.name}: a cache of {engine.runner.cache.nbytes:,} bytes for {engine.cache_tokens:,} tokens, "
        f"{'no ' if service.template is None else ''}chat template, {'a' if api_key else 'no'} key needed\n"
        f"http://{f'[{host}]' if ':' in host else host}:{port}"
    )
    serve(service, listener, arguments.drain, greeting)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:  # the latter: no name of a host can be written like this
        raise UserError(f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}") from None
