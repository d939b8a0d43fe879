"""The planner's arithmetic, against the model itself, transformers, PyTorch's FLOP counter and brute force."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from crosslayer.errors import UserError
from crosslayer.model import Transformer
from crosslayer.plan import ModelConfig, SharingPlan, parse_design, preset
from crosslayer.plan.cost import (
    Recompute,
    forward_flops_per_token,
    kv_bytes,
    kv_bytes_per_token,
    largest_batch,
    layer_weights,
    longest_context,
    num_parameters,
    recomputed_flops_per_token,
    training_flops_per_token,
)
from tests.conftest import CACHEABLE, LOOPING, tiny_config
from tests.plan.plans import plans

VARIANTS: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": True, "separate_kv_norm": False},
    {"attention_bias": True, "qk_norm": True},
    {"attention_bias": True, "attention_output_bias": True},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(variant) or "plain")
@pytest.mark.parametrize("plan", CACHEABLE)
def test_parameters_are_those_of_the_model(plan: str, variant: dict[str, Any]) -> None:
    config = tiny_config(plan, **variant)
    with torch.device("meta"):
        model = Transformer(config)
    assert num_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_parameters_are_those_of_the_same_transformers_model(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    bias, qk_norm = kind == "qwen2", kind == "qwen3"
    config = replace(parse_design("H128-GQA4", preset("paper-1b")), attention_bias=bias, qk_norm=qk_norm)
    config = config.with_plan(SharingPlan(tuple(range(20)), windows=(4096,) * 20)) if kind == "mistral" else config
    theirs = transformers.AutoConfig.for_model(**config.to_dict())
    assert theirs.model_type == kind
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    assert num_parameters(config) == model.num_parameters()


@pytest.mark.parametrize("plan", [*CACHEABLE, *LOOPING])
def test_flops_are_those_that_pytorch_counts_for_one_token(plan: str) -> None:
    config = tiny_config(plan, attention_bias=True, tie_word_embeddings=True)
    model = Transformer(config)
    # In one token's attention there is nothing to mask, and the plain kernel is two matrix products, which are counted.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long))
    assert forward_flops_per_token(config, 1) == counter.get_total_flops()


@pytest.mark.parametrize("plan", LOOPING)
def test_flops_of_training_in_several_passes(plan: str) -> None:
    """Products with weights are those that PyTorch counts; those of attention follow from the keys that are seen."""
    config, tokens = tiny_config(plan), 5
    model = Transformer(config)
    ids = torch.zeros(1, tokens, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids, ids).backward()
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    again = [layer for loop in config.plan.loops for layer in loop]
    # Of the last pass but one, the backward pass needs the keys and values of the owner alone, the top layer of a run.
    kv_width = config.num_key_value_heads * config.head_dim
    unused = sum(layer_weights(config, loop[-1]) - 2 * config.hidden_size * kv_width for loop in config.plan.loops)
    pairs = 0
    for layer in range(config.num_hidden_layers):
        seen = tokens * (tokens + (-1 if layer in config.plan.readers_below_owner else 1)) // 2
        pairs += seen * (9 + 2 * 2 if layer in again else 3)
    attention = 4 * config.num_attention_heads * config.head_dim * pairs
    assert tokens * training_flops_per_token(config, tokens) == counted + 4 * tokens * unused + attention
    once = forward_flops_per_token(config, tokens, passes=1) - 2 * config.vocab_size * config.hidden_size
    none, block, group = (recomputed_flops_per_token(config, tokens, how) for how in get_args(Recompute))
    assert 0 == none < once < block < group


@given(plans(), st.integers(1, 20))
def test_flops_of_a_sequence_count_each_key_that_a_query_attends_to(plan: SharingPlan, context: int) -> None:
    config = tiny_config(plan)
    below = plan.readers_below_owner
    runs = [9 if any(layer in loop for loop in plan.loops) else 1 for layer in range(plan.num_layers)]
    pairs = sum(
        runs[layer]
        for layer, window in enumerate(plan.windows)
        for query in range(context)
        for key in range(query if layer in below else query + 1)
        if layer in below or window is None or query - key < window
    )
    one_token = forward_flops_per_token(config, 1)
    head_flops = 4 * config.num_attention_heads * config.head_dim
    attending = sum(runs[layer] for layer in range(plan.num_layers) if layer not in below)
    exact = one_token - head_flops * attending + head_flops * pairs / context
    assert forward_flops_per_token(config, context) == round(exact)
    if not plan.loops:
        assert training_flops_per_token(config, context) == 3 * round(exact)


@given(plans(), st.integers(1, 30), st.integers(1, 4), st.sampled_from(("fp32", "bf16", "fp8", "int8")))
def test_cache_bytes_are_those_of_the_tokens_that_can_still_be_seen(
    plan: SharingPlan, context: int, batch: int, dtype: str
) -> None:
    config = tiny_config(plan)
    element = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}[dtype]
    vector = config.num_key_value_heads * config.head_dim * element.itemsize
    stored = 0
    for sources in (plan.key_sources, plan.value_sources):
        for owner in set(sources):
            reaches = [
                window or context for source, window in zip(sources, plan.windows, strict=True) if source == owner
            ]
            stored += min(context, max(reaches))
    assert kv_bytes(config, context, batch, dtype) == batch * stored * vector
    assert kv_bytes_per_token(config, dtype) == kv_bytes(config, 1, 1, dtype)
    far = 100  # past every window
    growth = kv_bytes(config, far + 1, 1, dtype) - kv_bytes(config, far, 1, dtype)
    assert kv_bytes_per_token(config, dtype, past_windows=True) == growth


@given(plans(), st.integers(1, 40), st.integers(1, 9), st.integers(-2000, 40000))
def test_what_fits_fits_and_one_more_does_not(plan: SharingPlan, context: int, batch: int, spare: int) -> None:
    config = tiny_config(plan)
    weights = 2 * num_parameters(config)

    def fits(context: int, batch: int) -> bool:
        return weights + kv_bytes(config, context, batch) <= weights + spare

    most = largest_batch(config, context, weights + spare)
    assert most == 0 or fits(context, most)
    assert not fits(context, most + 1)
    longest = longest_context(config, batch, weights + spare)
    if longest is None:
        assert fits(10**9, batch)
    else:
        assert longest == 0 or fits(longest, batch)
        assert not fits(longest + 1, batch)


def test_fp32_weights_leave_less_room() -> None:
    config = preset("paper-1b")
    room = [largest_batch(config, 2048, 80 * 2**30, weight_dtype=dtype) for dtype in ("bf16", "fp32")]
    assert room[0] - room[1] == pytest.approx(2 * num_parameters(config) / kv_bytes(config, 2048), abs=1)


def test_a_published_model() -> None:
    """Llama 3.1 8B: 8,030,261,248 parameters, and 128 KiB of KV a token in bf16."""
    config = ModelConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    assert num_parameters(config) == 8_030_261_248
    assert kv_bytes_per_token(config) == 128 * 1024


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(UserError, match="choose from fp32, bf16, fp8, int8"):
        kv_bytes_per_token(preset("paper-1b"), "fp16")
