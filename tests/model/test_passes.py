"""Layers that read a layer above them, in several passes, against the definition token by token."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from crosslayer.model import Transformer, transformer
from tests.conftest import LOOPING, tiny_config
from tests.model.checks import assert_close, difference, random_model, random_tokens
from tests.model.reference import reference_logits, reference_loss

# One loop and two, keys or values alone from above, and loops that overlap.
PLANS = (*LOOPING, "1,1,2,5,4,5", "0,1,2,3,4,5/0,3,2,3,4,5", "0,4,2,5,4,5/0,1,3,3,4,5")


def expected(model: Transformer, tokens: Tensor) -> Tensor:
    weights = dict(model.named_parameters())
    return torch.stack([reference_logits(weights, model.config, row.tolist()) for row in tokens])


@torch.no_grad()
@pytest.mark.parametrize("plan", PLANS)
def test_as_many_tokens_as_passes_are_exact(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(tiny_config(plan, qk_norm=True, attention_bias=True)).double()
    tokens = random_tokens(model, 2, 12)
    wanted = expected(model, tokens)
    assert_close(model(tokens)[:, :9], wanted[:, :9], "nine passes", 1e-6)
    assert_close(model(tokens[:, :1]), wanted[:, :1], "a single token", 1e-6)
    monkeypatch.setattr(transformer, "PASSES", 1)
    found = model(tokens)
    assert_close(found[:, :3], wanted[:, :3], "three passes", 1e-6)
    assert difference(found[:, 3:], wanted[:, 3:]) > 1e-4


@pytest.mark.parametrize("plan", PLANS)
def test_gradients_where_all_passes_have_them(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer, "PASSES", 0)
    monkeypatch.setattr(transformer, "PASSES_WITH_GRADIENT", 5)
    model = random_model(tiny_config(plan)).double()
    tokens = random_tokens(model, 2, 6)
    found = gradients(model, tokens)
    weights = {name: parameter.detach().requires_grad_() for name, parameter in model.named_parameters()}
    reference_loss(weights, model.config, tokens.tolist()).backward()  # type: ignore[no-untyped-call]
    for name, weight in weights.items():
        assert weight.grad is not None
        assert_close(found[name], weight.grad, name, 1e-6)


def gradients(model: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    """Of the mean loss."""
    model.zero_grad()
    (model(tokens[:, :-1], tokens[:, 1:].contiguous()) / tokens[:, 1:].numel()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("plan", PLANS)
def test_recomputing_and_autocast_change_no_gradients(plan: str) -> None:
    """Every weight learns, the owners' too, with two passes of nine that have gradients."""
    model = random_model(tiny_config(plan))
    tokens = random_tokens(model, 2, 12)
    plain = gradients(model, tokens)
    assert plain.keys() == dict(model.named_parameters()).keys()
    for recompute in ("block", "group"):
        model.model.activation_checkpointing = recompute  # type: ignore[assignment]
        for name, gradient in gradients(model, tokens).items():
            assert_close(gradient, plain[name], f"{recompute}: {name}", 1e-5)
    model.model.activation_checkpointing = "none"
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gradients(model, tokens)
    for name, gradient in plain.items():
        assert (rounded[name] - gradient).norm() < 0.2 * gradient.norm(), name


def test_the_readers_below_teach_their_owner() -> None:
    """With only one pass that has gradients, what they make of its keys and values would be left out."""
    model = random_model(tiny_config("lckv:1")).double()
    tokens = random_tokens(model, 2, 8)
    found = {}
    for count in (1, 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transformer, "PASSES_WITH_GRADIENT", count)
            patch.setattr(transformer, "PASSES", 9 - count)
            found[count] = gradients(copy.deepcopy(model), tokens)
    owner = model.config.plan.loops[0].stop - 1
    name = f"model.layers.{owner}.self_attn.v_proj.weight"
    assert (found[1][name] - found[2][name]).norm() > 0.01 * found[2][name].norm()
