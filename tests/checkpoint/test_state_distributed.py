"""A checkpoint fits any number of processes, however each shards: what is read is bit for bit what was written."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from crosslayer.checkpoint.state import Checkpoints
from crosslayer.model import Transformer
from tests.conftest import tiny_config
from tests.limits import file_size_limit
from tests.model.checks import next_token_loss, random_model, random_tokens

pytestmark = pytest.mark.slow


def build(tied: bool) -> Transformer:
    """61 tokens and a width of 32, so that 2 and 4 processes get parts of different sizes, and some none."""
    return random_model(tiny_config("cla2", tie_word_embeddings=tied, attention_bias=True))


def shard(model: Transformer, data: int, tensor: int = 1) -> None:
    """FSDP2 over `data` processes and tensor parallelism of the feed-forward layers over `tensor`."""
    mesh = init_device_mesh("cpu", (data, tensor), mesh_dim_names=("data", "tensor"))
    for block in model.model.layers:
        if tensor > 1:
            styles = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
            parallelize_module(block.mlp, mesh["tensor"], styles)
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])


def adamw(model: Transformer) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def train(model: Transformer, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        next_token_loss(model, random_tokens(model, 2, 9, seed=step)).backward()
        optimizer.step()


def whole(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every weight and moment, unsharded. All processes must call it."""
    model.state_dict()  # FSDP's hooks shard what the last forward pass left gathered
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[name] = parameter.detach()
        tensors |= {f"{kind} of {name}": value for kind, value in optimizer.state[parameter].items()}
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for n, t in tensors.items()}


def assert_same(loaded: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name


def loaded(folder: Path, tied: bool, **sharding: int) -> tuple[Transformer, torch.optim.Optimizer, int]:
    """A model with other weights than were saved, and then with those; its optimizer, and the step."""
    model = build(tied)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    if sharding:
        shard(model, **sharding)
    optimizer = adamw(model)
    with closing(Checkpoints(folder)) as checkpoints:
        progress = checkpoints.load(model, optimizer)
    assert progress is not None
    return model, optimizer, progress["step"]


def two_processes(folder: Path) -> None:
    for tied in (False, True):
        model = build(tied)
        shard(model, data=2)
        optimizer = adamw(model)
        train(model, optimizer, range(3))
        with torch.no_grad():
            model(random_tokens(model, 2, 9))  # leaves the root's weights gathered
        with closing(Checkpoints(folder / f"two-{tied}")) as checkpoints:
            checkpoints.save(3, model, optimizer, {"rank": dist.get_rank()})
            expected = whole(model, optimizer)
            train(model, optimizer, range(3, 5))  # while it is being written
        torch.save(expected, folder / f"two-{tied}.pt")
        torch.save(whole(model, optimizer), folder / f"two-{tied}-later.pt")

    # Training goes on from one process's state as it would have gone on there, and from its own bit for bit.
    model, optimizer, _ = loaded(folder / "two-False", False, data=2)
    train(model, optimizer, range(3, 5))
    assert_same(whole(model, optimizer), torch.load(folder / "two-False-later.pt"))


def four_processes(folder: Path) -> None:
    for name, tied in (("two-False", False), ("two-True", True), ("one", False)):
        expected = torch.load(folder / f"{name}.pt")
        for sharding in ({"data": 4}, {"data": 2, "tensor": 2}, {"data": 1, "tensor": 4}):
            model, optimizer, step = loaded(folder / name, tied, **sharding)
            assert_same(whole(model, optimizer), expected)
            with closing(Checkpoints(folder / f"four-{name}-{sharding.get('tensor', 1)}")) as checkpoints:
                checkpoints.save(step, model, optimizer, {})

    # One of them cannot write, so there is no checkpoint, and all go on.
    with closing(Checkpoints(folder / "full")) as checkpoints:
        limit = file_size_limit(100 if dist.get_rank() == 2 else 2**40)
        with limit, warnings.catch_warnings(record=True) as warned:
            checkpoints.save(9, model, optimizer, {})
            checkpoints.wait()
        if dist.get_rank() == 0:
            assert re.search(r"step 9 could not be written .*\(rank 2\); training goes on", str(warned[0].message))
        for step in (10, 11):
            checkpoints.save(step, model, optimizer, {})
    dist.barrier()
    assert {path.name for path in (folder / "full").iterdir()} == {"step-00000010", "step-00000011"}
    dist.barrier()

    # The newest is damaged, as one of them is told; all pass it over.
    if dist.get_rank() == 0:
        (folder / "full" / "step-00000011" / "rank-00003.safetensors").unlink()
        with pytest.warns(UserWarning, match=r"skipping a damaged checkpoint: .*rank-00003\.safetensors: missing"):
            model, optimizer, step = loaded(folder / "full", False, data=4)
    else:
        model, optimizer, step = loaded(folder / "full", False, data=4)
    assert step == 10
    assert_same(whole(model, optimizer), expected)


def process(rank: int, number: int, folder: Path, work: Callable[[Path], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{number}", rank=rank, world_size=number)
    work(folder)
    dist.destroy_process_group()


def test_any_number_of_processes(tmp_path: Path) -> None:
    model, optimizer = build(False), None
    optimizer = adamw(model)
    train(model, optimizer, range(2))
    with closing(Checkpoints(tmp_path / "one")) as checkpoints:
        checkpoints.save(2, model, optimizer, {})
    torch.save(whole(model, optimizer), tmp_path / "one.pt")

    mp.spawn(process, (2, tmp_path, two_processes), nprocs=2)
    mp.spawn(process, (4, tmp_path, four_processes), nprocs=4)

    for name, tied in (("two-False", False), ("two-True", True), ("one", False)):
        expected = torch.load(tmp_path / f"{name}.pt")
        for folder in (name, f"four-{name}-1", f"four-{name}-2", f"four-{name}-4"):
            model, optimizer, step = loaded(tmp_path / folder, tied)
            assert step == (2 if name == "one" else 3)
            assert_same(whole(model, optimizer), expected)
