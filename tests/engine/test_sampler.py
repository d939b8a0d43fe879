"""Drawing against the probabilities it should have, worked out token by token in plain Python."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from crosslayer.engine import Request, SamplingParams
from crosslayer.engine.request import Sequence, TokenLogprobs
from crosslayer.engine.sampler import Draws, draw, uniform
from crosslayer.errors import UserError

LOGITS = torch.tensor([0.3, -1.0, 2.0, 0.5, -3.0, 1.9, 0.0, 1.2, -0.4, 0.9, -2.0, 1.0])


def drawing(
    params: SamplingParams,
    sample: int = 0,
    prompt: Iterable[int] = (),
    output: Iterable[int] = (),
    stop_ids: Iterable[int] = (),
) -> Sequence:
    """A sequence that draws its next token."""
    request = Request("name", tuple(prompt), params)
    return Sequence(request, sample, params.seed or 0, 99, frozenset(stop_ids), None, [*request.prompt, *output])


def results(logits: Tensor, rows: list[Sequence]) -> list[tuple[int, TokenLogprobs | None]]:
    return Draws.of(draw(logits, rows)).result()


def tokens(logits: Tensor, rows: list[Sequence]) -> list[int]:
    return [token for token, _ in results(logits, rows)]


def draws(logits: Tensor, params: SamplingParams, count: int) -> Tensor:
    """How often each token is drawn from logits [V]."""
    rows = [drawing(params, sample) for sample in range(count)]
    return torch.bincount(torch.tensor(tokens(logits.expand(count, -1), rows)), minlength=len(logits))


def exact(logits: Tensor, params: SamplingParams) -> Tensor:
    """The probabilities that temperature, then top-k, then top-p, then min-p leave, token by token."""
    weights = [math.exp(logit / params.temperature) for logit in logits.double().tolist()]
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    kept = order[: params.top_k or None]
    total = sum(weights[token] for token in kept)
    nucleus: list[int] = []
    for token in kept:
        nucleus.append(token)
        if sum(weights[t] for t in nucleus) >= params.top_p * total:
            break
    likely = [token for token in nucleus if weights[token] >= params.min_p * weights[order[0]]]
    total = sum(weights[token] for token in likely)
    return torch.tensor([weight / total if token in likely else 0.0 for token, weight in enumerate(weights)])


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.5, "seed": 1},
        {"temperature": 3.0},
        {"temperature": 1.0, "top_k": 4},
        {"temperature": 1.0, "top_k": 100},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 1.5, "top_p": 0.9},
        {"temperature": 1.2, "top_k": 8, "top_p": 0.7},
        {"temperature": 1.0, "top_p": 1e-9},
        {"temperature": 1.0, "min_p": 0.3},
        {"temperature": 2.0, "min_p": 0.4, "top_k": 6, "top_p": 0.95},
    ],
)
def test_frequencies_are_the_probabilities(settings: dict[str, Any]) -> None:
    """Pearson's statistic stays within five standard deviations of its mean, and nothing is drawn that is left out."""
    params = SamplingParams(**settings)
    count, expected = 20_000, exact(LOGITS, params)
    counted = draws(LOGITS, params, count)
    assert not counted[expected == 0].any()
    kept = expected > 0
    statistic = ((counted[kept] - count * expected[kept]) ** 2 / (count * expected[kept])).sum()
    freedom = int(kept.sum()) - 1
    assert statistic <= freedom + 5 * math.sqrt(2 * freedom) + 1e-9


@given(
    st.lists(st.integers(-6, 6), min_size=1, max_size=9),  # whole numbers, so that many are equal
    st.integers(0, 10),
    st.sampled_from([0.05, 0.3, 0.62, 0.9, 1.0]),
)
def test_only_what_top_k_and_top_p_leave_is_drawn(logits: list[int], top_k: int, top_p: float) -> None:
    params = SamplingParams(temperature=2.0, top_k=top_k, top_p=top_p)
    counted = draws(torch.tensor(logits, dtype=torch.float32), params, 100)
    assert not counted[exact(torch.tensor(logits), params) == 0].any()


