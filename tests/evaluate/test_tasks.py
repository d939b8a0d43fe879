"""Task scores against a naive loop: choices one by one, whole texts, float64."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crosslayer.errors import UserError
from crosslayer.evaluate.likelihood import Scored
from crosslayer.evaluate.tasks import TASKS, Evaluation, detokenise, encode_pairs, evenly, score_tasks
from crosslayer.model import Transformer
from tests.evaluate.models import shared_model, tokenizer

LAMBADA = [
    {"context": "3 cats sat on the mats and the dog", "continuation": "ran"},
    {"context": "The mice saw the", "continuation": "zebra"},
]
ARC = [
    {"query": f"Question: What did {n} cats see?", "choices": ["mice", "the dog", "mats and mats"], "gold": n % 3}
    for n in range(7)
]
PIQA = [
    {"query": f"Question: The dog {n}\n", "choices": ["sat on the mats so it ran.", "ran"], "gold": n % 2}
    for n in range(9)
]
HELLASWAG = [
    line
    for n in range(5)
    for line in (f"{n} cats sat", str(n % 4), "on the mats.", "and ran.", "the.", f"{n} {n} {n}.")
]
BLIMP = {
    "agreement": [(f"{n} cats sat on mats.", f"{n} cat sat on mats.") for n in range(4)],
    "order": [(f"The dog ate {n} mice.", "Dog. " * (n % 2) + f"The ate {n} dog.") for n in range(5)],
}
WIKITEXT = (
    " \n = The Cat = \n \n The cats sat on <unk> mats . \n \n = = Mice = = \n \n The dog 's 3 @,@ 000 mice"
    ' ( and 2 @.@ 5 cats ) ran , so " they sat " . \n'
    " \n = The Dog = \n \n The dog ran : a well @-@ fed dog . \n"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The sets as they are published, some of them compressed."""

    def write(name: str, rows: list[Any], pack: Callable[[bytes], bytes] = bytes) -> None:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        file.write_bytes(pack(("\n".join(lines) + "\n").encode()))

    write("mosaic-gauntlet/lambada_openai.jsonl.xz", LAMBADA, lzma.compress)
    write("mosaic-gauntlet/arc_easy.jsonl", ARC)
    write("mosaic-gauntlet/piqa.jsonl.gz", PIQA, gzip.compress)
    write("hellaswag/hellaswag_val_full.txt.bz2", HELLASWAG, bz2.compress)
    for subset, pairs in BLIMP.items():
        rows = [{"sentence_good": good, "sentence_bad": bad, "UID": subset} for good, bad in pairs]
        write(f"blimp/data/{subset}.jsonl", rows)
    write("wikitext-2/test.txt", [WIKITEXT.rstrip("\n")])
    return tmp_path


@torch.no_grad()
def log_prob(model: Transformer, context: str, continuation: str) -> tuple[float, bool]:
    """Of a continuation, and whether each of its tokens is the likeliest: the log-probability of the whole text less
    that of the context, a token at a time."""
    start, whole = tokenizer().encode(context), tokenizer().encode(context + continuation)
    assert whole[: len(start)] == start
    if not context:
        start, whole = [tokenizer().eos_id], [tokenizer().eos_id, *whole]
    total, greedy = 0.0, True
    for position in range(len(start), len(whole)):
        logits = model(torch.tensor([whole[:position]]))[0, -1]
        total += float(logits.log_softmax(0)[whole[position]])
        greedy = greedy and int(logits.argmax()) == whole[position]
    return total, greedy


def mean(values: list[bool]) -> tuple[float, float]:
    """The mean of right and wrong, and the standard error of a proportion."""
    p = sum(values) / len(values)
    return p, math.sqrt(p * (1 - p) / (len(values) - 1))


def test_choices(folder: Path) -> None:
    """The random model must be right now and then, and differently once lengths count."""
    questions = {
        "arc_easy": [(f"{row['query']}\nAnswer:", row["choices"], row["gold"]) for row in ARC],
        "piqa": [(f"{str(row['query']).strip()}\nAnswer:", row["choices"], row["gold"]) for row in PIQA],
        "hellaswag": [(HELLASWAG[i], HELLASWAG[i + 2 : i + 6], int(HELLASWAG[i + 1])) for i in range(0, 30, 6)],
    }
    model = shared_model("cla3")
    scores = score_tasks(model, tokenizer(), folder, list(questions))
    differ = 0
    for (task, items), choices in zip(questions.items(), (3, 2, 4), strict=True):
        right, right_normalised = [], []
        for context, texts, gold in items:
            found = [log_prob(model, context, f" {text}")[0] for text in texts]
            right.append(found.index(max(found)) == gold)
            scaled = [value / len(text) for value, text in zip(found, texts, strict=True)]
            right_normalised.append(scaled.index(max(scaled)) == gold)
        differ += right != right_normalised
        acc, acc_norm = scores[task].metrics["acc"], scores[task].metrics["acc_norm"]
        assert (acc.value, acc.standard_error) == pytest.approx(mean(right))
        assert (acc_norm.value, acc_norm.standard_error) == pytest.approx(mean(right_normalised))
        assert acc.chance == acc_norm.chance == pytest.approx(1 / choices)
        assert scores[task].items == len(items)
    assert differ


