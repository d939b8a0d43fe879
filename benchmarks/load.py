"""Load on a running server, and what its clients saw: throughput, time to first token, time between tokens.

    python -m benchmarks.load http://127.0.0.1:8000 --model tiny --clients 500 --seconds 120
    python -m benchmarks.load http://127.0.0.1:8000 --model tiny --rate 20 --seconds 60 --json out.json

With --clients, each sends its next request when the one before has ended; with --rate, requests arrive at that rate,
whether or not the server keeps up. Prompts are random token ids. Lengths are a number, A:B (uniform), or
lognormal:MEDIAN:SIGMA, cut to --longest.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from crosslayer.environment import describe_environment
from crosslayer.files import write_json

Lengths = Callable[[random.Random], int]


def parse_lengths(text: str, longest: int) -> Lengths:
    """A distribution as it is written on the command line.

    Raises:
        ValueError: it is none.
    """
    try:
        if text.startswith("lognormal:"):
            median, sigma = map(float, text.split(":")[1:])
            if not (0 < median < math.inf and 0 <= sigma < math.inf):
                raise ValueError
            middle, top = math.log(median), math.log(longest)  # cut as a logarithm, which no sigma makes too large
            return lambda rng: max(1, round(math.exp(min(top, rng.normalvariate(middle, sigma)))))
        low, colon, high = text.partition(":")
        bounds = int(low), int(high if colon else low)
        if not 1 <= bounds[0] <= bounds[1]:
            raise ValueError
    except ValueError:
        raise ValueError(f"lengths are a number, A:B or lognormal:MEDIAN:SIGMA, got {text!r}") from None
    return lambda rng: min(longest, rng.randint(*bounds))


def arrivals(rate: float, seconds: float, rng: random.Random, *, poisson: bool = True) -> Iterator[float]:
    """When requests come, `rate` of them a second: Poisson's way, or regularly. The first one comes at once."""
    due = 0.0
    while due < seconds:
        yield due
        due += rng.expovariate(rate) if poisson else 1 / rate


class Load:
    """Requests to one server, and their measures: seconds, and tokens where a chunk has one."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        address = urlsplit(arguments.url)
        self.host, self.port = address.hostname or "127.0.0.1", address.port or 80
        self.arguments = arguments
        self.rng = random.Random(arguments.seed)
        self.prompt_lengths = parse_lengths(arguments.prompt_tokens, arguments.longest)
        self.output_lengths = parse_lengths(arguments.output_tokens, arguments.longest)
        self.outcomes: Counter[str] = Counter()
        self.first: list[float] = []
        self.between: list[float] = []
        self.tokens = self.prompt_tokens = 0
        self.open = self.most_open = 0

    async def request(self) -> None:
        """One stream from beginning to end, unless it is one of those whose client vanishes."""
        rng, arguments = self.rng, self.arguments
        prompt = [rng.randrange(arguments.vocab_size) for _ in range(self.prompt_lengths(rng))]
        wanted = self.output_lengths(rng)
        vanish_after = rng.randrange(wanted) if rng.random() < arguments.vanish else None
        body = {"model": arguments.model, "prompt": prompt, "max_tokens": wanted, "stream": True, "ignore_eos": True}
        body |= {"temperature": arguments.temperature, "logprobs": 0}  # so that each token has a chunk of its own
        content = json.dumps(body).encode()
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            async with asyncio.timeout(arguments.timeout):
                self.outcomes[await self._stream(content, len(prompt), vanish_after)] += 1
        except TimeoutError:
            self.outcomes["timed out"] += 1
        except (OSError, asyncio.IncompleteReadError) as error:
            self.outcomes[type(error).__name__] += 1
        finally:
            self.open -= 1

    async def _stream(self, content: bytes, prompt_tokens: int, vanish_after: int | None) -> str:
        # Plain sockets, because a full HTTP client takes more of the CPU than the server does.
        sent = time.monotonic()
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n"
            if self.arguments.api_key:
                head += f"Authorization: Bearer {self.arguments.api_key}\r\n"
            head += f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
            writer.write(head.encode() + content)
            answer = await reader.readline()
            if not answer.endswith(b"\n"):
                return "broken off"
            status = int(answer.split()[1])
            if status != 200:
                return f"status {status}"
            self.prompt_tokens += prompt_tokens
            last, count = None, 0
            async for line in reader:
                if line.startswith(b"data: [DONE]"):
                    return "finished"
                if not line.startswith(b'data: {"id"'):
                    if line.startswith(b"data: "):
                        return "error event"
                    continue
                now = time.monotonic()
                if last is None:
                    self.first.append(now - sent)
                else:
                    self.between.append(now - last)
                last = now
                self.tokens += 1
                if count == vanish_after:
                    return "vanished"
                count += 1
            return "broken off"
        finally:
            writer.close()

    async def run(self) -> float:
        """The whole load; returns the seconds until the last answer."""
        arguments, started = self.arguments, time.monotonic()
        until = started + arguments.seconds

        async def client() -> None:
            while time.monotonic() < until:
                await self.request()

        async with asyncio.TaskGroup() as tasks:
            if arguments.rate is None:
                for _ in range(arguments.clients):
                    tasks.create_task(client())
            else:
                for due in arrivals(
                    arguments.rate, arguments.seconds, self.rng, poisson=arguments.arrivals == "poisson"
                ):
                    await asyncio.sleep(started + due - time.monotonic())
                    tasks.create_task(self.request())
        return time.monotonic() - started


def percentiles(seconds: list[float]) -> dict[str, float]:
    """In milliseconds."""
    ordered = sorted(seconds)
    places = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: 1000 * ordered[math.ceil(q * len(ordered)) - 1] for name, q in places.items()} if ordered else {}


def resident_mib(pid: int) -> float:
    """Memory of a process, on Linux."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


