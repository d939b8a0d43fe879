"""Scoring against a naive loop: every token once, with the context its window gives it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from crosslayer.data import TokenStream, Tokenizer
from crosslayer.errors import UserError
from crosslayer.evaluate import score
from crosslayer.model import Transformer
from tests.conftest import tiny_config

TEXTS = ["the cat sat on the mat, " * 6, "naïve café — 東京 " * 4, "zzz " * 12]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


@pytest.fixture(scope="module")
def stream(tokenizer: Tokenizer) -> TokenStream:
    return TokenStream.from_texts(tokenizer, TEXTS)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Transformer:
    config = tiny_config("cla2", vocab_size=tokenizer.vocab_size, initializer_range=0.3)
    return Transformer(config, seed=1).double()


def naive(model: Transformer, tokens: np.ndarray, length: int, stride: int, eos: int | None = None) -> list[float]:
    """The loss of tokens 1, 2, ..., each from the first window that predicts it, one at a time."""
    losses = []
    for target in range(1, len(tokens)):
        start = 0
        while start + length < target:
            start += stride
        context = tokens[start:target]
        if eos is not None and (ends := np.flatnonzero(context[:-1] == eos)).size:
            context = context[ends[-1] + 1 :]
        with torch.no_grad():
            logits = model(torch.tensor(context)[None])[0, -1]
        losses.append(-logits.log_softmax(-1)[tokens[target]].item())
    return losses


@pytest.mark.parametrize(("length", "stride"), [(16, 16), (16, 8), (16, 5), (7, 1), (1000, 1000)])
def test_equals_a_loop_over_tokens(model: Transformer, stream: TokenStream, length: int, stride: int) -> None:
    if length == 16 and stride == 5:
        assert (len(stream) - 1) % length  # the last window is not full
    losses = naive(model, stream.read(0, len(stream)), length, stride)
    result = score(model, stream, sequence_length=length, stride=stride, batch_size=3)
    assert result.tokens == len(stream) - 1
    assert result.total_loss == pytest.approx(sum(losses), rel=1e-9)


def test_packed_documents_see_only_themselves(model: Transformer, stream: TokenStream, tokenizer: Tokenizer) -> None:
    losses = naive(model, stream.read(0, len(stream)), 40, 40, eos=tokenizer.eos_id)
    masked = score(model, stream, sequence_length=40, mask_documents_at=tokenizer.eos_id)
    # RoPE angles are float32, and a packed document does not start at position 0.
    assert masked.total_loss == pytest.approx(sum(losses), rel=1e-6)
    assert masked.total_loss != pytest.approx(score(model, stream, sequence_length=40).total_loss, rel=1e-4)


def test_bytes_are_those_of_the_predicted_text(model: Transformer, stream: TokenStream, tokenizer: Tokenizer) -> None:
    result = score(model, stream, sequence_length=16)
    first = len(tokenizer.decode([int(stream.read(0, 1)[0])]).encode())
    assert result.num_bytes == sum(len(text.encode()) for text in TEXTS) - first
    assert result.bits_per_byte == pytest.approx(result.total_loss / math.log(2) / result.num_bytes)
    assert result.perplexity == pytest.approx(math.exp(result.total_loss / result.tokens))


def test_a_model_that_knows_nothing_scores_the_logarithm_of_its_vocabulary(stream: TokenStream) -> None:
    model = Transformer(tiny_config("yoco:window=5", vocab_size=300))
    torch.nn.init.zeros_(model.lm_head.weight)
    assert score(model, stream, sequence_length=16).loss == pytest.approx(math.log(300), rel=1e-6)


def test_stops_early_and_leaves_the_mode_alone(model: Transformer, stream: TokenStream) -> None:
    model.train()
    result = score(model, stream, sequence_length=16, max_tokens=20)
    assert result.tokens == 20
    assert model.training
    losses = naive(model, stream.read(0, 21), 16, 16)
    assert result.total_loss == pytest.approx(sum(losses), rel=1e-9)


@pytest.mark.parametrize("stride", [0, 17])
def test_refuses_a_stride_that_skips_tokens(model: Transformer, stream: TokenStream, stride: int) -> None:
    with pytest.raises(UserError, match="stride must lie between 1 and the window length 16"):
        score(model, stream, sequence_length=16, stride=stride)


def test_refuses_a_text_with_nothing_to_predict(model: Transformer, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="at least 2"):
        score(model, TokenStream.from_texts(tokenizer, []), sequence_length=16)
