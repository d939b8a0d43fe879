"""Standard task sets, scored by log-likelihood: no text is generated, the likeliest of the given answers counts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from crosslayer.data import Tokenizer
from crosslayer.errors import UserError
from crosslayer.evaluate.likelihood import Request, Scored, score_requests
from crosslayer.evaluate.task_files import (
    Item,
    read_blimp,
    read_hellaswag,
    read_lambada,
    read_questions,
    read_wikitext,
)
from crosslayer.evaluate.uncertainty import mean_and_error, ratio_and_error
from crosslayer.model import Transformer

T = TypeVar("T")


@dataclass(frozen=True)
class Metric:
    """A figure of a task, its standard error over items (None with a single one), and what guessing would give (None
    where that is not a number worth knowing)."""

    value: float
    standard_error: float | None
    chance: float | None = None


@dataclass(frozen=True)
class TaskScore:
    """The metrics of a task by name, over `items` items (WikiText-2: articles)."""

    items: int
    metrics: dict[str, Metric]


@dataclass(frozen=True)
class Evaluation:
    """What a task is scored with: the folder of files, how many items to take, the tokenizer, the model's context in
    tokens, and what scores requests."""

    folder: Path
    items: int | None
    tokenizer: Tokenizer
    context: int
    score: Callable[[list[Request]], list[Scored]]


def score_tasks(
    model: Transformer,
    tokenizer: Tokenizer,
    folder: Path,
    tasks: Sequence[str],
    *,
    items: int | None = None,
    progress: Callable[[str], Callable[[int, int], None]] | None = None,
) -> dict[str, TaskScore]:
    """Score each of `tasks` (keys of TASKS) from its files under `folder`.

    `items` takes that many of each set (BLiMP: of each subset), evenly spaced, so that a sorted file gives a fair
    sample. `progress` gives for a task what is then called with requests scored and requests to score.

    Raises:
        UserError: an unknown task, a file that is missing or is not what its name says, or text longer than the
            model's context where it has to be scored as one.
    """
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    scores = {}
    for task in tasks:
        score = partial(score_requests, model, progress=progress(task) if progress else None)
        context = model.config.max_position_embeddings
        scores[task] = TASKS[task](Evaluation(folder, items, tokenizer, context, score))
    return scores


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Request]:
    """Continuations given their contexts, (context, continuation) each. Both are cut into tokens as one text, so that
    the boundary is as in running text; without a context the continuation follows the end-of-text token."""
    wholes = tokenizer.encode_batch([context + continuation for context, continuation in pairs])
    contexts = list(dict.fromkeys(context for context, _ in pairs))  # choices share theirs
    lengths = dict(zip(contexts, map(len, tokenizer.encode_batch(contexts)), strict=True))
    return [
        # A token that reaches over the boundary would be the continuation's first.
        Request(whole, min(lengths[context], len(whole) - 1)) if context else Request([tokenizer.eos_id, *whole], 1)
        for whole, (context, _) in zip(wholes, pairs, strict=True)
    ]


def _score_lambada(on: Evaluation) -> TaskScore:
    """Accuracy: every token of the last word is the likeliest. Perplexity: of the word, not of its tokens."""
    found = evenly(read_lambada(on.folder), on.items)
    scored = on.score(encode_pairs(on.tokenizer, [(item.context, f" {item.choices[0]}") for item in found]))
    loss, error = mean_and_error([-result.log_probs.sum() for result in scored])
    metrics = {
        "acc": Metric(*mean_and_error([bool(result.greedy.all()) for result in scored])),
        "perplexity": _exponential(loss, error),
    }
    return TaskScore(len(found), metrics)


def _score_choices(read: Callable[[Path], list[Item]], on: Evaluation) -> TaskScore:
    """acc: the right choice has the highest log-probability; acc_norm: divided by the choice's length in characters."""
    found = evenly(read(on.folder), on.items)
    answers = _log_probs(found, on)
    right, right_normalised = [], []
    for item, log_probs in zip(found, answers, strict=True):
        lengths = [len(choice) for choice in item.choices]
        right.append(bool(log_probs.argmax() == item.gold))
        right_normalised.append(bool((log_probs / lengths).argmax() == item.gold))
    chance = float(np.mean([1 / len(item.choices) for item in found]))
    metrics = {
        "acc": Metric(*mean_and_error(right), chance),
        "acc_norm": Metric(*mean_and_error(right_normalised), chance),
    }
    return TaskScore(len(found), metrics)


