"""Generation against a loop without a cache, and sampling against exact probabilities."""

from __future__ import annotations

import pytest
import torch

from crosslayer.errors import UserError
from crosslayer.model import Transformer
from crosslayer.model.generate import Sampling, generate, make_cache, sample
from tests.conftest import BUILDABLE, tiny_config

PROMPTS = [[5, 9, 3], [7, 1, 2, 8, 4, 6, 3, 9, 12], [40]]


def rows(model: Transformer, prompts: list[list[int]], **options: object) -> list[list[int]]:
    steps = list(generate(model, prompts, **{"max_new_tokens": 12, **options}))  # type: ignore[arg-type]
    return [[step[row] for step in steps if step[row] is not None] for row in range(len(prompts))]  # type: ignore[misc]


@torch.no_grad()
def without_cache(model: Transformer, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("plan", BUILDABLE)
def test_greedy_rows_equal_an_uncached_loop(plan: str) -> None:
    model = Transformer(tiny_config(plan, initializer_range=0.3), seed=3).double()
    assert rows(model, PROMPTS) == [without_cache(model, prompt, 12) for prompt in PROMPTS]


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    model = Transformer(tiny_config("fusedkv-lite", initializer_range=0.2), seed=3).double()
    sampling = Sampling(temperature=1.0, seed=4)
    batch = rows(model, PROMPTS, sampling=sampling)
    assert rows(model, PROMPTS[:1], sampling=sampling)[0] == batch[0]
    assert rows(model, [PROMPTS[0], [33, 2], PROMPTS[2]], sampling=sampling)[2] == batch[2]
    assert rows(model, PROMPTS, sampling=sampling) == batch
    assert rows(model, PROMPTS, sampling=Sampling(temperature=1.0, seed=5)) != batch


def test_rows_end_with_end_of_text_which_is_not_given_out() -> None:
    free = Transformer(tiny_config("cla2", initializer_range=0.3), seed=3).double()
    expected = rows(free, PROMPTS)
    stop = expected[0][4]
    model = Transformer(tiny_config("cla2", initializer_range=0.3, eos_token_id=(stop, 60)), seed=3).double()
    cut = [row[: row.index(stop)] if stop in row else row for row in expected]
    assert rows(model, PROMPTS) == cut
    assert len({len(row) for row in cut}) > 1, "one row must end before another"


def test_cache_holds_half_with_half_the_owners() -> None:
    sizes = {
        plan: make_cache(Transformer(tiny_config(plan)), PROMPTS, 12).nbytes for plan in ("identity", "cla2", "cla3")
    }
    assert sizes["identity"] == 2 * sizes["cla2"] == 3 * sizes["cla3"]


LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(temperature=1.0), 6),
        (Sampling(temperature=0.5), 6),
        (Sampling(temperature=2.0, top_k=3), 3),
        (Sampling(temperature=1.0, top_p=0.8), 3),  # 0.56 + 0.21 < 0.8 <= ... + 0.12
        (Sampling(temperature=1.0, top_k=2, top_p=0.99), 2),
    ],
)
def test_frequencies_are_the_probabilities(sampling: Sampling, kept: int) -> None:
    exact = (LOGITS[:kept] / sampling.temperature).softmax(-1)
    draws, batch = 20_000, 100
    generators = [torch.Generator().manual_seed(row) for row in range(batch)]
    counts = torch.zeros(6)
    for _ in range(draws // batch):
        counts += sample(LOGITS.expand(batch, -1), sampling, generators).bincount(minlength=6)
    assert counts[kept:].sum() == 0
    chi_square = ((counts[:kept] - draws * exact) ** 2 / (draws * exact)).sum().item()
    assert chi_square < 25  # 5 degrees of freedom: exceeded once in 7,000 seeds


def test_top_k_of_one_is_greedy() -> None:
    generators = [torch.Generator().manual_seed(0)]
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1))
    assert sample(logits, Sampling(temperature=1.0, top_k=1), generators) == logits.argmax(-1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
    ],
)
def test_refuses_settings_out_of_range(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("prompts", [[], [[1], []]])
def test_refuses_empty_prompts(prompts: list[list[int]]) -> None:
    with pytest.raises(UserError, match="nothing to continue"):
        next(generate(Transformer(tiny_config()), prompts, max_new_tokens=1))
