"""Llama, Mistral, Qwen2 and Qwen3 of transformers against ours: both ways through a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import crosslayer
from crosslayer.model.rope import rope_tables
from crosslayer.plan import ModelConfig, SharingPlan
from tests.conftest import tiny_config
from tests.model.checks import assert_close, in_chunks, random_model, random_tokens

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
SLIDING_QWEN = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}

THEIRS = {
    "llama": LlamaConfig(**SHAPE),
    "llama tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama bias": LlamaConfig(**SHAPE, attention_bias=True),
    "llama multi-head": LlamaConfig(**{**SHAPE, "num_key_value_heads": None}),
    "llama head_dim": LlamaConfig(**SHAPE, head_dim=10, rms_norm_eps=1e-3),
    "llama theta": LlamaConfig(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 77.0}),
    "llama linear": LlamaConfig(**SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}),
    "llama llama3": LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "llama yarn": LlamaConfig(**SHAPE, rope_parameters=YARN),
    "llama yarn mscale": LlamaConfig(**SHAPE, rope_parameters={**YARN, "mscale": 0.7, "mscale_all_dim": 0.4}),
    "llama yarn factors": LlamaConfig(
        **SHAPE,
        rope_parameters={**YARN, "attention_factor": 1.3, "beta_fast": 8.0, "beta_slow": 0.5, "truncate": False},
    ),
    "mistral": MistralConfig(**SHAPE, sliding_window=5),
    "mistral full": MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen2 sliding": Qwen2Config(**SHAPE, **SLIDING_QWEN),
    "qwen2 yarn": Qwen2Config(**SHAPE, rope_parameters=YARN),
    "qwen3": Qwen3Config(**SHAPE, head_dim=10),
    "qwen3 bias": Qwen3Config(**SHAPE, head_dim=8, attention_bias=True),
    "qwen3 sliding": Qwen3Config(**SHAPE, head_dim=8, **SLIDING_QWEN),
}


def their_logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    return logits


def their_random_model(config: Any) -> Any:
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.3 * noise + (0 if name.endswith("bias") else 1))
            else:
                parameter.copy_(noise if "embed_tokens" in name else noise / parameter.shape[1] ** 0.5)
    return model


@pytest.mark.parametrize("name", THEIRS)
def test_theirs_loads_here(name: str, tmp_path: Path) -> None:
    theirs = their_random_model(THEIRS[name])
    theirs.save_pretrained(tmp_path)
    ours = crosslayer.load(tmp_path)
    tokens = random_tokens(ours, 2, 20)
    expected = their_logits(theirs, tokens)
    assert_close(ours(tokens).detach(), expected, name)
    assert_close(in_chunks(ours, tokens, [7, 1, 9, 3]), expected, f"{name}, cached")


def test_their_config_of_version_4_loads_here(tmp_path: Path) -> None:
    """Before version 5 the RoPE base stood beside a `rope_scaling`, whose kind was called `type` earlier still."""
    theirs = their_random_model(LlamaConfig(**SHAPE, rope_parameters=LLAMA3))
    theirs.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    scaling = data.pop("rope_parameters")
    data["rope_theta"] = scaling.pop("rope_theta")
    for key in ("rope_type", "type"):
        data["rope_scaling"] = {key: "llama3", **{k: v for k, v in scaling.items() if k != "rope_type"}}
        (tmp_path / "config.json").write_text(json.dumps(data))
        tokens = torch.arange(20)[None]
        assert_close(crosslayer.load(tmp_path)(tokens).detach(), their_logits(theirs, tokens), key)


OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("LlamaForCausalLM", {}),
    "tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "biases": ("LlamaForCausalLM", {"attention_bias": True, "attention_output_bias": True}),
    "multi-head": ("LlamaForCausalLM", {"num_key_value_heads": 4, "head_dim": 8}),
    "windows": ("MistralForCausalLM", {"plan": "0@5,1@5,2@5,3@5,4@5,5@5"}),
    "qkv bias": ("Qwen2ForCausalLM", {"attention_bias": True, "head_dim": 8}),
    "qk-norm": ("Qwen3ForCausalLM", {"qk_norm": True}),
}


@pytest.mark.parametrize("name", OURS)
def test_ours_loads_there(name: str, tmp_path: Path) -> None:
    architecture, changes = OURS[name]
    ours = random_model(tiny_config(**{"plan": "identity", **changes}))
    crosslayer.save(ours, tmp_path / "model")
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert type(theirs) is getattr(transformers, architecture)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = random_tokens(ours, 2, 20)
    assert_close(ours(tokens).detach(), their_logits(theirs, tokens), name)


@pytest.mark.parametrize("name", [name for name in THEIRS if name.startswith("llama")])
def test_ours_loads_there_with_their_rope(name: str, tmp_path: Path) -> None:
    """Round trip: their model, loaded and saved by us, is theirs again."""
    theirs = their_random_model(THEIRS[name])
    theirs.save_pretrained(tmp_path / "theirs")
    crosslayer.save(crosslayer.load(tmp_path / "theirs"), tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert type(again) is type(theirs)
    tokens = torch.arange(30)[None]
    torch.testing.assert_close(their_logits(again, tokens), their_logits(theirs, tokens), rtol=0, atol=0)


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1000000.0])
@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_rope_is_theirs_bit_for_bit_at_long_positions(kind: str, theta: float) -> None:
    """At position 131071 a frequency off by one unit in the last place turns a pair by 0.008."""
    scaling = {"rope_type": kind, "rope_theta": theta, "factor": 8.0, "original_max_position_embeddings": 8192}
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    elif kind in ("default", "linear"):
        del scaling["original_max_position_embeddings"]
    if kind == "default":
        del scaling["factor"]
    fields = {**SHAPE, "head_dim": 128, "max_position_embeddings": 131072, "rope_parameters": scaling}
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(LlamaConfig(**fields))
    positions = torch.tensor([[0, 1, 4095, 65536, 131071]])
    cos, sin = theirs(torch.zeros(()), positions)
    ours = rope_tables(ModelConfig.from_dict({"model_type": "llama", **fields}), positions)
    assert torch.equal(ours[0][:, :, 0], cos[..., :64])
    assert torch.equal(ours[1][:, :, 0], sin[..., :64])


def test_model_of_a_shared_plan_is_not_mistaken_for_llama(tmp_path: Path) -> None:
    crosslayer.save(random_model(tiny_config("cla2")), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] == "crosslayer"
    assert SharingPlan.from_dict(config["sharing_plan"]) == tiny_config("cla2").plan
    with pytest.raises((ValueError, KeyError), match="crosslayer"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")
