"""The arithmetic of limits against figures worked out by hand, and against a count step by step."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from benchmarks.workloads import Ceilings, Workload, least_seconds, time_runs
from crosslayer.plan import ModelConfig, parse_design, preset
from crosslayer.plan.cost import layer_weights
from tests.conftest import tiny_config

SEEN = Ceilings(bytes_per_second=2.98e12, flops=772e12)


@pytest.mark.parametrize(
    ("workload", "tokens_per_second"),
    [(Workload(1, 512, 512), 1560), (Workload(64, 512, 128), 46_000), (Workload(512, 512, 256), 100_000)],
)
def test_limits_of_the_1b_shape(workload: Workload, tokens_per_second: float) -> None:
    """As they were estimated for one H100 before this was written: 1.9 GB of weights, 10 KiB of cache per token, and
    the output layer and all of the last layer at every token of a prompt."""
    config = parse_design("H128-MQA", preset("paper-1b"))
    besides = layer_weights(config, 19) + config.vocab_size * config.hidden_size
    seconds = least_seconds(config, workload, SEEN)
    seconds += 2 * besides * workload.requests * workload.prompt_tokens / SEEN.flops
    assert workload.requests * workload.new_tokens / seconds == pytest.approx(tokens_per_second, rel=0.05)


def count_steps(config: ModelConfig, workload: Workload, ceilings: Ceilings) -> float:
    """The same, by going through every step, layer and token."""
    plan, heads, dim, hidden = config.plan, config.num_attention_heads, config.head_dim, config.hidden_size
    matrices, stored = [], []
    for layer in range(plan.num_layers):
        streams = plan.owns_keys(layer) + plan.owns_values(layer)
        stored.append(hidden * streams * config.num_key_value_heads * dim)
        matrices.append(hidden * (2 * heads * dim + 3 * config.intermediate_size) + stored[-1])
    weights = sum(matrices) + hidden * config.vocab_size

    def step(positions: Sequence[int], reads_cache: bool) -> float:
        products, keys = hidden * config.vocab_size, 0
        for layer, window in enumerate(plan.windows):
            for position in positions:
                # Once all that is stored is there, only the last token goes on.
                if any(stored[layer + 1 :]) or position == positions[-1]:
                    products += matrices[layer]
                    keys += min(position + 1, window or position + 1)
                else:
                    products += stored[layer]
        flops = 4 * heads * dim * keys * workload.requests
        nbytes = 2 * 2 * config.num_key_value_heads * dim * keys * workload.requests if reads_cache else 0
        return max(2 * weights / ceilings.bytes_per_second, 2 * products * workload.requests / ceilings.flops) + max(
            nbytes / ceilings.bytes_per_second, flops / ceilings.flops
        )

    prompt = workload.prompt_tokens
    return step(range(prompt), False) + sum(
        step([position], True) for position in range(prompt, prompt + workload.new_tokens - 1)
    )


@pytest.mark.parametrize("design", ["identity", "cla2", "yoco:window=5", "0@5,1@5,1@5,1@5,1@5,0@5/0,1,0,3,1,3"])
@pytest.mark.parametrize("ceilings", [Ceilings(1e12, 1e9), Ceilings(1e9, 1e12), Ceilings(1e9, 4e9)])
def test_limits_are_those_of_every_step_added_up(design: str, ceilings: Ceilings) -> None:
    config, workload = tiny_config(design), Workload(3, 9, 7)
    assert least_seconds(config, workload, ceilings) == pytest.approx(count_steps(config, workload, ceilings))


def test_a_limit_with_8_bits_reads_half_the_cache() -> None:
    config, narrow = tiny_config("cla2"), Ceilings(1e3, 1e15)
    without = Workload(4, 20, 1)
    steps = [least_seconds(config, Workload(4, 20, 2), narrow, dtype) for dtype in ("bf16", "fp8")]
    weights = least_seconds(config, without, narrow)
    assert steps[1] - 2 * weights == pytest.approx((steps[0] - 2 * weights) / 2)


def test_prompts_are_distinct_and_differ_from_run_to_run() -> None:
    seen: list[list[int]] = []

    def generate(prompts: list[list[int]]) -> list[int]:
        seen.extend(prompts)
        return [2] * len(prompts)

    spent = time_runs(generate, Workload(3, 8, 2), vocab_size=50)
    assert len(spent) == 3
    assert {len(prompt) for prompt in seen} == {8}
    assert len({tuple(prompt[:4]) for prompt in seen}) == len(seen) == 12


def test_too_few_tokens_are_no_result() -> None:
    with pytest.raises(RuntimeError, match=r"want 3 new tokens of each request, got \[2, 3\]"):
        time_runs(lambda prompts: [2, 3], Workload(2, 4, 3), vocab_size=50)
