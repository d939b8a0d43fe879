"""Training state: going on from it is going on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from crosslayer.checkpoint.state import load_state, save_state
from crosslayer.model import Transformer
from tests.conftest import tiny_config
from tests.model.checks import next_token_loss, random_model, random_tokens


def start(tied: bool = False) -> tuple[Transformer, torch.optim.Optimizer]:
    model = random_model(tiny_config(tie_word_embeddings=tied))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model: Transformer, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        next_token_loss(model, random_tokens(model, 2, 9, seed=step)).backward()
        optimizer.step()


@pytest.mark.parametrize("tied", [False, True])
def test_resuming_is_exact(tied: bool, tmp_path: Path) -> None:
    model, optimizer = start(tied)
    train(model, optimizer, range(3))
    save_state(tmp_path, 3, model, optimizer, {"tokens": 48})
    train(model, optimizer, range(3, 6))

    resumed, resumed_optimizer = start(tied)
    assert load_state(tmp_path, resumed, resumed_optimizer) == {"step": 3, "tokens": 48}
    train(resumed, resumed_optimizer, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))
    assert (resumed.lm_head.weight is resumed.model.embed_tokens.weight) == tied


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    assert load_state(tmp_path, *start()) is None


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    model, optimizer = start()
    train(model, optimizer, range(1))
    save_state(tmp_path, 1, model, optimizer, {})
    expected = model.lm_head.weight.clone()
    train(model, optimizer, range(1, 2))
    save_state(tmp_path, 2, model, optimizer, {})
    newest = tmp_path / "step-00000002" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"skipping a damaged checkpoint: .*step-00000002/state\.safetensors"):
        assert load_state(tmp_path, model, optimizer) == {"step": 1}
    assert torch.equal(model.lm_head.weight, expected)


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    model, optimizer = start()
    for step in (1, 2, 3, 10):
        save_state(tmp_path, step, model, optimizer, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]


def test_a_crash_while_saving_leaves_the_former_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = start()
    save_state(tmp_path, 1, model, optimizer, {})

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("crosslayer.checkpoint.state.write_json", crash)
        with pytest.raises(KeyboardInterrupt):
            save_state(tmp_path, 2, model, optimizer, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert load_state(tmp_path, model, optimizer) == {"step": 1}
