"""The memory of a training run, against the model, what compiled blocks keep, a real optimizer, and measured peaks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from crosslayer.data import Batch
from crosslayer.errors import UserError
from crosslayer.model import Transformer, loss
from crosslayer.plan import parse_design, preset
from crosslayer.plan.cost import Recompute, num_parameters
from crosslayer.plan.training_memory import (
    LOGITS_AT_A_TIME,
    activation_bytes_per_token,
    check_tensor_parallel,
    checkpoint_bytes,
    training_memory,
)
from crosslayer.train import Recipe
from crosslayer.train.step import TrainStep
from tests.conftest import tiny_config

MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "2026-11-24-train-memory-h100.json"
ROWS = json.loads(MEASURED.read_text(encoding="utf-8"))["rows"]


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda row: f"{row['preset']}-{row['design']}-{row['batch']}-{row['recompute']}"
)
def test_peaks_are_those_that_an_h100_measured(row: dict[str, Any]) -> None:
    memory = training_memory(
        parse_design(row["design"], preset(row["preset"])),
        tokens=row["micro_batch"] * row["sequence"],
        micro_batches=row["batch"] // row["micro_batch"],
        recompute=row["recompute"],
    )
    over = memory.peak / 2**30 / row["peak_gib"]
    # What is recomputed does not all exist at once; the estimate says it does.
    assert 0.98 < over < (1.02 if row["recompute"] == "none" else 1.08)


B, T = 2, 22
SAVED: list[tuple[str, Recompute, dict[str, Any]]] = [
    ("identity", "none", {}),
    ("cla2", "none", {}),
    ("cla2", "block", {}),
    ("cla2", "group", {}),
    ("cla3", "none", {"separate_kv_norm": False}),
    ("cla3", "block", {"separate_kv_norm": False}),
    ("0,1,1,1,4,1/0,1,0,3,3,0", "none", {"attention_bias": True, "attention_output_bias": True}),
    ("0,1,1,1,4,1/0,1,0,3,3,0", "block", {"tie_word_embeddings": True}),
    ("cla2", "none", {"qk_norm": True}),
]


@pytest.mark.parametrize(("plan", "recompute", "changes"), SAVED)
def test_activations_are_what_compiled_blocks_keep_for_the_backward_pass(
    plan: str, recompute: Recompute, changes: dict[str, Any]
) -> None:
    config = tiny_config(plan, **changes)
    model = Transformer(config)
    model.model.activation_checkpointing = recompute
    torch.compiler.reset()
    for block in model.model.layers:
        block.compile(backend="aot_eager_decomp_partition")  # the compiler's choice of what to keep, and no C++
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(config.vocab_size, (B, T))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        model(ids, ids)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    # The estimate has these elsewhere or leaves them out: autocast's copies of the blocks' matrices, the gradient of
    # the output projection, and the tables of RoPE.
    vocabulary = config.vocab_size * config.hidden_size
    if recompute == "none":
        total -= 2 * sum(weight.numel() for weight in model.model.layers.parameters() if weight.ndim == 2)
        total -= 4 * 2 * T * config.head_dim // 2
    total -= 4 * vocabulary
    assert total == B * T * activation_bytes_per_token(config, recompute)


@pytest.mark.parametrize("plan", ["cla2", "fusedkv-lite", "yoco:window=5"])
def test_weights_gradients_and_optimizer_are_those_of_a_step(plan: str) -> None:
    config = tiny_config(plan)
    model = Transformer(config)
    step = TrainStep(model, Recipe(tokens=10**6, sequence_length=8, batch_size=2, device="cpu"))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 9))
    step(0, Batch(tokens[:, :-1], tokens[:, 1:]))
    memory = training_memory(config, tokens=16, micro_batches=1)
    states = step.optimizer.state.values()
    moments = [tensor for state in states for tensor in state.values() if tensor.ndim]  # and a step count each
    assert memory.weights == memory.gradients == sum(p.nbytes for p in model.parameters())
    assert memory.optimizer == sum(moment.nbytes for moment in moments)
    assert checkpoint_bytes(config) == memory.weights + memory.optimizer


def test_tensor_parallel_ranks_share_all_but_norms_and_kv_heads_that_are_too_few() -> None:
    grouped = parse_design("H128-GQA4-CLA2", preset("paper-1b"))
    single = parse_design("H128-MQA-CLA2", preset("paper-1b"))
    norms = 2048 * (2 * 20 + 1 + 10)
    for config, copied in ((grouped, 0), (single, 10 * 2 * 2048 * 128)):
        for ranks in (2, 4):
            shared = num_parameters(config) - norms - copied
            assert num_parameters(config, ranks) == shared / ranks + norms + copied


def test_fsdp_shares_what_a_rank_holds_but_not_gradients_that_wait() -> None:
    config = parse_design("H128-MQA-CLA2", preset("paper-3b"))
    one = training_memory(config, tokens=2048, micro_batches=1)
    many = training_memory(config, tokens=2048, micro_batches=1, data_parallel=64)
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(many, name) == pytest.approx(getattr(one, name) / 64, abs=1)
    assert (many.activations, many.loss) == (one.activations, one.loss)
    waiting = training_memory(config, tokens=2048, micro_batches=2, data_parallel=64)
    assert waiting.gradients == one.gradients
    both = training_memory(config, tokens=2048, micro_batches=1, data_parallel=8, tensor_parallel=8)
    assert both.weights == pytest.approx(4 * num_parameters(config, 8) / 8, abs=1)
    assert both.activations < one.activations


def test_gradients_wait_where_more_micro_batches_come() -> None:
    config = parse_design("H128-MQA-CLA2", preset("paper-1b"))
    one, two = (training_memory(config, tokens=2**14, micro_batches=n) for n in (1, 2))
    assert two.peak == sum(value for name, value in vars(two).items() if name != "peak")
    assert two.peak - one.peak == one.gradients
    # With few tokens the end of the backward pass, when all gradients are there, is where most is in use.
    few = training_memory(config, tokens=64, micro_batches=1)
    assert few.peak > few.weights + few.optimizer + few.gradients + few.compute_weights


def test_recomputation_saves_memory_and_groups_save_more() -> None:
    config = parse_design("H128-MQA-CLA2", preset("paper-1b"))
    peaks = [
        training_memory(config, tokens=2**15, micro_batches=1, recompute=mode).activations
        for mode in ("none", "block", "group")
    ]
    assert peaks[0] > 5 * peaks[1] > 5 * peaks[2]


def test_the_chunks_of_logits_are_those_of_the_loss() -> None:
    assert LOGITS_AT_A_TIME == loss.GPU_CHUNK
    config = preset("paper-1b")
    chunk = loss._chunk_rows(config.vocab_size, "cuda")
    per_token = [training_memory(config, tokens=n, micro_batches=1).loss for n in (chunk - 1, chunk, 3 * chunk)]
    assert per_token[1] - per_token[0] == 2 * config.vocab_size + 2 * config.hidden_size
    logits = per_token[2] - 2 * 3 * chunk * config.hidden_size - 4 * config.vocab_size * config.hidden_size
    assert logits == 2 * chunk * config.vocab_size


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({}, 3, "train.tensor_parallel 3 must divide num_attention_heads 4"),
        ({"intermediate_size": 49}, 2, "must divide intermediate_size 49"),
        ({}, 2, r"must divide vocab_size 61; model.vocab_size=62 pads it"),
        ({"num_attention_heads": 12, "num_key_value_heads": 6, "vocab_size": 64}, 4, "num_key_value_heads 6, or be"),
    ],
)
def test_what_cannot_be_divided_is_refused(changes: dict[str, Any], ranks: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_tensor_parallel(tiny_config(**changes), ranks)
    with pytest.raises(UserError, match=message):
        training_memory(replace(tiny_config(**changes)), tokens=1, micro_batches=1, tensor_parallel=ranks)


@pytest.mark.parametrize(("kv_heads", "ranks"), [(1, 4), (2, 4), (4, 2), (2, 2), (1, 1)])
def test_what_can_be_divided_is_not(kv_heads: int, ranks: int) -> None:
    check_tensor_parallel(tiny_config(vocab_size=64, num_key_value_heads=kv_heads), ranks)
