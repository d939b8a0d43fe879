"""Batches of requests to an engine: their prompts, the time they take, and the least that they could take."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from crosslayer.plan import ModelConfig
from crosslayer.plan.cost import BYTES_PER_ELEMENT, layer_weights

REPEATS = 3
# Seconds of timed runs after which there is no other one.
ENOUGH = 20.0

# Takes prompts as token ids, returns how many tokens each was continued with.
Generate = Callable[[list[list[int]]], Sequence[int]]


@dataclass(frozen=True)
class Workload:
    """Requests that are there from the start: `prompt_tokens` in and `new_tokens` out, each."""

    requests: int
    prompt_tokens: int
    new_tokens: int

    def __str__(self) -> str:
        return f"{self.requests} x ({self.prompt_tokens} in, {self.new_tokens} out)"

    @property
    def length(self) -> int:
        return self.prompt_tokens + self.new_tokens

    def prompts(self, vocab_size: int, seed: int) -> list[list[int]]:
        """Random token ids: no two prompts begin alike, so that nothing can be had from a prefix cache."""
        rng = random.Random(seed)
        return [rng.choices(range(vocab_size), k=self.prompt_tokens) for _ in range(self.requests)]


@dataclass(frozen=True)
class Ceilings:
    """What the card does at most: bytes per second of a copy (read and written), and FLOP/s of a bf16 matmul."""

    bytes_per_second: float
    flops: float

    def seconds(self, nbytes: float, flops: float) -> float:
        return max(nbytes / self.bytes_per_second, flops / self.flops)


def time_runs(generate: Generate, workload: Workload, vocab_size: int) -> list[float]:
    """Seconds of up to REPEATS runs, each with prompts of its own, after one that does not count.

    Raises:
        RuntimeError: a request did not get as many tokens as it was to get.
    """
    spent: list[float] = []
    for seed in range(1 + REPEATS):
        prompts = workload.prompts(vocab_size, seed)
        started = time.perf_counter()
        counts = generate(prompts)
        duration = time.perf_counter() - started
        if list(counts) != [workload.new_tokens] * workload.requests:
            raise RuntimeError(f"want {workload.new_tokens} new tokens of each request, got {sorted(set(counts))}")
        if seed:
            spent.append(duration)
        if sum(spent) > ENOUGH:
            break
    return spent


def least_seconds(config: ModelConfig, workload: Workload, ceilings: Ceilings, cache_dtype: str = "bf16") -> float:
    """The time of a workload if every step ran at the card's ceilings, weights in bf16, all requests at once.

    A step is made of matrix products, which read every weight W (two bytes each) once and do two FLOPs per weight and
    token, and of attention, which for each key that a token looks at does 4 * H * D FLOPs in each layer. The layers
    come one after the other, so for each of the two parts the larger of its bytes over the bandwidth and its FLOPs
    over the matmul rate counts, and the parts add up:

        prompts:  max(2 W / bandwidth, FLOPs / rate) + attention FLOPs / rate
        a token:  max(2 W / bandwidth, 2 W R / rate) + max(cache bytes / bandwidth, attention FLOPs / rate)

    for R requests. Attention to the cache reads the keys and values of every layer that looks at them: sharing saves
    memory, but a reader reads what its owner did (no card's second-level cache holds that much). The output layer
    counts for tokens that are drawn only, and so does, of a prompt, all that comes after the last keys and values that
    are stored. What is left out (norms, activations, drawing, writing the cache, the embedding) can only add to it.
    """
    plan, requests = config.plan, workload.requests
    layers = [layer_weights(config, layer) for layer in range(plan.num_layers)]
    output = config.vocab_size * config.hidden_size
    weights = sum(layers) + output
    key_flops = 4 * config.num_attention_heads * config.head_dim
    key_bytes = 2 * BYTES_PER_ELEMENT[cache_dtype] * config.num_key_value_heads * config.head_dim

    prompt, last = workload.prompt_tokens, workload.length - 1
    last_owner = plan.prefill_cut - 1
    products = output + sum(size * (prompt if layer < last_owner else 1) for layer, size in enumerate(layers))
    streams = plan.owns_keys(last_owner) + plan.owns_values(last_owner)
    products += (prompt - 1) * streams * config.hidden_size * config.num_key_value_heads * config.head_dim
    looked_at = sum(
        _keys(prompt, window) - (0 if layer < last_owner else _keys(prompt - 1, window))
        for layer, window in enumerate(plan.windows)
    )
    total = ceilings.seconds(2 * weights, 2 * products * requests) + ceilings.seconds(
        0, key_flops * looked_at * requests
    )

    # The first new token came of the prompt; the others look at what is before them and at themselves.
    steps = workload.new_tokens - 1
    read = requests * sum(_keys(last, window) - _keys(prompt, window) for window in plan.windows)
    total += steps * ceilings.seconds(2 * weights, 2 * weights * requests)
    return total + ceilings.seconds(key_bytes * read, key_flops * read)


def _keys(length: int, window: int | None) -> int:
    """Keys that the tokens of a sequence look at in one layer, added up."""
    window = length if window is None else min(window, length)
    return window * (window + 1) // 2 + (length - window) * window
