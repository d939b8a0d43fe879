"""What half the cache buys where the cache limits the batch: throughput, and time to first token under load.

    python -m benchmarks.what_sharing_buys --out results.json
    python -m benchmarks.what_sharing_buys --out results.json --plot docs/images/what-sharing-buys.png

The paper's 3B shape with random weights in bf16: MQA and MQA-CLA2, each with a bf16 and an fp8 cache, over pools of
some sizes, for two kinds of requests: long prompts with short answers, and shorter prompts with long answers.

An engine is measured in the middle of its work. At the start its pool is filled with sequences at any stage of their
answers, evenly spread, whose keys and values are taken to be there already: zeros are, and no speed depends on them.

- Throughput: there are always requests waiting. After a while (`settle`), the tokens of some seconds are counted; and
  the requests that got their first and their last one. Where many more end than begin, the pool empties, and the
  throughput is more than can last.
- Time to first token: the pool is full, nobody waits, and requests come by chance (Poisson) at a rate, given as a share
  of what the unshared design with a bf16 cache managed with the same pool. Those of the second half of the time count.
  Whoever still waits for a token at the end counts with the time so far, which is less than it would be, and as
  `waiting`.

What the file has already is not measured again, and after --limit seconds nothing new is begun; run it again to go on.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch

from benchmarks.gpu import random_model
from benchmarks.load import arrivals, parse_lengths, percentiles
from benchmarks.sharing_report import Point, draw, table
from crosslayer.engine import Engine, EngineConfig, Output, Request, SamplingParams
from crosslayer.engine.config import CacheDtype
from crosslayer.engine.request import Sequence
from crosslayer.environment import describe_environment
from crosslayer.files import read_json, write_json
from crosslayer.plan import ModelConfig, parse_design, preset
from crosslayer.plan.cost import kv_bytes_per_token
from crosslayer.plan.units import parse_bytes

# The first one's throughput is what rates are shares of.
VARIANTS: tuple[tuple[str, CacheDtype], ...] = (
    ("MQA", "auto"),
    ("MQA-CLA2", "auto"),
    ("MQA", "fp8"),
    ("MQA-CLA2", "fp8"),
)


@dataclass(frozen=True)
class Mix:
    """Requests of a kind. Lengths of prompts and answers as `benchmarks.load` reads them, together `max_length`.
    Tokens are counted for so many seconds that some tens of requests end in them."""

    name: str
    prompt: str
    answer: str
    max_length: int
    counted: float

    def draw(self, rng: random.Random) -> tuple[int, int]:
        """Tokens of a prompt and of its answer."""
        return parse_lengths(self.prompt, self.max_length)(rng), parse_lengths(self.answer, self.max_length)(rng)

    @property
    def mean_answer(self) -> float:
        rng = random.Random(0)
        return sum(self.draw(rng)[1] for _ in range(10_000)) / 10_000


MIXES = (
    Mix("long prompts, short answers", "8192:16384", "256", 16640, counted=10.0),
    Mix("shorter prompts, long answers", "2048:4096", "1024:2048", 6144, counted=8.0),
)


@dataclass(frozen=True)
class Settings:
    """What is measured. `loaded` is the pool with which requests also come at rates, for `load` seconds at each."""

    shape: ModelConfig
    pools: tuple[int, ...]
    loaded: int
    mixes: tuple[Mix, ...] = MIXES
    shares: tuple[float, ...] = (0.9, 1.2)
    settle: float = 1.0
    load: float = 12.0
    max_running: int = 1024
    device: str = "cuda"


# Its multiples, without their whole parts, are spread evenly between 0 and 1, however many there are.
GOLDEN = (5**0.5 - 1) / 2


class Busy:
    """An engine with requests of one mix."""

    def __init__(self, engine: Engine, mix: Mix, vocab_size: int) -> None:
        self.engine, self.mix, self.vocab_size = engine, mix, vocab_size
        self.rng, self.ids = random.Random(0), count()
        self._begun: set[str] = set()
        self._stages = (number * GOLDEN % 1 for number in count())
        attach_prefix = engine.blocks.attach_prefix

        def attach(sequence: Sequence) -> None:
            # As if all were in the prefix cache: the sequence gets its blocks, and its last token is computed.
            attach_prefix(sequence)
            if sequence.request.id in self._begun and sequence.num_prefix is None:
                sequence.num_cached = len(sequence.tokens) - 1

        engine.blocks.attach_prefix = attach  # type: ignore[method-assign]

    def add(self, *, begun: bool = False) -> str:
        """One more request; one that has begun brings a part of its answer along, which is in the cache already."""
        prompt, answer = self.mix.draw(self.rng)
        done = int(answer * next(self._stages)) if begun else 0
        tokens = tuple(self.rng.choices(range(self.vocab_size), k=prompt + done))
        name = f"{self.mix.name} {next(self.ids)}"
        if begun:
            self._begun.add(name)
        self.engine.add(Request(name, tokens, SamplingParams(max_tokens=answer - done, ignore_eos=True)))
        return name

    def fill(self) -> None:
        """As many that have begun as there is room for; nobody waits then."""
        self._turn_away()
        while not self.engine.scheduler.waiting:
            for _ in range(32):
                self.add(begun=True)
            self.engine.step()
        self._turn_away()  # those that come to run from now on cost what they cost

    def _turn_away(self) -> None:
        for sequence in list(self.engine.scheduler.waiting):
            self.engine.abort(sequence.request.id)

    def saturated(self, seconds: float) -> Point:
        """Tokens, and requests that begin and that end, per second, and the mean number of sequences running, with
        requests waiting all the time."""
        tokens, begun, ended, running, steps = 0, 0, 0, 0, 0
        started = time.perf_counter()
        while (now := time.perf_counter()) < started + seconds:
            while len(self.engine.scheduler.waiting) < 4:
                self.add()
            for output in self.engine.step():
                tokens += output.token is not None
                ended += output.finish_reason is not None
                if output.request_id not in self._begun:
                    self._begun.add(output.request_id)
                    begun += 1
            running, steps = running + len(self.engine.scheduler.running), steps + 1
        rates = {"tokens_per_second": tokens, "begun_per_second": begun, "ended_per_second": ended}
        return {name: count / (now - started) for name, count in rates.items()} | {"running": running / steps}

    def loaded(self, rate: float, seconds: float) -> Point:
        """Time to first token of those that come in the second half of the time, in milliseconds."""
        self.fill()
        due = list(arrivals(rate, seconds, self.rng))
        came: dict[str, float] = {}
        first: dict[str, float] = {}
        started = time.perf_counter()
        while (now := time.perf_counter() - started) < seconds:
            while len(came) < len(due) and due[len(came)] <= now:
                came[self.add()] = due[len(came)]
            for output in self._step():
                if output.request_id in came and output.request_id not in first:
                    first[output.request_id] = time.perf_counter() - started - came[output.request_id]
        counted = [name for name, at in came.items() if at >= seconds / 2]
        waits = [first.get(name, now - came[name]) for name in counted]
        waiting = sum(name not in first for name in counted)
        return {"rate": rate, "requests": len(counted), "waiting": waiting, "ttft_ms": percentiles(waits)}

    def _step(self) -> list[Output]:
        if not self.engine.has_work:
            time.sleep(0.001)
        return self.engine.step()

    def stop(self) -> None:
        for name in self.engine.request_ids:
            self.engine.abort(name)
        while self.engine.has_work:
            self.engine.step()


def measure(settings: Settings, points: list[Point]) -> Iterator[Point]:
    """The points that are not there yet, one engine at a time."""
    for pool in settings.pools:
        for design, dtype in VARIANTS:
            there = {point["mix"] for point in points if _key(point) == (design, dtype, pool)}
            mixes = [mix for mix in settings.mixes if mix.name not in there]
            if not mixes:
                continue
            config = parse_design(design, settings.shape)
            # As many as could fit, because an engine prepares for each number of sequences up to that.
            shortest = min(int(mix.prompt.partition(":")[0]) for mix in settings.mixes)
            fitting = pool // kv_bytes_per_token(config, dtype.replace("auto", "bf16")) // shortest
            engine = Engine(
                random_model(config, settings.device, torch.bfloat16),
                config=EngineConfig(
                    cache_bytes=pool,
                    max_length=max(mix.max_length for mix in settings.mixes),
                    max_running=max(1, min(settings.max_running, fitting)),
                    prefix_caching=False,
                    cache_dtype=dtype,
                ),
            )
            for mix in mixes:
                busy = Busy(engine, mix, config.vocab_size)
                busy.fill()
                busy.saturated(settings.settle)
                before = engine.scheduler.num_preemptions
                point: Point = {"design": design, "cache_dtype": dtype, "pool": pool, "mix": mix.name}
                point |= {"cache_tokens": engine.cache_tokens, **busy.saturated(mix.counted)}
                point |= {"preemptions": engine.scheduler.num_preemptions - before, "load": []}
                if pool == settings.loaded:
                    unshared = next(
                        p for p in [*points, point] if _key(p) == (*VARIANTS[0], pool) and p["mix"] == mix.name
                    )
                    most = unshared["tokens_per_second"] / mix.mean_answer
                    point["load"] = [busy.loaded(share * most, settings.load) for share in settings.shares]
                busy.stop()
                points.append(point)
                yield point
            del engine, busy
            gc.collect()
            torch.cuda.empty_cache()


def _key(point: Point) -> tuple[str, str, int]:
    return point["design"], point["cache_dtype"], point["pool"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="results as JSON")
    parser.add_argument("--pools", default="4GiB,8GiB,16GiB", help="in this order (default: %(default)s)")
    parser.add_argument("--loaded", default="4GiB", help="the pool for time to first token (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=230, help="seconds (default: %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw what is in FILE, measure nothing")
    arguments = parser.parse_args()
    if arguments.plot:
        draw(read_json(arguments.out)["points"]).savefig(arguments.plot, dpi=150)
        return
    points = read_json(arguments.out)["points"] if arguments.out.exists() else []
    pools = tuple(parse_bytes(pool) for pool in arguments.pools.split(","))
    started = time.monotonic()
    for point in measure(Settings(preset("paper-3b"), pools, parse_bytes(arguments.loaded)), points):
        write_json(arguments.out, {"environment": describe_environment(), "points": points})
        print(table([point]).splitlines()[-1], flush=True)
        if time.monotonic() - started > arguments.limit:
            break
    print(table(points))


if __name__ == "__main__":
    main()
