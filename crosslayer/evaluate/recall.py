"""Associative recall at a distance: does a model find, many tokens back, what came after what it sees now?

A passage of WORDS common words, none twice, stands somewhere in a row of other common words, and comes again at the end
of the row. Nothing but looking it up predicts the second copy: the words are drawn evenly, and those around the passage
are others. The first word of the copy is the cue; each of the rest is scored, given those before it.

Why this shape. Passkey and question-answering tests want a model that follows a question, which models of some tens of
millions of parameters, trained on some hundred million tokens, do not. Continuing what was repeated is the earliest
recall that language models learn (induction heads, arXiv 2209.11895), it needs no instruction, and it goes through
keys and values far back and nothing else. And since a model may prefer the right word long before it is sure of it,
the test also measures the gain: by how many nats the passage is likelier than after a row in which it does not stand.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from crosslayer.data import Tokenizer
from crosslayer.errors import UserError
from crosslayer.evaluate.likelihood import Request, score_requests
from crosslayer.evaluate.uncertainty import mean_and_error
from crosslayer.model import Transformer

WORDS = 16
# The words that rows are made of: the most common ones of the tokenizer that are a single token each. About a
# quarter are beginnings of longer words; to leave these out would make recorded results incomparable.
LEXICON = 1024
# Where the passage stands: 0 is the start of the row, 1 directly before the copy.
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Recall:
    """Recall over `distance` tokens in rows of `length` tokens, with standard errors over `rows` rows.

    `accuracy`: share of the words that are the model's first choice; guessing among the words gets `chance`. `loss`:
    nats per word. `gain`: nats per word by which the loss is lower than without the earlier copy; 0 without recall.
    """

    length: int
    depth: float
    distance: int
    rows: int
    chance: float
    accuracy: float
    accuracy_error: float | None
    loss: float
    loss_error: float | None
    gain: float
    gain_error: float | None


def score_recall(
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    lengths: Sequence[int] | None = None,
    rows: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Recall]:
    """Recall at every one of DEPTHS, in rows of each of `lengths` tokens (default: the model's context, and half of
    it). The rows depend on the seed, the length and the tokenizer only; at all depths they differ in nothing but the
    place of the passage.

    Raises:
        UserError: a row that is too short for two copies or longer than the model's context, or a tokenizer with too
            few words that are one token.
    """
    context = model.config.max_position_embeddings
    lengths = (context, context // 2) if lengths is None else lengths
    for length in lengths:
        if not 4 * WORDS <= length <= context:
            raise UserError(
                f"recall needs rows of at least {4 * WORDS} and, for this model, at most {context} tokens; got {length}"
            )
    lexicon = common_words(tokenizer)
    requests = [
        Request(ids, length - WORDS + 1)
        for length in lengths
        for row in range(rows)
        for ids in _make_row(lexicon, length, np.random.PCG64(np.random.SeedSequence([seed, length, row])))
    ]
    scored = score_requests(model, requests, progress=progress)
    losses = np.array([-result.log_probs.mean() for result in scored]).reshape(len(lengths), rows, -1)
    accuracies = np.array([result.greedy.mean() for result in scored]).reshape(losses.shape)
    return [
        Recall(
            length,
            depth,
            length - WORDS - _place(depth, length),
            rows,
            1 / len(lexicon),
            *mean_and_error(accuracies[i, :, j]),
            *mean_and_error(losses[i, :, j]),
            *mean_and_error(losses[i, :, -1] - losses[i, :, j]),
        )
        for i, length in enumerate(lengths)
        for j, depth in enumerate(DEPTHS)
    ]


def common_words(tokenizer: Tokenizer) -> list[int]:
    """Token ids of the up to LEXICON most common words in lower case: BPE makes common words first, so the lowest ids.
    A word is a token that begins with a space and has at least three letters, although some of them (` con`, ` wor`)
    mostly begin longer words.

    Raises:
        UserError: the tokenizer has fewer than 4 * WORDS.
    """
    # As tokenizers write the space before a word: byte-level BPE with Ġ, SentencePiece with ▁.
    names = ((token, tokenizer.backend.id_to_token(token)) for token in range(tokenizer.vocab_size))
    found = [token for token, name in names if re.fullmatch(r"[Ġ▁][a-z]{3,}", name or "")]
    if len(found) < 4 * WORDS:
        raise UserError(
            f"recall needs a tokenizer with {4 * WORDS} words that are one token; this one has {len(found)}"
        )
    return found[:LEXICON]


def _place(depth: float, length: int) -> int:
    """Where the first copy begins."""
    return math.floor(depth * (length - 2 * WORDS))


def _make_row(lexicon: Sequence[int], length: int, bits: np.random.PCG64) -> list[list[int]]:
    """The row with the passage at each of DEPTHS, and last the row without it: `length` tokens each, ending with the
    passage."""
    # By rank of raw bits, which numpy promises to be the same in every version.
    order = np.argsort(bits.random_raw(len(lexicon)), kind="stable").tolist()
    passage, others = ([lexicon[i] for i in part] for part in (order[:WORDS], order[WORDS:]))
    filler = [others[number % len(others)] for number in bits.random_raw(length - WORDS).tolist()]
    rows = []
    for depth in DEPTHS:
        place = _place(depth, length)
        rows.append([*filler[:place], *passage, *filler[place : length - 2 * WORDS], *passage])
    return [*rows, [*filler, *passage]]
