"""torch.compile changes nothing: forward, backward, with activation checkpointing, and through a cache."""

from __future__ import annotations

import copy

import pytest
import torch

from crosslayer.model import ContiguousCache
from crosslayer.plan.cost import Recompute
from tests.conftest import CACHEABLE, tiny_config
from tests.model.checks import (
    assert_close,
    assert_same_gradients,
    loss_and_gradients,
    random_model,
    random_tokens,
)


def check_compiled(plan: str, backend: str, layers: int, recompute: Recompute = "none") -> None:
    """Loss and gradients of one graph without a break are those of the uncompiled model."""
    torch.compiler.reset()
    model = random_model(tiny_config(plan, num_hidden_layers=layers, attention_bias=True))
    model.model.activation_checkpointing = recompute
    tokens = random_tokens(model, 2, 12)
    loss, gradients = loss_and_gradients(model, tokens)
    compiled = copy.deepcopy(model)
    compiled.compile(backend=backend, fullgraph=True)
    compiled_loss, compiled_gradients = loss_and_gradients(compiled, tokens)
    assert_close(compiled_loss, loss, "loss")
    assert_same_gradients(compiled_gradients, gradients, "compiled")


@pytest.mark.parametrize(
    ("plan", "recompute"), [("cla2", "none"), ("0@5,0@5,2@3/0,1,1", "block"), ("cla2", "group"), ("1,1,2", "none")]
)
def test_traced(plan: str, recompute: Recompute) -> None:
    check_compiled(plan, "aot_eager", layers=3, recompute=recompute)


@pytest.mark.slow
@pytest.mark.parametrize("plan", CACHEABLE)
def test_every_design_traced(plan: str) -> None:
    check_compiled(plan, "aot_eager", layers=6)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["cla3", "yoco:window=5", "0@5,0@5,2@3/0,1,1"])
def test_inductor(plan: str) -> None:
    check_compiled(plan, "inductor", layers=3)


def test_packed_documents_traced() -> None:
    torch.compiler.reset()
    model = random_model(tiny_config("yoco:window=5", num_hidden_layers=3))
    tokens = random_tokens(model, 2, 12)
    ids = torch.tensor([[0] * 5 + [1] * 7, [0] * 9 + [1] * 3])
    with torch.no_grad():
        expected = model(tokens, document_ids=ids)
        model.compile(backend="eager", fullgraph=True)
        assert_close(model(tokens, document_ids=ids), expected, "compiled, packed")


@pytest.mark.slow
def test_cached_decoding_traced() -> None:
    """Graph breaks are allowed here: a cache counts its tokens on the CPU."""
    torch.compiler.reset()
    model = random_model(tiny_config("yoco:window=3", num_hidden_layers=2))
    tokens = random_tokens(model, 2, 9)
    with torch.no_grad():
        expected = model(tokens)
        model.compile(backend="eager")
        cache = ContiguousCache(model.config, 2, 9)
        logits = [model(chunk, cache=cache) for chunk in tokens.split([4, 1, 1, 3], dim=1)]
    assert_close(torch.cat(logits, dim=1), expected, "compiled, cached")