def test_lambada(folder: Path) -> None:
    model = shared_model()
    found = [log_prob(model, row["context"], f" {row['continuation']}") for row in LAMBADA]
    metrics = score_tasks(model, tokenizer(), folder, ["lambada"])["lambada"].metrics
    losses = [-value for value, _ in found]
    assert metrics["perplexity"].value == pytest.approx(math.exp(sum(losses) / 2), rel=1e-6)
    error = math.exp(sum(losses) / 2) * abs(losses[0] - losses[1]) / 2
    assert metrics["perplexity"].standard_error == pytest.approx(error, rel=1e-6)
    assert metrics["acc"].value == sum(greedy for _, greedy in found) / 2


def test_a_last_word_counts_only_when_all_of_its_tokens_are_the_likeliest(folder: Path) -> None:
    flags = {(True, False): 0.0, (False, True): 0.0, (True, True): 0.5}
    for one, accuracy in flags.items():
        answers = [Scored(np.array([-1.0, -2.0]), np.array(flag)) for flag in (one, (False, False))]
        on = Evaluation(folder, None, tokenizer(), 64, lambda _, answers=answers: answers)
        score = TASKS["lambada"](on)
        assert score.metrics["acc"].value == accuracy
        assert score.metrics["perplexity"].value == pytest.approx(math.exp(3))  # of words, not tokens


def test_blimp_is_the_mean_over_subsets(folder: Path) -> None:
    model = shared_model("suffix:3,window=5,period=2")
    subsets = {
        name: [log_prob(model, "", good)[0] > log_prob(model, "", bad)[0] for good, bad in pairs]
        for name, pairs in BLIMP.items()
    }
    means, errors = zip(*map(mean, subsets.values()), strict=True)
    score = score_tasks(model, tokenizer(), folder, ["blimp"])["blimp"]
    acc = score.metrics["acc"]
    assert means[0] != means[1]
    assert acc.value == pytest.approx(sum(means) / 2)
    assert acc.standard_error == pytest.approx(math.sqrt(errors[0] ** 2 + errors[1] ** 2) / 2)
    assert (score.items, acc.chance, list(score.metrics)) == (9, 0.5, ["acc"])


