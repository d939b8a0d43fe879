"""Training on a GPU: a captured graph, and the code of several processes, compute what plain launches by one do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from crosslayer.data import Batch
from crosslayer.train import Recipe
from crosslayer.train import step as step_module
from crosslayer.train.parallel import whole_model
from crosslayer.train.step import TrainStep
from tests.conftest import tiny_config
from tests.model.checks import random_model
from tests.train.spread import Case, Trace, in_processes, trace, write_trace

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def batches(count: int) -> list[Batch]:
    tokens = np.random.default_rng(0).integers(0, 300, (count, 6, 17))
    return [Batch(rows[:, :-1], rows[:, 1:]) for rows in tokens]


@pytest.mark.parametrize("recompute", ["none", "block", "group"])
@pytest.mark.parametrize("micro", [None, 2])
@pytest.mark.parametrize("plan", ["cla2", "0,1,1,1,4,1/0,1,0,3,3,0", "sandwich-middle:3"])
def test_a_graph_trains_as_its_launches_do(
    plan: str, micro: int | None, recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, gradient norms and weights over several steps, in float32 and uncompiled."""
    model = random_model(tiny_config(plan, vocab_size=300))
    recipe = Recipe(
        tokens=10 * 96,
        sequence_length=16,
        batch_size=6,
        micro_batch_size=micro,
        learning_rate=1e-2,
        precision="fp32",
        compile=False,
        activation_checkpointing=recompute,  # type: ignore[arg-type]
    )
    losses, models = [], []
    for largest in (0, step_module.GRAPH_FLOPS):
        monkeypatch.setattr(step_module, "GRAPH_FLOPS", largest)
        trained = copy.deepcopy(model).cuda()
        step = TrainStep(trained, recipe)
        losses.append(torch.tensor([[x.item() for x in step(i, batch)] for i, batch in enumerate(batches(5))]))
        models.append(trained)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    for plain, graphed in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(graphed, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_one_gpu_after_another() -> None:
    """A process that has captured on one GPU captures on the next as well."""
    model = random_model(tiny_config("cla2", vocab_size=300))
    recipe = Recipe(tokens=960, sequence_length=16, batch_size=6, learning_rate=1e-2, precision="fp32", compile=False)
    losses = []
    for number in range(2):
        with torch.cuda.device(number):
            step = TrainStep(copy.deepcopy(model).cuda(), recipe)
            assert step._graphed is not None
            losses.append([step(i, batch).loss.item() for i, batch in enumerate(batches(5))])
    assert losses[0][0] > losses[0][-1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(("plan", "mask_documents"), [("cla2", False), ("cla2", True), ("yoco:window=5", False)])
def test_masks_are_not_captured(plan: str, mask_documents: bool) -> None:
    recipe = Recipe(tokens=960, sequence_length=16, batch_size=6, compile=False, mask_documents=mask_documents)
    step = TrainStep(random_model(tiny_config(plan, vocab_size=300)).cuda(), recipe)
    assert (step._graphed is not None) == (plan == "cla2" and not mask_documents)


@pytest.fixture
def mesh_of_one(tmp_path: Path) -> Iterator[DeviceMesh]:
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cuda", (1, 1), mesh_dim_names=("data", "tensor"))
    dist.destroy_process_group()


@pytest.mark.parametrize("plan", ["cla2", "yoco:window=5"])
def test_fsdp_over_nccl_trains_as_one_process_does(plan: str, mesh_of_one: DeviceMesh) -> None:
    model = random_model(tiny_config(plan, vocab_size=300, head_dim=16))  # FlexAttention has no smaller heads
    recipe = Recipe(
        tokens=960,
        sequence_length=16,
        batch_size=6,
        micro_batch_size=2,
        learning_rate=1e-2,
        precision="fp32",
        compile=False,
        activation_checkpointing="group",
    )
    alone, spread = copy.deepcopy(model).cuda(), copy.deepcopy(model)
    steps = TrainStep(alone, recipe), TrainStep(spread, recipe, mesh_of_one)
    one, other = (torch.tensor([[x.item() for x in step(i, b)] for i, b in enumerate(batches(5))]) for step in steps)
    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
    whole = whole_model(spread)
    assert whole is not None
    for weight, expected in zip(whole.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(weight, expected.cpu(), rtol=1e-4, atol=1e-5)


ON_TWO = [
    Case("cla2", 1, {"tie_word_embeddings": True}, {"micro_batch_size": 2}),
    Case("fusedkv-lite", 1, {"qk_norm": True}, {"activation_checkpointing": "block", "micro_batch_size": 1}),
    Case("cla2", 1, {}, {"activation_checkpointing": "group", "compile": True}),
    Case("cla2", 2, {"num_key_value_heads": 1, "tie_word_embeddings": True}, {"activation_checkpointing": "group"}),
    Case("fusedkv-lite", 2, {"num_key_value_heads": 1}, {"compile": True, "micro_batch_size": 4}),
]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_compute_what_one_process_does_in_float64(tmp_path: Path) -> None:
    """FSDP2 and tensor parallelism over NCCL: losses, norms, the gradient of every parameter, and trained weights."""
    calls: list[Callable[[], None]] = [
        partial(write_trace, case, tmp_path / f"{number}.pt", "cuda") for number, case in enumerate(ON_TWO)
    ]
    in_processes(2, calls)
    for number, case in enumerate(ON_TWO):
        found: Trace = torch.load(tmp_path / f"{number}.pt", weights_only=False)
        expected = trace(replace(case, recipe=case.recipe | {"compile": False}))
        assert expected is not None
        assert found.losses == pytest.approx(expected.losses, rel=1e-4), case.name
        assert found.norms == pytest.approx(expected.norms, rel=1e-3), case.name
        for kind, bound in (("gradients", 1e-4), ("weights", 1e-3)):
            one, other = getattr(expected, kind), getattr(found, kind)
            assert one.keys() == other.keys(), case.name
            for name, tensor in one.items():
                error = (other[name].double() - tensor).norm() / tensor.norm()
                assert error < bound, f"{case.name}: {kind} of {name}"