def test_numbers_are_uniform_and_differ_by_seed_sample_and_position() -> None:
    numbers = {key: uniform(*key) for key in ((s, n, p) for s in range(10) for n in range(10) for p in range(100))}
    assert len(set(numbers.values())) == 10_000
    assert all(0 <= number < 1 for number in numbers.values())
    counts = torch.histc(torch.tensor(list(numbers.values())), bins=20, min=0, max=1)
    assert ((counts - 500) ** 2 / 500).sum() < 19 + 5 * math.sqrt(38)
    assert numbers[3, 4, 5] == uniform(3, 4, 5) != uniform(2**70, 4, 5)


def test_limits_of_sampling_are_greedy_or_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 300, generator=generator).bfloat16()
    logits[:, 7] = logits[:, 100] = 9.0  # equal maxima: greedy takes the first
    for settings in ({}, {"temperature": 1.0, "top_k": 1}, {"temperature": 5.0, "top_p": 1e-6}):
        rows = [drawing(SamplingParams(**settings), sample) for sample in range(50)]
        assert tokens(logits, rows) == [7] * 50
    logits[:, 100] = 8.0
    for settings in ({"temperature": 1e-3}, {"temperature": 1e-60}, {"temperature": 1.0, "min_p": 1.0}):
        rows = [drawing(SamplingParams(**settings), sample) for sample in range(50)]
        assert tokens(logits, rows) == [7] * 50
    counted = draws(LOGITS, SamplingParams(temperature=1e9), 12_000)
    assert counted.min() > 850
    assert counted.max() < 1150


def any_row(chance: random.Random) -> Sequence:
    def maybe(value: Any, default: Any) -> Any:
        return value if chance.random() < 0.5 else default

    params = SamplingParams(
        temperature=maybe(chance.uniform(0.3, 2), 0.0),
        top_k=maybe(chance.randint(1, 12), 0),
        top_p=maybe(chance.uniform(0.1, 1), 1.0),
        min_p=maybe(chance.uniform(0, 0.5), 0.0),
        repetition_penalty=maybe(chance.uniform(0.5, 2), 1.0),
        presence_penalty=maybe(chance.uniform(-1, 1), 0.0),
        frequency_penalty=maybe(chance.uniform(-1, 1), 0.0),
        min_tokens=maybe(5, 0),
        logprobs=maybe(chance.randint(0, 14), None),
        seed=chance.randint(0, 9),
    )
    history = [[chance.randrange(12) for _ in range(chance.randint(0, 9))] for _ in range(2)]
    return drawing(params, chance.randint(0, 3), *history, stop_ids=[chance.randrange(12)])


def test_no_row_depends_on_the_rows_beside_it() -> None:
    chance = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        rows = [any_row(chance) for _ in range(7)]
        logits = torch.randn(7, 12, generator=generator)
        kept = logits.clone()
        together = results(logits, rows)
        assert torch.equal(logits, kept)
        for number, row in enumerate(rows):
            ((token, logprobs),) = results(logits[number : number + 1], [row])
            assert token == together[number][0]
            assert (logprobs is None) == (together[number][1] is None)
            if logprobs is not None:
                other = together[number][1]
                assert other is not None
                assert logprobs.logprob == pytest.approx(other.logprob, abs=1e-6)
                assert [t for t, _ in logprobs.top] == [t for t, _ in other.top]


