"""How a full cache is shared out among requests that keep coming: what is computed twice, and how many run.

    python -m benchmarks.full_pool --out results.json

The engine's scheduler and block manager, with steps that take no time. Prompts and answers have random lengths within
the same bounds, and all requests wait from the start. Each line has the blocks kept free as they are, and none.
"""

from __future__ import annotations

import argparse
import random
import statistics
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from crosslayer.engine import Request, blocks
from crosslayer.engine.blocks import BlockManager
from crosslayer.engine.request import Sequence
from crosslayer.engine.scheduler import Scheduler
from crosslayer.environment import describe_environment
from crosslayer.files import write_json

BLOCK_SIZE = 32
STEP_TOKENS = 8192


class Load(NamedTuple):
    """Prompts and answers of `shortest` to `longest` tokens, in a pool of so many blocks."""

    shortest: int
    longest: int
    num_blocks: int
    num_requests: int


class Outcome(NamedTuple):
    """`repeated` tokens were computed again, as a share of those that had to be; `running` is the mean number of
    sequences under way while others waited."""

    preemptions: int
    repeated: float
    running: float


LOADS = (
    Load(50, 150, 120, 400),
    Load(50, 150, 600, 1500),
    Load(50, 150, 2000, 4000),
    Load(150, 450, 600, 400),
    Load(150, 450, 3000, 1500),
    Load(1000, 3000, 3000, 300),
    Load(1000, 3000, 12000, 1200),
)


def keeping_none_free() -> AbstractContextManager[Any]:
    return patch.object(blocks, "SPREAD", 0.0)


def simulate(load: Load, seed: int = 0) -> Outcome:
    chance = random.Random(seed)
    context = 2 * load.longest
    manager = BlockManager({context: load.num_blocks}, BLOCK_SIZE, context, prefix_caching=False)
    scheduler = Scheduler(manager, max_running=load.num_requests, max_step_tokens=STEP_TOKENS)
    needed = computed = 0
    for number in range(load.num_requests):
        prompt = (0,) * chance.randint(load.shortest, load.longest)
        limit = len(prompt) + chance.randint(load.shortest, load.longest)
        request = Request(str(number), prompt)
        scheduler.add(Sequence(request, 0, 0, limit, frozenset(), None, list(prompt)))
        needed += limit - 1  # the last token is not fed
    running = []
    while scheduler.waiting or scheduler.running:
        step = scheduler.schedule()
        scheduler.launched(step)
        computed += sum(item.new for item in step)
        if scheduler.waiting:
            running.append(len(scheduler.running))
        for sequence, _, draws in step:
            if draws:
                sequence.tokens.append(0)
                sequence.num_pending -= 1
                if len(sequence.tokens) == sequence.limit:
                    scheduler.remove(sequence)
    return Outcome(scheduler.num_preemptions, computed / needed - 1, statistics.fmean(running))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the results are written to")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(f"{'tokens':>12} {'blocks':>7} {'requests':>8} | {'preempted':>9} {'again':>6} {'running':>7} | keeping none")
    for load in LOADS:
        kept = simulate(load)
        with keeping_none_free():
            none = simulate(load)
        rows.append({**load._asdict(), "kept": kept._asdict(), "none": none._asdict()})
        line = f"{load.shortest:>5} to {load.longest:>4} {load.num_blocks:7,} {load.num_requests:8,}"
        for outcome in (kept, none):
            line += f" | {outcome.preemptions:9,} {outcome.repeated:6.1%} {outcome.running:7.1f}"
        print(line, flush=True)
    write_json(arguments.out, {"environment": describe_environment(), "rows": rows})


if __name__ == "__main__":
    main()
