"""Scores against a naive loop: every prediction by itself, in float64."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import pytest
import torch

from crosslayer.data import Tokenizer, TokenStream
from crosslayer.errors import UserError
from crosslayer.evaluate import Score, score
from crosslayer.evaluate.perplexity import document_losses
from crosslayer.model import Transformer
from tests.conftest import tiny_config
from tests.model.checks import random_model

TEXTS = ("The cat sat.\n", "A longer text, with an ümlaut and a 猫 in it: it goes on and on.\n", "", "x", "End.")


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 290)


def stream(*texts: str) -> TokenStream:
    return TokenStream.from_texts(tokenizer(), texts or TEXTS)


def shared_model(design: str = "cla2") -> Transformer:
    return random_model(tiny_config(design, vocab_size=300)).double()


@torch.no_grad()
def naive(model: Transformer, ids: list[int], length: int, stride: int, limit: int, eos_id: int | None) -> float:
    """Total loss of targets 1 to `limit`, each given the text from the first window that reaches it."""
    total = 0.0
    for target in range(1, limit + 1):
        start = 0
        while target > start + length:
            start += stride
        if eos_id is not None:  # from the document of the token before the target
            for position in range(start, target - 1):
                if ids[position] == eos_id:
                    start = position + 1
        logits = model(torch.tensor([ids[start:target]]))[0, -1]
        total -= float(logits.log_softmax(dim=-1)[ids[target]])
    return total


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("max_tokens", [None, 1, 16, 23])
@pytest.mark.parametrize(("length", "stride"), [(8, None), (8, 8), (8, 3), (8, 1), (16, 5), (1, 1), (1000, 7)])
def test_every_token_is_scored_once_with_the_context_of_its_window(
    length: int, stride: int | None, max_tokens: int | None, mask: bool
) -> None:
    model, text = shared_model("cla3"), stream()
    ids = text.read(0, len(text)).tolist()
    eos_id = tokenizer().eos_id if mask else None
    limit = min(max_tokens or len(ids) - 1, len(ids) - 1)
    result = score(
        model,
        text,
        sequence_length=length,
        stride=stride,
        batch_size=3,
        max_tokens=max_tokens,
        mask_documents_at=eos_id,
    )
    assert result.tokens == limit
    assert result.num_bytes == text.read_bytes(1, limit + 1).sum()
    expected = naive(model, ids, length, stride or length, limit, eos_id)
    # Not 1e-12: a masked document starts at another position, and the tables of RoPE are float32.
    assert result.total_loss == pytest.approx(expected, rel=1e-7)


def test_more_context_and_masks_make_a_difference() -> None:
    model, text = shared_model(), stream()
    losses = [
        score(model, text, sequence_length=8, stride=stride, mask_documents_at=eos_id).loss
        for stride, eos_id in ((8, None), (2, None), (8, tokenizer().eos_id))
    ]
    assert min(abs(a - b) for a in losses for b in losses if a is not b) > 1e-3


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_the_batch_size_changes_nothing(batch_size: int) -> None:
    model, text = shared_model("yoco:window=5"), stream()
    expected = score(model, text, sequence_length=8, stride=3, batch_size=16)
    result = score(model, text, sequence_length=8, stride=3, batch_size=batch_size)
    assert result.total_loss == pytest.approx(expected.total_loss, rel=1e-12)
    assert (result.tokens, result.num_bytes) == (expected.tokens, expected.num_bytes)


def test_a_model_that_knows_nothing() -> None:
    """All logits 0: ln V nats a token, whatever the text; the bits are spread over the bytes of the text."""
    model, text = shared_model(), stream()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    result = score(model, text, sequence_length=8)
    assert result.loss == pytest.approx(math.log(300), rel=1e-12)
    assert result.perplexity == pytest.approx(300, rel=1e-12)
    first = len(tokenizer().decode(text.read(0, 1).tolist()).encode())  # the first token is not predicted
    total = sum(len(item.encode()) for item in TEXTS)
    assert result.num_bytes == total - first
    assert result.bits_per_byte == pytest.approx((len(text) - 1) * math.log2(300) / (total - first), rel=1e-12)


def test_score_as_numbers() -> None:
    result = Score(total_loss=6 * math.log(2), tokens=3, num_bytes=12)
    assert result.to_dict() == {
        "loss": pytest.approx(2 * math.log(2)),
        "perplexity": pytest.approx(4),
        "bits_per_byte": pytest.approx(0.5),
        "tokens": 3,
        "bytes": 12,
    }
    assert Score(2000.0, 1, 1).perplexity == math.inf
    assert math.isnan(Score(1.0, 1, 0).bits_per_byte)


def test_it_works_on_the_side() -> None:
    """It reports how far it is, leaves no gradients, and leaves the model in the mode in which it was."""
    model, text = shared_model(), stream()
    seen: list[tuple[int, int]] = []
    for mode in (True, False):
        model.train(mode)
        score(model, text, sequence_length=8, batch_size=2, progress=lambda *now: seen.append(now))
        assert model.training == mode
    total = len(text) - 1
    half = [(min(done, total), total) for done in range(16, total + 16, 16)]
    assert seen == half * 2
    assert all(parameter.grad is None for parameter in model.parameters())


def test_mistakes() -> None:
    model = shared_model()
    for texts, tokens in (((), 0), (("",), 1)):
        with pytest.raises(UserError, match=f"the text has {tokens} tokens; at least 2 are needed"):
            score(model, TokenStream.from_texts(tokenizer(), texts), sequence_length=8)
    for stride in (0, -1, 9):
        with pytest.raises(UserError, match=f"stride must lie between 1 and the window length 8, got {stride}"):
            score(model, stream(), sequence_length=8, stride=stride)


def test_losses_by_document_add_up_to_the_score() -> None:
    """And are those of each document's own tokens, its end-of-text token included."""
    model, text = shared_model("cla3"), stream()
    ids = text.read(0, len(text)).tolist()
    losses, tokens = document_losses(model, text, sequence_length=8, eos_id=tokenizer().eos_id)
    whole = score(model, text, sequence_length=8)
    assert losses.sum() == pytest.approx(whole.total_loss, rel=1e-9)
    assert tokens.sum() == whole.tokens
    assert tokens.tolist() == [len(tokenizer().encode(item)) + 1 - (number == 0) for number, item in enumerate(TEXTS)]
    ends = [place for place, token in enumerate(ids) if token == tokenizer().eos_id]
    totals = [0.0, *(naive(model, ids, 8, 8, end, None) for end in ends)]
    assert losses == pytest.approx([b - a for a, b in pairwise(totals)], rel=1e-6)
