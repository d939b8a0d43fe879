"""A tokenizer of text about cats, and tiny models in float64 that share keys and values."""

from __future__ import annotations

from functools import cache

from crosslayer.data import Tokenizer
from crosslayer.model import Transformer
from tests.conftest import tiny_config
from tests.model.checks import random_model

TEXTS = [f"{n} cats sat on the mats and {word} mice, so the dog ran." for n in range(9) for word in ("saw", "ate")]


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


def shared_model(design: str = "cla2", context: int = 64) -> Transformer:
    return random_model(tiny_config(design, vocab_size=300, max_position_embeddings=context)).double()