def _score_blimp(on: Evaluation) -> TaskScore:
    """acc: the grammatical sentence is the likelier one; mean over subsets, within which the pairs are the sample."""
    subsets: dict[str, list[Item]] = {}
    for item in read_blimp(on.folder):
        subsets.setdefault(item.subset, []).append(item)
    found = [item for pairs in subsets.values() for item in evenly(pairs, on.items)]
    right: dict[str, list[bool]] = {subset: [] for subset in subsets}
    for item, log_probs in zip(found, _log_probs(found, on), strict=True):
        right[item.subset].append(bool(log_probs.argmax() == item.gold))
    means, errors = zip(*map(mean_and_error, right.values()), strict=True)
    error = None if None in errors else math.hypot(*errors) / len(errors)
    return TaskScore(len(found), {"acc": Metric(math.fsum(means) / len(means), error, chance=0.5)})


def _log_probs(items: Sequence[Item], on: Evaluation) -> list[np.ndarray]:
    """For each item the log-probability of each of its choices."""
    pairs = [(item.context, f" {choice}" if item.context else choice) for item in items for choice in item.choices]
    totals = iter(on.score(encode_pairs(on.tokenizer, pairs)))
    return [np.array([next(totals).log_probs.sum() for _ in item.choices]) for item in items]


def _score_wikitext(on: Evaluation) -> TaskScore:
    """Each article by itself, after an end-of-text token, in parts as long as the model's context. A part sees one
    token of the part before; the last one, if it is shorter, as many as fit.

    The text that is scored is detokenised; words are those of the file, as is usual, and bytes those of the text that
    is scored.
    """
    articles = evenly(read_wikitext(on.folder), on.items)
    texts = [detokenise(article) for article in articles]
    documents = [[on.tokenizer.eos_id, *ids] for ids in on.tokenizer.encode_batch(texts)]
    requests, numbers = [], []
    for number, ids in enumerate(documents):
        for start in range(1, len(ids), on.context):
            stop = min(start + on.context, len(ids))
            first = max(0, stop - on.context - 1)
            requests.append(Request(ids[first:stop], start - first))
            numbers.append(number)
    losses = np.zeros(len(articles))
    for number, result in zip(numbers, on.score(requests), strict=True):
        losses[number] -= result.log_probs.sum()

    def per(sizes: list[int]) -> tuple[float, float | None]:
        return ratio_and_error(losses, np.array(sizes))

    bits, error = per([len(text.encode()) for text in texts])
    metrics = {
        "word_perplexity": _exponential(*per([len(article.split()) for article in articles])),
        "token_perplexity": _exponential(*per([len(ids) - 1 for ids in documents])),
        "bits_per_byte": Metric(bits / math.log(2), None if error is None else error / math.log(2)),
    }
    return TaskScore(len(articles), metrics)


TASKS: dict[str, Callable[[Evaluation], TaskScore]] = {
    "lambada": _score_lambada,
    "hellaswag": partial(_score_choices, read_hellaswag),
    "piqa": partial(_score_choices, partial(read_questions, name="piqa")),
    "arc_easy": partial(_score_choices, partial(read_questions, name="arc_easy")),
    "blimp": _score_blimp,
    "wikitext-2": _score_wikitext,
}


def detokenise(article: str) -> str:
    """WikiText's space-separated tokens as running text: punctuation, quotation marks, brackets, contractions and
    numbers joined to what they belong to, headings and <unk> as they are."""
    lines = []
    for line in article.strip().split("\n"):
        text = re.sub(r" @([-,.])@ ", r"\1", line.strip())
        text = re.sub(r' " ([^"]*) "', r' "\1"', f" {text}")
        text = re.sub(r" '(s|t|d|m|re|ve|ll)\b", r"'\1", text)
        text = re.sub(r"([(\[{$£¥]) ", r"\1", text)
        text = re.sub(r" ([,.;:!?)\]}%])", r"\1", text)
        text = re.sub(r"= (?==)", "=", text)
        lines.append(text.strip())
    return "\n".join(lines)


def evenly(items: Sequence[T], count: int | None) -> Sequence[T]:
    """At most `count` of the items, evenly spaced from the first on."""
    if count is None or count >= len(items):
        return items
    return [items[number * len(items) // count] for number in range(count)]


def _exponential(loss: float, error: float | None) -> Metric:
    """A perplexity from a mean loss in nats, its standard error to first order."""
    value = math.exp(loss) if loss < 700 else math.inf
    return Metric(value, None if error is None else value * error)
