"""Several processes compute what one does: losses, norms, the gradient of every parameter, and the trained weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.train.spread import Case, Trace, in_processes, trace, trace_cases

MQA = {"num_key_value_heads": 1}
EXTRAS = {"qk_norm": True, "attention_bias": True, "attention_output_bias": True}
TIED = {"tie_word_embeddings": True}

# By number of processes. Keys and values from different layers, windows, one and several KV heads, and each way to
# recompute activations, with and without gradient accumulation.
CASES = {
    2: [
        Case("cla2", 1, TIED, {"micro_batch_size": 2}),
        Case("fusedkv-lite", 1, EXTRAS, {"activation_checkpointing": "block", "micro_batch_size": 1}),
        Case("yoco:window=5", 1, {}, {"activation_checkpointing": "group"}),
        Case("cla2", 2, {**TIED, **EXTRAS}, {"activation_checkpointing": "group"}),
        Case("fusedkv-lite", 2, {**MQA, **EXTRAS}, {"activation_checkpointing": "block", "micro_batch_size": 4}),
    ],
    4: [
        Case("cla3", 1, EXTRAS, {"activation_checkpointing": "block", "micro_batch_size": 1}),
        Case("0,1,1,1,4,1/0,1,0,3,3,0", 1, TIED, {"activation_checkpointing": "group"}, documents=True),
        Case("cla2", 4, {**MQA, **TIED}, {"micro_batch_size": 4}),
        Case("fusedkv-lite", 4, EXTRAS, {"activation_checkpointing": "group"}),  # a KV head for two ranks
        Case("fusedkv-lite", 2, EXTRAS, {"activation_checkpointing": "group", "micro_batch_size": 2}),
        Case("cla2", 2, {**MQA, **TIED}, {"activation_checkpointing": "block"}, documents=True),
        Case("cla3", 2, {"intermediate_size": 54, "separate_kv_norm": False}),  # parts that do not divide evenly
    ],
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _traces(2, tmp_path_factory)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _traces(4, tmp_path_factory)


def _traces(count: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(f"{count}-processes")
    in_processes(count, trace_cases, folder, CASES[count])
    return folder


@pytest.mark.parametrize("number", range(len(CASES[2])), ids=[case.name for case in CASES[2]])
def test_two_processes_train_as_one(number: int, two: Path) -> None:
    _compare(CASES[2][number], two / f"{number}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES[4])), ids=[case.name for case in CASES[4]])
def test_four_processes_train_as_one(number: int, four: Path) -> None:
    _compare(CASES[4][number], four / f"{number}.pt")


def _compare(case: Case, file: Path) -> None:
    found: Trace = torch.load(file, weights_only=False)
    expected = trace(case)
    assert expected is not None
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)  # they are summed in float32
    assert found.norms == pytest.approx(expected.norms, rel=1e-6)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert _error(found.gradients[name], gradient) < 1e-11, name
    assert found.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        assert _error(found.weights[name], weight) < 1e-6, name


def _error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())
