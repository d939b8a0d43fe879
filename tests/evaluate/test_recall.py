"""Recall: what the rows hold, what readers that look things up would get, and scores against single forward passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from crosslayer.data import Tokenizer
from crosslayer.errors import UserError
from crosslayer.evaluate import recall
from crosslayer.evaluate.likelihood import Request, Scored
from crosslayer.evaluate.recall import WORDS, common_words, score_recall
from crosslayer.model import Transformer
from tests.conftest import tiny_config
from tests.evaluate.models import shared_model
from tests.evaluate.models import tokenizer as small_tokenizer
from tests.model.checks import random_model


@cache
def tokenizer() -> Tokenizer:
    """With a hundred words of three letters that are a token each."""
    words = [a + b + c for a in "abcde" for b in "fghij" for c in "klmn"]
    return Tokenizer.train([" ".join(["X", *words, ""]) * 3], 900)


def model(design: str = "cla2", context: int = 128) -> Transformer:
    config = tiny_config(design, vocab_size=tokenizer().vocab_size, max_position_embeddings=context)
    return random_model(config).double()


def asked_for(monkeypatch: pytest.MonkeyPatch, reach: int) -> tuple[list[recall.Recall], list[Request]]:
    """Results, and the requests behind them, where what was read up to `reach` tokens ago is looked up, and words that
    were not are guessed evenly."""
    asked: list[Request] = []

    def look_up(model: Transformer, requests: Sequence[Request], **_: Any) -> list[Scored]:
        asked.extend(requests)
        found = []
        for request in requests:
            ids, hits = list(request.ids), []
            for place in range(request.start, len(ids)):
                seen = ids[max(0, place - reach) : place - 1]
                hits.append(
                    ids[place - 1] in seen and ids[max(0, place - reach) + seen.index(ids[place - 1]) + 1] == ids[place]
                )
            found.append(Scored(np.where(hits, 0.0, -math.log(100)), np.array(hits)))
        return found

    monkeypatch.setattr(recall, "score_requests", look_up)
    return score_recall(model(), tokenizer(), rows=3), asked


def test_the_passage_is_found_as_far_as_one_can_look(monkeypatch: pytest.MonkeyPatch) -> None:
    for reach in (200, 60, 5):
        for result in asked_for(monkeypatch, reach)[0]:
            reached = result.distance + 1 <= reach
            assert result.accuracy == reached
            assert result.gain == pytest.approx(math.log(100) if reached else 0)
            assert result.loss == pytest.approx(0 if reached else math.log(100))
            assert result.chance == 1 / 100


def test_rows_are_what_they_are_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    results, asked = asked_for(monkeypatch, 200)
    words = set(common_words(tokenizer()))
    assert [result.length for result in results] == [128] * 5 + [64] * 5
    assert [result.distance for result in results] == [112, 88, 64, 40, 16, 48, 40, 32, 24, 16]
    for number, request in enumerate(asked):
        length = (128, 64)[number // 18]
        depth = number % 6  # the last of six is the row without an earlier copy
        ids = list(request.ids)
        passage = ids[-WORDS:]
        assert (len(ids), request.start) == (length, length - WORDS + 1)
        assert set(ids) <= words
        assert len(set(passage)) == WORDS
        copies = [at for at in range(length - WORDS) if ids[at : at + WORDS] == passage]
        assert [length - WORDS - at for at in copies] == (
            [results[number // 18 * 5 + depth].distance] if depth < 5 else []
        )
        rest = ids[: length - WORDS] if not copies else ids[: copies[0]] + ids[copies[0] + WORDS : length - WORDS]
        assert not set(rest) & set(passage)
        if depth < 5:  # the filler is that of the row without a copy
            assert rest == list(asked[number - depth + 5].ids)[: len(rest)]
    assert len({tuple(request.ids) for request in asked}) == len(asked)


@torch.no_grad()
def test_scores_are_those_of_single_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    _, asked = asked_for(monkeypatch, 200)
    monkeypatch.undo()
    shared = model("yoco:window=5")
    losses, hits = [], []
    for request in asked[:18]:  # three rows of length 128
        logits = shared(torch.tensor([list(request.ids)[:-1]]))[0, request.start - 1 :]
        targets = torch.tensor(list(request.ids)[request.start :])
        losses.append(float(torch.nn.functional.cross_entropy(logits, targets)))
        hits.append(float((logits.argmax(-1) == targets).double().mean()))
    results = score_recall(shared, tokenizer(), rows=3)[:5]
    for depth, result in enumerate(results):
        own, without = np.array(losses[depth::6]), np.array(losses[5::6])
        assert result.loss == pytest.approx(own.mean(), rel=1e-6)
        assert result.gain == pytest.approx((without - own).mean(), rel=1e-4)
        assert result.gain_error == pytest.approx((without - own).std(ddof=1) / math.sqrt(3), rel=1e-4)
        assert result.accuracy == pytest.approx(np.mean(hits[depth::6]))


def test_the_seed_decides() -> None:
    one, again, other = (score_recall(model(), tokenizer(), lengths=[64], rows=2, seed=seed) for seed in (0, 0, 1))
    assert one == again
    assert one != other


def test_mistakes() -> None:
    with pytest.raises(UserError, match="rows of at least 64 and, for this model, at most 128 tokens; got 63"):
        score_recall(model(), tokenizer(), lengths=[128, 63])
    with pytest.raises(UserError, match="got 256"):
        score_recall(model(), tokenizer(), lengths=[256])
    with pytest.raises(UserError, match="needs a tokenizer with 64 words that are one token; this one has"):
        score_recall(shared_model(), small_tokenizer(), lengths=[64])
