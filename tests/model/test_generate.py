"""Generation against the plain loop without a cache, and sampling against the probabilities it should have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from crosslayer.errors import UserError
from crosslayer.model import Transformer
from crosslayer.model.generate import GREEDY, Sampling, generate, make_cache, sample
from tests.conftest import tiny_config
from tests.model.checks import random_model

DESIGNS = ("cla2", "cla3:rest=last", "yoco:window=5", "fusedkv-lite", "0@3,0@7,0@5,3@4,3,3@2", "identity")
PROMPTS = ([3, 14, 15, 9, 2, 6], [5], [35, 8, 9, 7, 9, 32, 38, 46, 2, 6], [27, 1, 8])
SAMPLED = Sampling(temperature=0.8, top_k=30, top_p=0.95, seed=3)


def rows_of(model: Transformer, prompts: Sequence[Sequence[int]], tokens: int, sampling: Sampling) -> list[list[int]]:
    """What each row gets, as one list a row."""
    steps = list(generate(model, prompts, max_new_tokens=tokens, sampling=sampling))
    assert all(len(step) == len(prompts) for step in steps)
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]


@torch.no_grad()
def greedy(model: Transformer, prompt: Sequence[int], tokens: int) -> list[int]:
    """Without a cache: the whole text goes through the model for every token."""
    ids = list(prompt)
    for _ in range(tokens):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("design", DESIGNS)
def test_greedy_rows_are_those_of_the_plain_loop(design: str) -> None:
    model = random_model(tiny_config(design))
    expected = [greedy(model, prompt, 12) for prompt in PROMPTS]
    assert rows_of(model, PROMPTS, 12, GREEDY) == expected
    assert len({tuple(row) for row in expected}) == len(expected)


@pytest.mark.parametrize("design", DESIGNS)
def test_sampled_rows_do_not_depend_on_their_neighbours(design: str) -> None:
    model = random_model(tiny_config(design))
    together = rows_of(model, PROMPTS, 12, SAMPLED)
    assert together != rows_of(model, PROMPTS, 12, GREEDY)
    for row, prompt in enumerate(PROMPTS):
        neighbours = [[40 + position] * (1 + 3 * position) for position in range(len(PROMPTS) + 2)]
        neighbours[row] = list(prompt)
        assert rows_of(model, neighbours, 12, SAMPLED)[row] == together[row]
    assert rows_of(model, PROMPTS[:1], 12, SAMPLED)[0] == together[0]


def test_seeds() -> None:
    model = random_model(tiny_config())

    def continuations(seed: int) -> list[list[int]]:
        return rows_of(model, [PROMPTS[0]] * 3, 12, replace(SAMPLED, seed=seed))

    assert continuations(0) == continuations(0)
    assert len({tuple(row) for seed in (0, 1, 2, -1, 2**70) for row in continuations(seed)}) == 15


def test_a_row_stops_at_the_end_of_text() -> None:
    free = random_model(tiny_config())
    expected = [greedy(free, prompt, 12) for prompt in PROMPTS]
    stop = expected[0][4]  # row 0 ends here; other rows where they meet it, or not at all
    ends = [row.index(stop) if stop in row else len(row) for row in expected]
    assert max(ends) == 12
    for eos in (stop, (60, stop)):
        model = random_model(tiny_config(eos_token_id=eos))
        steps = list(generate(model, PROMPTS, max_new_tokens=12))
        assert [[step[row] for step in steps] for row in range(len(PROMPTS))] == [
            row[:end] + [None] * (12 - end) for row, end in zip(expected, ends, strict=True)
        ]
    # Nothing goes on when every row has ended.
    assert len(list(generate(model, PROMPTS[:1], max_new_tokens=12))) == ends[0]


def test_a_given_cache_is_used_and_is_as_small_as_the_plan_says() -> None:
    shared, plain = (random_model(tiny_config(design)) for design in ("cla2", "identity"))
    caches = [make_cache(model, PROMPTS, 5) for model in (shared, plain)]
    assert caches[1].nbytes == 2 * caches[0].nbytes == 2 * 6 * len(PROMPTS) * (10 + 5) * 2 * 10 * 4
    steps = list(generate(shared, PROMPTS, max_new_tokens=5, cache=caches[0]))
    assert len(steps) == 5
    assert caches[0].lengths.tolist() == [len(prompt) + 4 for prompt in PROMPTS]  # the last token is not fed back


def test_bfloat16_models_have_a_bfloat16_cache() -> None:
    model = random_model(tiny_config()).bfloat16()
    assert make_cache(model, PROMPTS, 5).keys[0].dtype == torch.bfloat16
    assert rows_of(model, PROMPTS, 5, GREEDY)[1] == greedy(model, PROMPTS[1], 5)


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []]])
def test_nothing_to_continue(prompts: list[list[int]]) -> None:
    with pytest.raises(UserError, match="nothing to continue"):
        list(generate(random_model(tiny_config()), prompts, max_new_tokens=1))


# -- sampling -----------------------------------------------------------------------------------------------------


def draws(logits: Tensor, sampling: Sampling, count: int) -> Tensor:
    """How often each token is drawn from logits [V]."""
    generators = [torch.Generator().manual_seed(sampling.seed)] * count
    tokens = sample(logits.expand(count, -1), sampling, generators)
    return torch.bincount(tokens, minlength=len(logits))


def exact(logits: Tensor, sampling: Sampling) -> Tensor:
    """The probabilities that temperature, then top-k, then top-p leave, token by token."""
    weights = [math.exp(logit / sampling.temperature) for logit in logits.double().tolist()]
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    kept = order[: sampling.top_k or None]
    total = sum(weights[token] for token in kept)
    nucleus: list[int] = []
    for token in kept:
        nucleus.append(token)
        if sum(weights[t] for t in nucleus) >= sampling.top_p * total:
            break
    total = sum(weights[token] for token in nucleus)
    return torch.tensor([weight / total if token in nucleus else 0.0 for token, weight in enumerate(weights)])


LOGITS = torch.tensor([0.3, -1.0, 2.0, 0.5, -3.0, 1.9, 0.0, 1.2, -0.4, 0.9, -2.0, 1.0])


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.5, seed=1),
        Sampling(temperature=3.0),
        Sampling(temperature=1.0, top_k=4),
        Sampling(temperature=1.0, top_k=100),
        Sampling(temperature=1.0, top_p=0.6),
        Sampling(temperature=1.5, top_p=0.9),
        Sampling(temperature=1.2, top_k=8, top_p=0.7),
        Sampling(temperature=1.0, top_p=1e-9),
    ],
)
def test_frequencies_are_the_probabilities(sampling: Sampling) -> None:
    """Pearson's statistic stays within five standard deviations of its mean, and nothing is drawn that is left out."""
    count, expected = 20_000, exact(LOGITS, sampling)
    counted = draws(LOGITS, sampling, count)
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
    sampling = Sampling(temperature=2.0, top_k=top_k, top_p=top_p)
    counted = draws(torch.tensor(logits, dtype=torch.float32), sampling, 200)
    assert not counted[exact(torch.tensor(logits), sampling) == 0].any()


