"""The engine's model in bfloat16 against the model itself in float64, and the whole engine on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch

from crosslayer.engine import Engine, EngineConfig
from crosslayer.model.fp8 import FP8, slot_scales
from crosslayer.model.paged import sequence_bytes
from tests.conftest import tiny_config
from tests.engine.rows import Rows
from tests.engine.runs import assert_greedy, assert_nothing_held, request, run
from tests.model.checks import difference, random_model, random_tokens

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
PLANS = ("cla2", "yoco:window=5", "fusedkv-lite", "0@6,1@6,1@4,0@6,4,4@3/0,1,0,1,4,4")
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_attention_heads": 4}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_logits_in_bfloat16(plan: str, fp8: bool, device: str) -> None:
    """A bfloat16 number is off by at most 1/256, an 8-bit one by 1/16; the logits are off by few times that, in prompts
    and in single tokens, in few rows and in many."""
    exact = random_model(tiny_config(plan, num_key_value_heads=2, **SHAPE)).double()
    model = copy.deepcopy(exact).bfloat16()
    exact.load_state_dict(model.state_dict())
    tokens = random_tokens(exact, 9, 40)
    expected = exact(tokens)
    rows = Rows(
        model,
        9,
        16,
        40,
        dtype=FP8 if fp8 else torch.bfloat16,
        scales=slot_scales(model) if fp8 else None,
        device=torch.device(device),
    )
    errors = []
    for new in ([30] * 9, [1] * 9, [4, 1, 1, 3, 1, 1, 1, 1, 1], [1, 1] + [0] * 7, [1] + [0] * 8, [1] * 5 + [0] * 4):
        logits = rows.feed(tokens, new, [True] * 9).cpu()
        asked = [(row, rows.sequences[row].num_cached - 1) for row, count in enumerate(new) if count]
        errors.append(difference(logits, torch.stack([expected[place] for place in asked])))
    assert max(errors) < (0.1 if fp8 else 0.02)


@needs_cuda
@pytest.mark.parametrize("sequences", [1.4, 9.0])
@pytest.mark.parametrize("plan", PLANS)
def test_greedy_on_a_gpu(plan: str, sequences: float) -> None:
    """With CUDA graphs, overlapped steps, chunks, equal beginnings and, in little memory, preemption."""
    model = random_model(tiny_config(plan, num_key_value_heads=2, **SHAPE))
    nbytes = int(sequences * sequence_bytes(model.config, 16, 96, torch.float32))
    config = EngineConfig(cache_bytes=nbytes, block_size=16, max_length=96, max_running=8, max_step_tokens=24)
    engine = Engine(model, config=config, device="cuda")
    beginning = [(7 * place) % 61 for place in range(40)]
    prompts = [[*beginning[: 8 * number], *range(number, number + 5)] for number in range(5)] * 2
    tokens = run(engine, [request(n, prompt, 30) for n, prompt in enumerate(prompts)], arrivals=list(range(10)))
    assert_nothing_held(engine)
    assert (engine.scheduler.num_preemptions > 0) == (sequences < 2)
    for number, prompt in enumerate(prompts):
        assert len(tokens[str(number), 0]) == 30
        assert_greedy(model, prompt, tokens[str(number), 0])


@needs_cuda
def test_float64_on_a_gpu() -> None:
    """Without graphs, as attention is plain PyTorch."""
    model = random_model(tiny_config("yoco:window=5", num_key_value_heads=2, **SHAPE)).double()
    config = EngineConfig(cache_bytes=2**20, block_size=16, max_length=96, max_running=8, max_step_tokens=24)
    engine = Engine(model, config=config, device="cuda")
    tokens = run(engine, [request(n, range(n, n + 9 * n + 1), 20) for n in range(4)], arrivals=[0, 0, 1, 3])
    for number in range(4):
        assert_greedy(model, list(range(number, number + 9 * number + 1)), tokens[str(number), 0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_a_gpu_that_is_not_the_current_one() -> None:
    model = random_model(tiny_config("cla2", num_key_value_heads=2, **SHAPE))
    config = EngineConfig(cache_bytes=2**20, block_size=16, max_length=96, max_running=8)
    tokens = run(Engine(model, config=config, device="cuda:1"), [request(0, range(9), 20)], arrivals=[0])
    assert_greedy(model, list(range(9)), tokens["0", 0])
    assert torch.cuda.current_device() == 0


@needs_cuda
def test_settings_of_a_request_on_a_gpu() -> None:
    """Penalties, seeds, log-probabilities and minimum lengths, next to plain requests, in batches of any kind."""
    model = random_model(tiny_config("cla2", num_key_value_heads=2, **SHAPE))
    config = EngineConfig(cache_bytes=2**20, block_size=16, max_length=96, max_running=8, max_step_tokens=64)
    settings = (
        {},
        {"temperature": 1.0, "seed": 3, "top_k": 5},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
        {"logprobs": 3, "min_tokens": 9, "stop_token_ids": tuple(range(30))},
        {"temperature": 0.7, "seed": 4, "top_p": 0.9, "min_p": 0.01, "n": 2},
    )

    def outputs(device: str) -> dict[tuple[str, int], list[int]]:
        engine = Engine(model, config=config, device=device)
        requests = [request(n, range(n, n + 9), 20, **params) for n, params in enumerate(settings)]  # type: ignore[arg-type]
        tokens = run(engine, requests, arrivals=[0, 0, 1, 3, 5])
        assert_nothing_held(engine)
        return tokens

    assert outputs("cuda") == outputs("cpu")
