"""What the engine's own work on a step costs, without a model: scheduling, tokens, texts, outputs.

    python -m benchmarks.engine_overhead --out results.json

Tokens are made up, in the order of steps of a GPU: a step is launched before the tokens of the one before it are
collected. What is measured is the CPU time of `Engine.step`, which a GPU waits for where its own step takes less. All
sequences start together, so they take their blocks in the same steps, and end in one.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from crosslayer.data import Tokenizer
from crosslayer.engine import Engine, EngineConfig, Request, SamplingParams
from crosslayer.engine.sampler import Drawn, Draws
from crosslayer.engine.scheduler import Scheduled
from crosslayer.environment import describe_environment
from crosslayer.files import write_json
from crosslayer.model import Transformer
from crosslayer.plan import ModelConfig, parse_plan

PROMPT, NEW = 512, 256
LAYERS = 4
TEXT = "three cats sat on seven mats and ate some rats " * 20
DESIGNS = ("cla2", "yoco:window=128")


def make_engine(design: str, tokenizer: Tokenizer, sequences: int, *, texts: bool) -> Engine:
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=LAYERS,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=PROMPT + NEW,
        sharing_plan=parse_plan(design, LAYERS),
    )
    settings = EngineConfig(max_running=sequences, max_step_tokens=sequences * PROMPT)
    engine = Engine(Transformer(config), tokenizer if texts else None, settings)
    tokens = torch.tensor(tokenizer.encode(TEXT))

    def launch(step: Sequence[Scheduled]) -> Draws:
        """Compute nothing: the next token is any one of the text's."""
        return Draws.of(Drawn(tokens[torch.randint(len(tokens), (sum(item.draws for item in step),))]))

    engine.runner.launch = launch  # type: ignore[method-assign]
    engine.runner.overlaps = True
    return engine


def measure(engine: Engine, sequences: int, vocab_size: int) -> dict[str, float]:
    """Of the first step, with all prompts, and of those in which every sequence gains a token."""
    chance = random.Random(0)
    for number in range(sequences):
        prompt = tuple(chance.randrange(vocab_size) for _ in range(PROMPT))
        engine.add(Request(str(number), prompt, SamplingParams(max_tokens=NEW, ignore_eos=True)))
    times = []
    while engine.has_work:
        start = time.thread_time()
        engine.step()
        times.append(time.thread_time() - start)
    first, *rest = times
    return {
        "us_per_prompt": 1e6 * first / sequences,
        "us_per_token": 1e6 * statistics.fmean(rest) / sequences,
        "median_step_ms": 1e3 * statistics.median(rest),
        "slowest_step_ms": 1e3 * max(rest),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="results as JSON")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.train([TEXT], 280)
    results: dict[str, Any] = {"environment": describe_environment(), "prompt": PROMPT, "new": NEW, "rows": []}
    print(f"{'design':16} texts sequences  us/prompt  us/token  median step  slowest step")
    for design in DESIGNS:
        for texts in (False, True):
            for sequences in (1, 64, 512):
                engine = make_engine(design, tokenizer, sequences, texts=texts)
                row = measure(engine, sequences, tokenizer.vocab_size)
                results["rows"].append({"design": design, "texts": texts, "sequences": sequences, **row})
                print(
                    f"{design:16} {'yes' if texts else 'no':5} {sequences:9} {row['us_per_prompt']:10.1f}"
                    f"{row['us_per_token']:10.2f} {row['median_step_ms']:9.3f} ms {row['slowest_step_ms']:10.3f} ms",
                    flush=True,
                )
    write_json(arguments.out, results)


if __name__ == "__main__":
    main()