@torch.no_grad()
def test_wikitext(folder: Path) -> None:
    """Parts of 16 tokens: a token sees one before its part and those up to itself; in the last part all that fit."""
    model = shared_model("cla2", context=16)
    losses, tokens = [], []
    words = [4 + 7 + 5 + 22, 4 + 10]
    texts = [
        "= The Cat =\n\nThe cats sat on <unk> mats.\n\n== Mice ==\n\n"
        'The dog\'s 3,000 mice (and 2.5 cats) ran, so "they sat".',
        "= The Dog =\n\nThe dog ran: a well-fed dog.",
    ]
    for text in texts:
        ids = [tokenizer().eos_id, *tokenizer().encode(text)]
        total = 0.0
        for position in range(1, len(ids)):
            start = min((position - 1) // 16 * 16, max(0, len(ids) - 17))
            logits = model(torch.tensor([ids[start:position]]))[0, -1]
            total -= float(logits.log_softmax(0)[ids[position]])
        losses.append(total)
        tokens.append(len(ids) - 1)
    assert max(tokens) > 32
    metrics = score_tasks(model, tokenizer(), folder, ["wikitext-2"])["wikitext-2"].metrics
    assert metrics["token_perplexity"].value == pytest.approx(math.exp(sum(losses) / sum(tokens)), rel=1e-5)
    assert metrics["word_perplexity"].value == pytest.approx(math.exp(sum(losses) / sum(words)), rel=1e-5)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert metrics["bits_per_byte"].value == pytest.approx(sum(losses) / math.log(2) / num_bytes, rel=1e-6)
    # Two articles: the ratio estimator's variance written out for n = 2.
    ratio = sum(losses) / sum(tokens)
    rest = losses[0] - ratio * tokens[0]
    error = math.exp(ratio) * math.sqrt(2 * 2 * rest**2) / sum(tokens)
    assert metrics["token_perplexity"].standard_error == pytest.approx(error, rel=1e-4)


def test_detokenised_text_reads_as_it_was_written() -> None:
    for tokenised, text in {
        ' The " first " one , " second " . ': 'The "first" one, "second".',
        " It 's 5 @.@ 2 % of $ 3 @,@ 000 ; they 've won 't ": "It's 5.2% of $3,000; they've won't",
        " = = = Deep = = = ": "=== Deep ===",
        " A [ b ] { c } ( d ) – e : f ! ": "A [b] {c} (d) – e: f!",
        " the 1980 's \n  \n dogs ' <unk> ": "the 1980's\n\ndogs ' <unk>",
    }.items():
        assert detokenise(tokenised) == text


def test_a_boundary_is_where_running_text_has_it() -> None:
    """And a token over the boundary belongs to the continuation."""
    ids = tokenizer().encode("The cats sat")
    (one,) = encode_pairs(tokenizer(), [("The cats", " sat")])
    assert (one.ids, one.start) == (ids, len(tokenizer().encode("The cats")))
    (none,) = encode_pairs(tokenizer(), [("", "The cats sat")])
    assert (none.ids, none.start) == ([tokenizer().eos_id, *ids], 1)
    (over,) = encode_pairs(tokenizer(), [("The ca", "ts")])
    assert tokenizer().encode("The cats")[-1] == tokenizer().encode(" cats")[0]  # one token
    assert (over.ids, over.start) == (tokenizer().encode("The cats"), len(tokenizer().encode("The cats")) - 1)


def test_some_items_of_each_set(folder: Path) -> None:
    assert evenly(range(10), 4) == [0, 2, 5, 7]
    assert evenly(range(3), 4) == evenly(range(3), None) == range(3)
    scores = score_tasks(shared_model(), tokenizer(), folder, list(TASKS), items=2)
    assert {task: score.items for task, score in scores.items()} == {**dict.fromkeys(TASKS, 2), "blimp": 4}
    assert json.loads(json.dumps([asdict(score) for score in scores.values()], allow_nan=False))


def test_one_item_has_no_standard_error(folder: Path) -> None:
    scores = score_tasks(shared_model(), tokenizer(), folder, list(TASKS), items=1)
    assert {metric.standard_error for score in scores.values() for metric in score.metrics.values()} == {None}


@pytest.mark.parametrize(
    ("task", "name", "content", "message"),
    [
        ("lambada", "mosaic-gauntlet/lambada_openai.jsonl", '{"context": "a"}', "line 1: want text in the field 'cont"),
        ("lambada", "mosaic-gauntlet/lambada_openai.jsonl", "[1]", "line 1: want a JSON object"),
        ("piqa", "mosaic-gauntlet/piqa.jsonl", '{"query": "a", "choices": ["b"], "gold": 1}', "'gold', got 1"),
        ("piqa", "mosaic-gauntlet/piqa.jsonl", '{"query": "a", "choices": "b", "gold": 0}', "field 'choices'"),
        ("piqa", "mosaic-gauntlet/piqa.jsonl", "\n{", "line 2: not JSON"),
        ("hellaswag", "hellaswag/hellaswag_val_full.txt", "a\n0\nb\nc\nd\n", "line 1: want a context"),
        ("hellaswag", "hellaswag/hellaswag_val_full.txt", "a\n4\nb\nc\nd\ne\n", "line 1: want a context"),
        ("blimp", "blimp/data/x.jsonl", '{"sentence_good": "a", "sentence_bad": "b"}', "'UID'"),
        ("wikitext-2", "wikitext-2/test.txt", "no heading", "no article heading"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, task: str, name: str, content: str, message: str) -> None:
    with pytest.raises(UserError, match="no such f"):
        score_tasks(shared_model(), tokenizer(), tmp_path, [task])
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        score_tasks(shared_model(), tokenizer(), tmp_path, [task])
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_and_an_unknown_task(folder: Path) -> None:
    file = folder / "mosaic-gauntlet" / "lambada_openai.jsonl.xz"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"lambada_openai\.jsonl\.xz: cannot be read"):
        score_tasks(shared_model(), tokenizer(), folder, ["lambada"])
    with pytest.raises(UserError, match="unknown task 'lamda'; known: lambada, "):
        score_tasks(shared_model(), tokenizer(), folder, ["blimp", "lamda"])
