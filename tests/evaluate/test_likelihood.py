"""Batched scores against one forward pass a token, over full logits, unpadded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from crosslayer.errors import UserError
from crosslayer.evaluate.likelihood import Request, score_requests
from crosslayer.evaluate.uncertainty import mean_and_error, ratio_and_error
from crosslayer.model import Transformer
from tests.evaluate.models import shared_model


def requests(context: int, count: int = 12) -> list[Request]:
    """Of lengths from 2 to half as long again as the context, a part of each to be scored."""
    draw = np.random.default_rng(0)
    found = []
    for number in range(count):
        length = 2 + number * (context * 3 // 2 - 2) // (count - 1)
        start = int(draw.integers(max(1, length - context), length))
        found.append(Request(draw.integers(300, size=length).tolist(), start))
    return found


@torch.no_grad()
def naive(model: Transformer, request: Request, context: int) -> tuple[list[float], list[bool]]:
    """The last `context` + 1 tokens, each from the logits after those before it."""
    log_probs, greedy = [], []
    first = max(0, len(request.ids) - context - 1)
    for position in range(request.start, len(request.ids)):
        logits = model(torch.tensor([request.ids[first:position]]))[0, -1]
        log_probs.append(float(logits.log_softmax(0)[request.ids[position]]))
        greedy.append(int(logits.argmax()) == request.ids[position])
    return log_probs, greedy


@pytest.mark.parametrize("batch_tokens", [1, 100, 10**6])
@pytest.mark.parametrize("design", ["cla2", "yoco:window=5", "fusedkv-lite"])
def test_each_request_is_scored_as_if_alone(design: str, batch_tokens: int) -> None:
    model, asked = shared_model(design), requests(64)
    for request in asked[::3]:  # so that some tokens are the likeliest
        request.ids[-1] = int(model(torch.tensor([request.ids[-65:-1]]))[0, -1].argmax())  # type: ignore[index]
    results = score_requests(model, asked, batch_tokens=batch_tokens)
    assert sum(result.greedy.sum() for result in results) >= 4
    for request, result in zip(asked, results, strict=True):
        log_probs, greedy = naive(model, request, 64)
        np.testing.assert_allclose(result.log_probs, log_probs, rtol=1e-6, atol=1e-8)  # RoPE's tables are float32
        assert result.greedy.tolist() == greedy


def test_logits_in_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = shared_model(), requests(64)
    whole = score_requests(model, asked)
    monkeypatch.setattr("crosslayer.evaluate.likelihood._LOGITS_AT_A_TIME", 7 * 300)
    for one, other in zip(whole, score_requests(model, asked), strict=True):
        np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=1e-12)


def test_a_gpu_meets_few_shapes() -> None:
    model, shapes = shared_model(), set()

    def note(module: torch.nn.Module, arguments: tuple[torch.Tensor], output: torch.Tensor) -> None:
        shapes.add(arguments[0].shape)

    model.model.register_forward_hook(note)
    score_requests(model, requests(64, 200), batch_tokens=256)
    assert {width for _, width in shapes} == {16, 32, 64}
    assert len(shapes) <= 6
    assert all(rows * width <= 256 for rows, width in shapes)


def test_it_works_on_the_side() -> None:
    model, seen = shared_model(), list[Sequence[int]]()
    model.train()
    score_requests(model, requests(64), batch_tokens=128, progress=lambda *now: seen.append(now))
    assert model.training
    assert seen[0] == (0, 12)
    assert seen[-1] == (12, 12)
    assert score_requests(model, []) == []


def test_more_to_score_than_the_context_holds() -> None:
    model = shared_model(context=8)
    score_requests(model, [Request([1] * 20, 12)])
    with pytest.raises(UserError, match="9 tokens are to be scored at once, but the model's context is 8"):
        score_requests(model, [Request([1] * 20, 11)])


def test_standard_errors_are_those_of_resampling() -> None:
    """Of means and ratios, against the spread over many resamples."""
    draw = np.random.default_rng(0)
    sizes = draw.integers(50, 500, size=200).astype(float)
    amounts = sizes * draw.normal(3, 0.5, size=200) + draw.normal(0, 40, size=200)
    picks = draw.integers(200, size=(4000, 200))
    for (value, error), resampled in (
        (mean_and_error(amounts), amounts[picks].mean(axis=1)),
        (ratio_and_error(amounts, sizes), amounts[picks].sum(axis=1) / sizes[picks].sum(axis=1)),
    ):
        assert value == pytest.approx(resampled.mean(), rel=0.01)
        assert error == pytest.approx(resampled.std(), rel=0.05)
    assert mean_and_error([3.0]) == (3.0, None)
    assert ratio_and_error(np.array([6.0]), np.array([2.0])) == (3.0, None)
