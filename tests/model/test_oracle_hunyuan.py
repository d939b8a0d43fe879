"""Cross-Layer Attention as mlx-lm's Hunyuan computes it, with weights copied from ours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from crosslayer.model import Transformer
from tests.conftest import LAYERS, tiny_config
from tests.model.checks import assert_close, in_chunks, random_model, random_tokens

# mlx has no package for some platforms; the test extra installs it on the others.
mx = pytest.importorskip("mlx.core")
hunyuan = pytest.importorskip("mlx_lm.models.hunyuan")


def their_model(ours: Transformer, share_factor: int) -> Any:
    config = ours.config
    theirs = hunyuan.Model(
        hunyuan.ModelArgs(
            model_type="hunyuan",
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            intermediate_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            attention_bias=config.attention_bias,
            moe_topk=1,
            num_experts=1,
            num_shared_expert=1,
            use_mixed_mlp_moe=False,
            use_qk_norm=False,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
            use_cla=True,
            cla_share_factor=share_factor,
            rope_scaling={"alpha": 1.0, "factor": 1.0, "type": "dynamic"},
        )
    )
    weights = [(name, mx.array(p.detach().numpy())) for name, p in ours.named_parameters()]
    theirs.load_weights(weights, strict=True)  # refuses a missing tensor and one too many
    return theirs


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("share_factor", [2, 3, 4])
def test_cross_layer_attention(share_factor: int, bias: bool) -> None:
    """Factor 4 does not divide the six layers: Hunyuan's incomplete group comes last."""
    ours = random_model(
        tiny_config(
            f"cla{share_factor}:rest=last",
            head_dim=8,
            tie_word_embeddings=True,
            separate_kv_norm=False,
            attention_bias=bias,
            attention_output_bias=bias,
        )
    )
    theirs = their_model(ours, share_factor)
    tokens = random_tokens(ours, 2, 14)

    def run(chunk: Tensor, cache: list[Any] | None = None) -> Tensor:
        return torch.from_numpy(np.array(theirs(mx.array(chunk.numpy()), cache)))

    with mx.stream(mx.cpu):
        expected = run(tokens)
        cache = [hunyuan_cache() for _ in range(LAYERS)]
        pieces = [run(piece, cache) for piece in tokens.split([6, 1, 1, 4, 1, 1], dim=1)]
    assert_close(ours(tokens).detach(), expected, "whole")
    assert_close(in_chunks(ours, tokens, [6, 1, 1, 4, 1, 1]), torch.cat(pieces, dim=1), "cached")


def hunyuan_cache() -> Any:
    from mlx_lm.models.cache import KVCache

    return KVCache()
