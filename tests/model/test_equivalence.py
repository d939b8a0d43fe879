"""Every design, every way to run it: the same numbers."""

from __future__ import annotations

import pytest
import torch

from crosslayer.model import ContiguousCache
from crosslayer.plan import DESIGNS as REGISTERED
from tests.conftest import CACHEABLE, DESIGNS, LOOPING, tiny_config
from tests.model.checks import (
    CHECKS,
    assert_close,
    assert_same_gradients,
    in_chunks,
    loss_and_gradients,
    next_token_loss,
    random_model,
    random_tokens,
)

# Shapes and options, each on a plan that shares; the designs all have the same shape.
VARIANTS = {
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "heads of an odd number and size": {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 6},
    "biases": {"attention_bias": True, "attention_output_bias": True},
    "qk-norm": {"qk_norm": True},
    "one shared norm": {"separate_kv_norm": False},
    "tied embeddings": {"tie_word_embeddings": True},
}

WINDOWED = (
    "0@{w},1@{w},2@{w},3@{w},4@{w},5@{w}",
    "mixattention:window={w},period=3",
    "suffix:3,window={w},period=2",
    "yoco:window={w}",
    "0@{w},1@{w},1@2,0@{w},4@{w},4@{w}/0,1,1,0,4,1",
)


def test_every_registered_design_is_tested() -> None:
    named = [text.partition(":")[0] for text in (*DESIGNS, *LOOPING)]
    for design in REGISTERED:
        stem = design.pattern.replace("N", "2")
        assert stem in named, f"add {design.pattern} to DESIGNS or LOOPING in tests/conftest.py"


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("plan", CACHEABLE)
def test_design(plan: str, check: str) -> None:
    CHECKS[check](random_model(tiny_config(plan)))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(variant: str, check: str) -> None:
    CHECKS[check](random_model(tiny_config("cla2", **VARIANTS[variant])))


@pytest.mark.parametrize("window", [2, 3, 4, 5, 9, 50])
@pytest.mark.parametrize("plan", WINDOWED)
def test_windows_against_chunks_of_four(plan: str, window: int) -> None:
    """Windows shorter than, as long as and longer than the chunks, and longer than the cache."""
    model = random_model(tiny_config(plan.format(w=window)))
    tokens = random_tokens(model, 2, 20)
    expected = model(tokens).detach()
    for max_length in (20, 21, 33):
        assert_close(in_chunks(model, tokens, [4] * 5, max_length), expected, f"max_length {max_length}")
    assert_close(in_chunks(model, tokens, [13, 1, 1, 4, 1]), expected, "after a prefill longer than the windows")


def test_cache_used_with_gradients_on() -> None:
    """Forgetting no_grad keeps no graph in the cache, and activation checkpointing does not write to it twice."""
    model = random_model(tiny_config("yoco:window=5"))
    tokens = random_tokens(model, 1, 12)
    expected = model(tokens).detach()
    gradients = []
    for recompute in ("none", "block"):
        model.model.activation_checkpointing = recompute
        cache = ContiguousCache(model.config, 1, 12)
        logits = [model(chunk, cache=cache) for chunk in tokens.split(4, dim=1)]
        assert_close(torch.cat(logits, dim=1).detach(), expected, "cached with gradients on")
        assert not any(buffer.requires_grad for buffer in (*cache.keys.values(), *cache.values.values()))
        model.zero_grad()
        logits[-1].square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_same_gradients(gradients[1], gradients[0], "of the last chunk")


def test_bfloat16_model_and_cache_stay_close() -> None:
    """In bfloat16 the cached run agrees to that type's precision with the uncached one in float32."""
    model = random_model(tiny_config("mixattention:window=5,period=3"))
    tokens = random_tokens(model, 2, 16)
    expected = model(tokens).detach()
    model.bfloat16()
    cache = ContiguousCache(model.config, 2, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        logits = torch.cat([model(chunk, cache=cache) for chunk in tokens.split(3, dim=1)], dim=1)
    assert_close(logits, expected, "bfloat16", tolerance=0.03)


def test_document_ids_without_boundaries_change_nothing() -> None:
    model = random_model(tiny_config("suffix:3,window=5,period=2"))
    tokens = random_tokens(model, 2, 12)
    with torch.no_grad():
        assert_close(model(tokens, document_ids=torch.full_like(tokens, 4)), model(tokens), "one document")


@pytest.mark.parametrize("plan", ["cla2", "0,1,1,1,4,1/0,1,0,3,3,0", "yoco:window=3"])
def test_gradients_against_finite_differences(plan: str) -> None:
    """The slope of the loss along a random direction in every parameter, in float64, is the gradient's."""
    model = random_model(tiny_config(plan)).double()
    tokens = random_tokens(model, 2, 8)
    generator = torch.Generator().manual_seed(3)
    for recompute in ("none", "block"):
        model.model.activation_checkpointing = recompute
        _, gradients = loss_and_gradients(model, tokens)
        for name, parameter in model.named_parameters():
            direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            losses = []
            with torch.no_grad():
                for step in (1e-5, -2e-5):
                    parameter += step * direction
                    losses.append(next_token_loss(model, tokens))
                parameter += 1e-5 * direction
            slope = (losses[0] - losses[1]) / 2e-5
            assert_close((gradients[name] * direction).sum(), slope, f"slope along {name}", tolerance=1e-5)