@pytest.mark.parametrize(
    ("settings", "formula"),
    [
        (
            {"repetition_penalty": 1.7},
            lambda x, prompt, output: (x / 1.7 if x > 0 else x * 1.7) if prompt + output else x,
        ),
        ({"presence_penalty": 0.8}, lambda x, prompt, output: x - 0.8 * bool(output)),
        ({"frequency_penalty": -0.3}, lambda x, prompt, output: x + 0.3 * output),
        (
            {"repetition_penalty": 0.6, "presence_penalty": -0.5, "frequency_penalty": 0.4},
            lambda x, prompt, output: (
                ((x / 0.6 if x > 0 else x * 0.6) if prompt + output else x) + 0.5 * bool(output) - 0.4 * output
            ),
        ),
    ],
)
def test_penalties(settings: dict[str, float], formula: Any) -> None:
    """The distribution with a penalty is that of logits changed by hand."""
    prompt, output = [2, 4, 4, 5], [5, 7, 2, 2, 1, 2]
    changed = [formula(x, prompt.count(t), output.count(t)) for t, x in enumerate(LOGITS.tolist())]
    assert changed != LOGITS.tolist()
    rows = [drawing(SamplingParams(temperature=1.0, **settings), n, prompt, output) for n in range(500)]
    plain = [drawing(SamplingParams(temperature=1.0), n, prompt, output) for n in range(500)]
    expected = tokens(torch.tensor(changed).expand(500, -1), plain)
    assert tokens(LOGITS.expand(500, -1), rows) == expected
    assert expected != tokens(LOGITS.expand(500, -1), plain)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"presence_penalty": 1e39}, {0}),
        ({"frequency_penalty": 1e300}, {0}),
        ({"frequency_penalty": -1e300}, {5}),
        ({"repetition_penalty": 1e-300}, {0, 2}),
        ({"top_p": 1e-300, "temperature": 5.0}, {2}),
    ],
)
def test_settings_that_float32_cannot_say(settings: dict[str, float], expected: set[int]) -> None:
    """They do what ever larger ones tend to."""
    logits = torch.where(torch.tensor([True, False, True, False, False, True] + 6 * [False]), LOGITS, 0.0)
    rows = [drawing(SamplingParams(**settings), n, [], [2, 2, 5, 5, 5]) for n in range(50)]
    assert set(tokens(logits.expand(50, -1), rows)) <= expected


def test_logprobs_are_the_models_own() -> None:
    params = SamplingParams(temperature=0.5, top_k=2, frequency_penalty=2.0, logprobs=3)
    (token, logprobs), (_, none), (_, only) = results(
        LOGITS.expand(3, -1),
        [drawing(params, output=[2]), drawing(SamplingParams()), drawing(SamplingParams(logprobs=0))],
    )
    total = math.log(sum(math.exp(x) for x in LOGITS.tolist()))
    assert none is None
    assert only is not None
    assert only.top == ()
    assert logprobs is not None
    assert logprobs.logprob == pytest.approx(LOGITS[token].item() - total, abs=1e-5)
    assert [t for t, _ in logprobs.top] == [2, 5, 7]
    assert [p for _, p in logprobs.top] == pytest.approx([2.0 - total, 1.9 - total, 1.2 - total], abs=1e-5)


def test_no_stop_token_before_min_tokens() -> None:
    params = SamplingParams(min_tokens=2)
    rows = [drawing(params, output=output, stop_ids=[2, 5]) for output in ([], [0], [0, 0])]
    assert tokens(LOGITS.expand(3, -1), rows) == [7, 7, 2]
    rows[1].num_pending = 1  # a second token that is drawn, but not known yet
    assert tokens(LOGITS.expand(3, -1), rows) == [7, 2, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature must not be negative, nor infinite, got -0.1"),
        ({"temperature": math.nan}, "temperature must not be negative, nor infinite, got nan"),
        ({"top_k": -1}, "top_k must not be negative"),
        ({"top_p": 0.0}, "top_p must lie above 0 and at most at 1, got 0.0"),
        ({"top_p": 1.1}, "top_p must lie above 0 and at most at 1, got 1.1"),
        ({"min_p": 1.5}, "min_p must lie between 0 and 1, got 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive"),
        ({"presence_penalty": math.inf}, "presence_penalty must be a number, got inf"),
        ({"max_tokens": 0}, "max_tokens must be positive"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens is 4, more than max_tokens, 3"),
        ({"stop": "text"}, "stop must be a tuple of texts, none of them empty, got 'text'"),
        ({"stop": ("a", "")}, "stop must be a tuple of texts, none of them empty"),
        ({"stop": (5,)}, "stop must be a tuple of texts, none of them empty, got (5,)"),
        ({"stop_token_ids": None}, "stop_token_ids must be a tuple of token ids, got None"),
        ({"max_tokens": 2.5}, "max_tokens must be a whole number, got 2.5"),
        ({"seed": "7"}, "seed must be a whole number, got '7'"),
        ({"logprobs": True}, "logprobs must be a whole number, got True"),
        ({"top_k": None}, "top_k must be a whole number, got None"),
        ({"n": 0}, "n must be positive"),
        ({"logprobs": -1}, "logprobs must not be negative"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        SamplingParams(**settings)
    assert message in str(raised.value)