def test_limits_of_sampling_are_greedy_or_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 300, generator=generator).bfloat16()
    logits[:, 7] = logits[:, 100] = 9.0  # equal maxima: greedy takes the first
    expected = logits.argmax(dim=-1)
    assert set(expected.tolist()) == {7}
    generators = [torch.Generator().manual_seed(row) for row in range(50)]
    for sampling in (GREEDY, Sampling(temperature=1.0, top_k=1), Sampling(temperature=5.0, top_p=1e-6)):
        assert torch.equal(sample(logits, sampling, generators), expected)
    logits[:, 100] = 8.0
    for temperature in (1e-3, 1e-30):  # so low that 1 / temperature overflows
        assert torch.equal(sample(logits, Sampling(temperature=temperature), generators), expected)
    counted = draws(LOGITS, Sampling(temperature=1e9), 12_000)
    assert counted.min() > 850
    assert counted.max() < 1150


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature must not be negative, got -0.1"),
        ({"temperature": math.nan}, "temperature must not be negative, got nan"),
        ({"top_k": -1}, "top_k must not be negative"),
        ({"top_p": 0.0}, "top_p must lie above 0 and at most at 1, got 0.0"),
        ({"top_p": 1.1}, "top_p must lie above 0 and at most at 1, got 1.1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**settings)  # type: ignore[arg-type]
