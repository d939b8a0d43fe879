"""The same on a GPU, where windows and packed documents go through FlexAttention, in eager mode and compiled."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from crosslayer.model import Transformer
from tests.conftest import tiny_config
from tests.model.checks import assert_close, chunked_prefill, ragged_batch, random_model, random_tokens, reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

PLANS = ("cla2", "mixattention:window=5,period=3", "0@6,1@6,1@4,0@6,4,4@3/0,1,0,1,4,4")


@pytest.mark.parametrize("check", [reference, chunked_prefill, ragged_batch])
@pytest.mark.parametrize("head_dim", [10, 16])  # 16 is the least that FlexAttention takes as it is
@pytest.mark.parametrize("plan", PLANS)
def test_inference(plan: str, head_dim: int, check: type) -> None:
    check(random_model(tiny_config(plan, head_dim=head_dim)).cuda())


def packed_loss_and_gradients(model: Transformer) -> tuple[Tensor, dict[str, Tensor]]:
    device = model.lm_head.weight.device
    tokens = random_tokens(model, 2, 129)
    ids = torch.tensor([[0] * 50 + [1] * 78, [0] * 3 + [1] * 125], device=device)
    loss = cross_entropy(model(tokens[:, :-1], document_ids=ids).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    return loss.detach().cpu(), {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("way", ["eager", "checkpointed", "compiled"])
@pytest.mark.parametrize("head_dim", [10, 16])
@pytest.mark.parametrize("plan", PLANS)
def test_training_on_packed_documents(plan: str, head_dim: int, way: str) -> None:
    """Losses and gradients on the GPU are those on the CPU."""
    torch.compiler.reset()
    model = random_model(tiny_config(plan, head_dim=head_dim))
    on_gpu = copy.deepcopy(model).cuda()
    on_gpu.model.activation_checkpointing = "block" if way == "checkpointed" else "none"
    if way == "compiled":
        on_gpu.compile()
    loss, gradients = packed_loss_and_gradients(model)
    gpu_loss, gpu_gradients = packed_loss_and_gradients(on_gpu)
    assert_close(gpu_loss, loss, "loss")
    for name, gradient in gradients.items():
        assert_close(gpu_gradients[name], gradient, f"gradient of {name}", tolerance=1e-4)