async def watch_memory(pid: int, samples: list[float]) -> None:
    while True:
        samples.append(resident_mib(pid))
        await asyncio.sleep(1)


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    load, memory = Load(arguments), list[float]()
    watch = asyncio.create_task(watch_memory(arguments.pid, memory)) if arguments.pid else None
    seconds = await load.run()
    if watch:
        watch.cancel()
    settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "api_key", "pid")}
    return {
        "settings": settings,
        "outcomes": dict(load.outcomes),
        "seconds": seconds,
        "most_open": load.most_open,
        "requests_per_second": load.outcomes["finished"] / seconds,
        "generated_tokens_per_second": load.tokens / seconds,
        "prompt_tokens_per_second": load.prompt_tokens / seconds,
        "time_to_first_token_ms": percentiles(load.first),
        "inter_token_ms": percentiles(load.between),
        "server_memory_mib": memory,
        "environment": describe_environment(),
    }


def report(result: dict[str, Any]) -> str:
    outcomes = ", ".join(f"{count:,} {name}" for name, count in result["outcomes"].items())
    lines = [
        f"requests             {outcomes}; at most {result['most_open']} open",
        f"throughput           {result['requests_per_second']:,.1f} requests/s, "
        f"{result['generated_tokens_per_second']:,.0f} tokens/s out, {result['prompt_tokens_per_second']:,.0f} in",
    ]
    for name in ("time_to_first_token_ms", "inter_token_ms"):
        figures = ", ".join(f"{key} {value:,.1f}" for key, value in result[name].items())
        lines.append(f"{name.removesuffix('_ms').replace('_', ' '):20} {figures} ms")
    if memory := result["server_memory_mib"]:
        quarters = ", ".join(f"{memory[len(memory) * part // 4 - (part == 4)]:,.0f}" for part in range(5))
        lines.append(f"server's memory      {quarters} MiB, at each quarter of the time")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("url")
    parser.add_argument("--model", required=True)
    load = parser.add_mutually_exclusive_group(required=True)
    load.add_argument("--clients", type=count, help="this many, one request after the other")
    load.add_argument("--rate", type=rate, help="requests a second")
    parser.add_argument("--arrivals", choices=("fixed", "poisson"), default="poisson", help="with --rate")
    parser.add_argument("--seconds", type=float, default=60, help="in which requests begin")
    parser.add_argument("--prompt-tokens", type=_lengths, default="lognormal:64:1")
    parser.add_argument("--output-tokens", type=_lengths, default="lognormal:64:1")
    parser.add_argument("--longest", type=count, default=256, help="tokens of a prompt, and of an output")
    parser.add_argument("--vocab-size", type=count, default=256, help="prompts are of token ids below it")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--vanish", type=float, default=0.0, help="share of clients that break off in the middle")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one request")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--api-key")
    parser.add_argument("--pid", type=int, help="also watch the memory of this process, on Linux")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def rate(text: str) -> float:
    if not 0 < (number := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return number


def _lengths(text: str) -> str:
    """Refused if they are none; kept as they are written, for the results."""
    try:
        parse_lengths(text, longest=1)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def main() -> None:
    arguments = parse()
    result = asyncio.run(measure(arguments))
    print(report(result))
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
