"""Training state: going on from it is going on as if nothing had happened."""

from __future__ import annotations

import json
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from crosslayer.checkpoint import state as state_module
from crosslayer.checkpoint.state import Checkpoints
from crosslayer.errors import UserError
from crosslayer.model import Transformer
from tests.conftest import tiny_config
from tests.limits import file_size_limit
from tests.model.checks import next_token_loss, random_model, random_tokens


def start(tied: bool = False, fused: bool = False) -> tuple[Transformer, torch.optim.Optimizer]:
    model = random_model(tiny_config(tie_word_embeddings=tied))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)


def train(model: Transformer, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        next_token_loss(model, random_tokens(model, 2, 9, seed=step)).backward()
        optimizer.step()


def save(folder: Path, step: int, model: Transformer, optimizer: torch.optim.Optimizer, **progress: Any) -> None:
    with closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(step, model, optimizer, progress)


def load(folder: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    with closing(Checkpoints(folder)) as checkpoints:
        return checkpoints.load(model, optimizer)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("tied", "fused"), [(False, False), (True, True)])
def test_resuming_is_exact(tied: bool, fused: bool, tmp_path: Path) -> None:
    model, optimizer = start(tied, fused)
    train(model, optimizer, range(3))
    save(tmp_path, 3, model, optimizer, tokens=48)
    train(model, optimizer, range(3, 6))

    resumed, resumed_optimizer = start(tied, fused)
    assert load(tmp_path, resumed, resumed_optimizer) == {"step": 3, "tokens": 48}
    train(resumed, resumed_optimizer, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))
    assert (resumed.lm_head.weight is resumed.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_in_a_checkpoint(tied: bool, tmp_path: Path) -> None:
    """Every parameter and moment once, under its own name, and no pickle."""
    model, optimizer = start(tied)
    train(model, optimizer, range(2))
    save(tmp_path, 2, model, optimizer)
    assert names(tmp_path / "step-00000002") == ["checksums.json", "rank-00000.safetensors", "state.json"]
    with safe_open(tmp_path / "step-00000002" / "rank-00000.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert ("model.lm_head.weight" in stored) != tied
    expected = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state[parameter].items():
            expected[f"optimizer.{kind}.{name}"] = value
    assert stored.keys() == expected.keys()
    assert {name.split(".")[1] for name in stored if name.startswith("optimizer")} == {"exp_avg", "exp_avg_sq", "step"}
    assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())


def test_training_goes_on_while_the_files_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`save` returns before anything is on the disk, and what is saved is the state at that moment."""
    may_write = threading.Event()
    plain = state_module.save_file

    def slow(*arguments: Any) -> None:
        assert may_write.wait(10)
        plain(*arguments)

    monkeypatch.setattr(state_module, "save_file", slow)
    model, optimizer = start()
    train(model, optimizer, range(2))
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(2, model, optimizer, {})
        assert checkpoints.steps() == []
        train(model, optimizer, range(2, 4))
        may_write.set()
        checkpoints.wait()
        assert checkpoints.steps() == [2]
    load(tmp_path, model, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(expected, model.parameters(), strict=True))


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    assert load(tmp_path, *start()) is None


def test_a_certain_step(tmp_path: Path) -> None:
    model, optimizer = start()
    expected = model.lm_head.weight.clone()
    save(tmp_path, 1, model, optimizer)
    train(model, optimizer, range(1))
    save(tmp_path, 2, model, optimizer)
    with closing(Checkpoints(tmp_path)) as checkpoints:
        assert checkpoints.load(model, step=1) == {"step": 1}
        assert torch.equal(model.lm_head.weight, expected)
        with pytest.raises(UserError, match=r"no whole checkpoint of step 3; there are those of \[1, 2\]"):
            checkpoints.load(model, step=3)


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    model, optimizer = start()
    train(model, optimizer, range(1))
    save(tmp_path, 1, model, optimizer)
    expected = model.lm_head.weight.clone()
    train(model, optimizer, range(1, 2))
    save(tmp_path, 2, model, optimizer)
    newest = tmp_path / "step-00000002" / "rank-00000.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"skipping a damaged checkpoint: .*step-00000002/rank-00000\.safetensors"):
        assert load(tmp_path, model, optimizer) == {"step": 1}
    assert torch.equal(model.lm_head.weight, expected)


def test_a_renamed_checkpoint_is_passed_over(tmp_path: Path) -> None:
    model, optimizer = start()
    for step in (1, 2):
        save(tmp_path, step, model, optimizer)
    (tmp_path / "step-00000002").rename(tmp_path / "step-00000009")
    with pytest.warns(UserWarning, match=r"skipping a damaged checkpoint: .*step-00000009: is that of step 2, renamed"):
        assert load(tmp_path, model, optimizer) == {"step": 1}


def test_none_that_is_whole(tmp_path: Path) -> None:
    model, optimizer = start()
    save(tmp_path, 1, model, optimizer)
    (tmp_path / "step-00000001" / "checksums.json").unlink()
    with (
        pytest.warns(UserWarning, match="skipping a damaged checkpoint"),
        pytest.raises(UserError, match=rf"{tmp_path}: no whole checkpoint in it; remove it to start from the beginn"),
    ):
        load(tmp_path, model, optimizer)


@pytest.mark.parametrize("other", [{"intermediate_size": 24}, {"plan": "identity"}, {"plan": "cla3"}])
def test_a_checkpoint_of_another_model(other: dict[str, Any], tmp_path: Path) -> None:
    model = random_model(tiny_config(**other))
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, range(1))
    save(tmp_path, 1, model, optimizer)
    for mine in (start(), start()[:1]):  # to go on, and to export
        with (
            closing(Checkpoints(tmp_path)) as checkpoints,
            pytest.raises(UserError, match=rf"{tmp_path}/step-00000001: not a checkpoint of this model: ") as refused,
        ):
            checkpoints.load(*mine)
        assert "\n" not in str(refused.value)


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    model, optimizer = start()
    with closing(Checkpoints(tmp_path)) as checkpoints:
        for step in (1, 2, 3, 10):
            checkpoints.save(step, model, optimizer, {})
    assert names(tmp_path) == ["step-00000003", "step-00000010"]


def test_what_a_killed_process_has_left_is_cleaned(tmp_path: Path) -> None:
    model, optimizer = start()
    for step in (1, 7):
        (tmp_path / f".step-0000000{step}").mkdir()
        (tmp_path / f".step-0000000{step}" / "rank-00003.safetensors").write_bytes(b"half of it")
    save(tmp_path, 1, model, optimizer)
    assert names(tmp_path) == ["step-00000001"]
    assert load(tmp_path, model, optimizer) == {"step": 1}


@pytest.mark.parametrize("moment", ["save_file", "write_json", "seal", "flush"])
def test_a_crash_while_saving_leaves_the_former_state(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = start()
    save(tmp_path, 1, model, optimizer)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(state_module, moment, crash)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, model, optimizer)
    assert load(tmp_path, model, optimizer) == {"step": 1}
    save(tmp_path, 2, model, optimizer)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_full_disk_is_reported_and_the_former_state_kept(tmp_path: Path) -> None:
    model, optimizer = start()
    train(model, optimizer, range(1))
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, model, optimizer, {})
        checkpoints.wait()
        size = (tmp_path / "step-00000001" / "rank-00000.safetensors").stat().st_size
        message = (
            rf"the checkpoint of step 2 could not be written to {tmp_path}: .*File too large.*; "
            "training goes on, the newest is that of step 1"
        )
        with file_size_limit(size // 2):
            checkpoints.save(2, model, optimizer, {})
            with pytest.warns(UserWarning, match=message):
                checkpoints.wait()
        assert names(tmp_path) == ["step-00000001"]
        assert checkpoints.failed == 1
        checkpoints.save(3, model, optimizer, {})
    assert json.loads((tmp_path / "step-00000003" / "state.json").read_text()) == {"step": 3}
    assert load(tmp_path, model, optimizer) == {"step": 3}
