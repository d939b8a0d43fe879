"""What is built and allocated, and what is refused."""

from __future__ import annotations

import re

import pytest
import torch

from crosslayer.engine import LLM
from crosslayer.errors import UserError
from crosslayer.model import ContiguousCache, Transformer
from crosslayer.plan import PRESETS, parse_design, parse_plan
from crosslayer.plan.cost import BYTES_PER_ELEMENT, kv_bytes, num_parameters
from tests.conftest import CACHEABLE, LOOPING, tiny_config
from tests.model.checks import random_model, random_tokens

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}

# KV bytes per token of table 1 in arXiv 2405.12981 (bfloat16).
TABLE_1 = {
    "H128-MHA": 163840,
    "H128-GQA4": 40960,
    "H128-GQA2": 20480,
    "H128-MQA": 10240,
    "H64-MQA": 5120,
    "H46-MQA": 3680,
    "H32-MQA": 2560,
    "H512-MQA-CLA2": 20480,
    "H256-MQA-CLA2": 10240,
    "H128-MQA-CLA2": 5120,
    "H90-MQA-CLA2": 3600,
    "H64-MQA-CLA2": 2560,
    "H256-GQA4-CLA2": 40960,
    "H128-GQA4-CLA2": 20480,
    "H128-GQA2-CLA2": 10240,
    "H128-MQA-CLA3": 3584,
    "H128-MQA-CLA4": 2560,
    "H128-MQA-CLA2-KeepEnds": 5632,
    "H128-MQA-CLA2-DenseFront": 5632,
    "H128-MQA-CLA2-DenseBack": 5632,
}


@pytest.mark.parametrize("plan", CACHEABLE)
def test_planner_figures_are_what_is_allocated(plan: str) -> None:
    config = tiny_config(plan, attention_bias=True, qk_norm=True)
    assert num_parameters(config) == sum(parameter.numel() for parameter in Transformer(config).parameters())
    for name in BYTES_PER_ELEMENT:
        for context in (1, 4, 5, 6, 40):
            cache = ContiguousCache(config, 3, context, dtype=DTYPES[name])
            assert cache.nbytes == kv_bytes(config, context, batch=3, cache_dtype=name)


@pytest.mark.parametrize("name", TABLE_1)
def test_paper_models_allocate_the_bytes_of_table_1(name: str) -> None:
    config = parse_design(name, PRESETS["paper-1b"])
    cache = ContiguousCache(config, 2, 2048, dtype=torch.bfloat16, device="meta")
    assert cache.nbytes == 2 * 2048 * TABLE_1[name]
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters(config)


@pytest.mark.parametrize("plan", LOOPING)
def test_a_reader_below_its_owner_has_no_cache(plan: str) -> None:
    config = tiny_config(plan)
    layer = next(layer for layer, source in enumerate(config.plan.key_sources) if source > layer)
    model = random_model(config)
    with pytest.raises(UserError, match=rf"^layer {layer} reads a layer above it: .* not to generate text"):
        model(random_tokens(model, 1, 3), cache=ContiguousCache(config, 1, 4))
    with pytest.raises(UserError, match=rf"^layer {layer} reads a layer above it"):
        LLM(model)
    assert num_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


def test_a_reader_below_its_owner_has_neither_window_nor_documents() -> None:
    with pytest.raises(UserError, match="layer 1 reads a layer above it, and cannot have a window besides"):
        Transformer(tiny_config("0,2@3,2,3,4,5"))
    model = random_model(tiny_config("lckv"))
    tokens = random_tokens(model, 2, 4)
    with pytest.raises(UserError, match="document_ids"):
        model(tokens, document_ids=torch.zeros_like(tokens))


def test_keys_and_values_kept_for_different_lengths_are_refused() -> None:
    config = tiny_config("0@6,1@4,0@3,3,4,5/0,1,1,3,4,5")
    message = "layer 2: its keys (layer 0) are cached for 6 tokens but its values (layer 1) for 4"
    with pytest.raises(UserError, match=re.escape(message)):
        ContiguousCache(config, 1, 10)
    ContiguousCache(config, 1, 4)  # no window matters yet


def test_misuse_of_a_cache_is_refused() -> None:
    model = random_model(tiny_config())
    tokens = random_tokens(model, 2, 4)
    with pytest.raises(UserError, match="holds 3 tokens a row, but a row would need 4"):
        model(tokens, cache=ContiguousCache(model.config, 2, 3))
    for rows in (1, 3):
        with pytest.raises(UserError, match=f"cache has {rows} rows, but input_ids has 2"):
            model(tokens, cache=ContiguousCache(model.config, rows, 9))
    for wrong in ([1, 5], [-1, 2], [1], [1, 1, 1]):
        with pytest.raises(UserError, match=r"new_lengths must be 2 numbers from 0 to 4, got \["):
            model(tokens, cache=ContiguousCache(model.config, 2, 9), new_lengths=torch.tensor(wrong))
    with pytest.raises(UserError, match="document_ids"):
        model(tokens, cache=ContiguousCache(model.config, 2, 9), document_ids=torch.zeros_like(tokens))


def test_refused_step_leaves_the_cache_as_it_was() -> None:
    model = random_model(tiny_config())
    tokens = random_tokens(model, 1, 6)
    cache = ContiguousCache(model.config, 1, 6)
    with torch.no_grad():
        model(tokens[:, :4], cache=cache)
        with pytest.raises(UserError, match="would need 7"):
            model(tokens[:, :3], cache=cache)
        torch.testing.assert_close(model(tokens[:, 4:], cache=cache), model(tokens)[:, 4:])


def test_initial_weights() -> None:
    config = tiny_config(
        "identity",
        num_hidden_layers=4,
        vocab_size=500,
        hidden_size=256,
        intermediate_size=300,
        head_dim=128,
        attention_bias=True,
        initializer_range=PRESETS["paper-1b"].initializer_range,
    )
    models = {plan: Transformer(config.with_plan(parse_plan(plan, 4)), seed=7) for plan in ("identity", "cla2")}
    for name, parameter in models["cla2"].named_parameters():
        if parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(0.01275, rel=0.02), name
            assert abs(parameter.mean().item()) < 0.0005, name
        else:
            assert torch.all(parameter == (0 if name.endswith("bias") else 1)), name
    state, shared = models["identity"].state_dict(), models["cla2"].state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in shared.items() if "kv_layernorm" not in name)
    again, other = Transformer(config, seed=7).state_dict(), Transformer(config, seed=8).state_dict()
    matrices = [name for name, tensor in state.items() if tensor.ndim == 2]
    assert all(torch.equal(state[name], again[name]) for name in matrices)
    assert not any(torch.equal(state[name], other[name]) for name in matrices)
    drawn = [state[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in range(4)]
    assert not torch.equal(drawn[0], drawn[1])


def test_separate_norm_has_no_effect_where_nothing_is_shared() -> None:
    names = [set(Transformer(tiny_config("identity", separate_kv_norm=on)).state_dict()) for on in (True, False)]
    assert names[0] == names[1]
