"""Prompts in, continuations out: texts, ends, seeds, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import crosslayer
from crosslayer.data import Tokenizer
from crosslayer.engine import LLM, Completion, EngineConfig, Request, SamplingParams
from crosslayer.errors import UserError
from tests.conftest import tiny_config
from tests.engine.runs import assert_greedy, assert_nothing_held
from tests.model.checks import random_model

TOKENIZER = Tokenizer.train(["three cats sat on seven mats and ate some rats " * 20], 280)
CONFIG = EngineConfig(block_size=4, max_length=64, cache_bytes=10**6)
MODEL = random_model(tiny_config("yoco:window=5", vocab_size=TOKENIZER.vocab_size))
PROMPTS = ["three cats", "on", "rats and mats and rats", "é"]


def make_llm(**changes: Any) -> LLM:
    return LLM(MODEL, dataclasses.replace(CONFIG, **changes), tokenizer=TOKENIZER)


def continue_one(prompt: str | list[int], llm: LLM | None = None, **params: Any) -> Completion:
    llm = llm or make_llm()
    ((completion,),) = llm.generate([prompt], SamplingParams(**params))
    assert_nothing_held(llm.engine)
    return completion


def test_texts_and_ids_give_the_same_and_are_greedy() -> None:
    llm = make_llm()
    texts = llm.generate(PROMPTS, SamplingParams(max_tokens=12))
    ids = [TOKENIZER.encode(prompt) for prompt in PROMPTS]
    assert llm.generate(ids, SamplingParams(max_tokens=12)) == texts
    for prompt, (completion,) in zip(ids, texts, strict=True):
        assert_greedy(MODEL, prompt, completion.token_ids)
        assert completion.text == TOKENIZER.decode(completion.token_ids)
        assert completion.finish_reason == "length"
        assert completion.logprobs == []


def test_a_folder_is_loaded_with_its_tokenizer(tmp_path: Path) -> None:
    crosslayer.save(MODEL, tmp_path / "model", tokenizer=TOKENIZER)
    llm = LLM(tmp_path / "model", CONFIG)
    params = SamplingParams(max_tokens=5)
    assert llm.generate(PROMPTS, params) == make_llm().generate(PROMPTS, params)
    small = LLM(tmp_path / "model", CONFIG, dtype=torch.bfloat16)
    assert small.engine.runner.cache.keys[0].dtype == torch.bfloat16
    assert small.engine.cache_tokens == pytest.approx(2 * llm.engine.cache_tokens, abs=4)
    assert len(small.generate(PROMPTS, params)[0][0].token_ids) == 5


def test_a_cache_in_8_bits_holds_four_times_the_tokens_of_float32() -> None:
    llms = [make_llm(cache_dtype=dtype) for dtype in ("auto", "fp8")]
    tokens = [llm.engine.cache_tokens for llm in llms]
    assert tokens[1] == pytest.approx(4 * tokens[0], abs=16)
    assert llms[1].engine.runner.cache.nbytes <= 10**6
    params = SamplingParams(max_tokens=12, logprobs=0)
    texts = [llm.generate(PROMPTS, params) for llm in llms]
    # The first token after each prompt, whose logits differ by the rounding alone.
    for (exact,), (rounded,) in zip(*texts, strict=True):
        assert exact.logprobs[0].logprob == pytest.approx(rounded.logprobs[0].logprob, abs=0.3)
    assert texts[0] != texts[1]
    with pytest.raises(UserError, match="cache_dtype must be one of auto, fp8, got 'int4'"):
        make_llm(cache_dtype="int4")


def test_what_is_drawn_depends_on_the_seed_and_not_on_the_others() -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=10, seed=3, n=2)
    together = make_llm().generate(PROMPTS, params)
    for prompt, samples in zip(PROMPTS, together, strict=True):
        assert make_llm(max_step_tokens=3, cache_bytes=20_000).generate([prompt], params) == [samples]
        assert samples[0] != samples[1]
    seeds = [SamplingParams(temperature=1.0, max_tokens=10, seed=seed) for seed in (3, 4, None, None)]
    texts = [completion.text for (completion,) in make_llm().generate(["three cats"] * 4, seeds)]
    assert len(set(texts)) == 4
    assert texts[0] == continue_one("three cats", temperature=1.0, max_tokens=10, seed=3).text


def test_ends() -> None:
    prompt = TOKENIZER.encode("three cats")
    free = continue_one(prompt, max_tokens=20)
    token = free.token_ids[6]
    until = free.token_ids.index(token)
    for model, params in (
        (MODEL, {"stop_token_ids": (token,)}),
        (random_model(dataclasses.replace(MODEL.config, eos_token_id=token)), {}),
    ):
        ended = continue_one(prompt, LLM(model, CONFIG, tokenizer=TOKENIZER), max_tokens=20, **params)
        assert ended.token_ids == free.token_ids[:until]
        assert ended.text == TOKENIZER.decode(ended.token_ids)
        assert ended.finish_reason == "stop"
    on = continue_one(prompt, LLM(model, CONFIG, tokenizer=TOKENIZER), max_tokens=20, ignore_eos=True)
    assert on == free
    # Without the token until min_tokens, the text goes another way, and may end after that.
    later = continue_one(prompt, max_tokens=20, stop_token_ids=(token,), min_tokens=until + 3)
    assert later.token_ids[:until] == free.token_ids[:until]
    assert later.token_ids[until] != token
    assert len(later.token_ids) >= until + 3


def test_stop_strings() -> None:
    prompt = TOKENIZER.encode("three cats")
    free = continue_one(prompt, max_tokens=20)
    for start, length in ((3, 2), (8, 5), (len(free.text) - 4, 4)):
        stop = free.text[start : start + length]
        ended = continue_one(prompt, max_tokens=20, stop=("never found", stop))
        assert ended.text == free.text[: free.text.index(stop)]
        assert ended.finish_reason == "stop"
        assert ended.token_ids == free.token_ids[: len(ended.token_ids)]
    # One that is not found holds nothing back in the end.
    assert continue_one(prompt, max_tokens=20, stop=(free.text[-3:] + "!",)).text == free.text
    assert continue_one(prompt, max_tokens=20, stop=(free.text[0],), min_tokens=20).text == free.text


def test_streams() -> None:
    llm = make_llm()
    whole = llm.generate(PROMPTS, SamplingParams(max_tokens=9))
    texts, steps = [""] * 4, 0
    for prompt, output in llm.stream(PROMPTS, SamplingParams(max_tokens=9)):
        texts[prompt] += output.text
        steps += 1
    assert texts == [completion.text for (completion,) in whole]
    assert steps == 4 * 9
    stream = llm.stream(PROMPTS, SamplingParams(max_tokens=9))
    next(stream)
    with pytest.raises(UserError, match="generating already"):
        llm.generate(PROMPTS)
    stream.close()
    assert_nothing_held(llm.engine)
    assert llm.generate(PROMPTS, SamplingParams(max_tokens=9)) == whole


def test_without_limits_the_context_is_the_limit() -> None:
    prompt = TOKENIZER.encode("three cats")
    assert len(continue_one(prompt).token_ids) == 64 - len(prompt)
    default = LLM(MODEL, tokenizer=TOKENIZER).engine
    assert default.max_length == MODEL.config.max_position_embeddings
    assert 0 < default.runner.cache.nbytes <= 2**30


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "nothing to continue"),
        ("", {}, "nothing to continue"),
        ([1] * 64, {}, "a prompt of 64 tokens and 1 more do not fit in the context, which holds 64"),
        ([1] * 60, {"max_tokens": 5}, "60 tokens and 5 more do not fit in the context, which holds 64"),
        ([3, 280], {}, "token 280 does not exist: the model knows 0 to 279"),
        ([3, -1], {}, "token -1 does not exist"),
        ([3], {"stop_token_ids": (999,)}, "token 999 does not exist"),
        ([3, 4.5], {}, "a prompt must be a text or a list of token ids"),
        (3, {}, "a prompt must be a text or a list of token ids, got 3"),
    ],
)
def test_what_cannot_be_served_is_refused(prompt: Any, params: dict[str, Any], message: str) -> None:
    llm = make_llm()
    with pytest.raises(UserError, match=message):
        llm.generate(["three cats", prompt], SamplingParams(**params))
    assert_nothing_held(llm.engine)


def test_ids_may_be_numbers_of_numpy_and_torch() -> None:
    ids = TOKENIZER.encode("three cats")
    params = SamplingParams(max_tokens=5)
    expected, *others = make_llm().generate([ids, np.array(ids), torch.tensor(ids)], params)  # type: ignore[list-item]
    assert [other[0].token_ids for other in others] == [expected[0].token_ids] * 2


def test_misuse_is_refused() -> None:
    with pytest.raises(UserError, match="prompts must be a list of prompts, got one text"):
        make_llm().generate("three cats")
    with pytest.raises(UserError, match="token ids must be whole numbers"):
        make_llm().engine.add(Request("a", (1, 2.5), SamplingParams()))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="2 prompts but 1 params"):
        make_llm().generate(["a", "b"], [SamplingParams()])
    bare = LLM(MODEL, CONFIG)
    assert bare.generate([[1, 2]], SamplingParams(max_tokens=3))[0][0].text == ""
    with pytest.raises(UserError, match="no tokenizer; give the prompts as token ids"):
        bare.generate(["a"])
    with pytest.raises(UserError, match="stop strings need an engine with a tokenizer"):
        bare.generate([[1, 2]], SamplingParams(stop=("a",)))
    with pytest.raises(UserError, match="block_size must be positive, got 0"):
        EngineConfig(block_size=0)
    with pytest.raises(UserError, match="a cache of 1,000 bytes is too small"):
        make_llm(cache_bytes=1000)
    with pytest.raises(UserError, match="do not fit in the cache, which holds 24"):
        LLM(random_model(tiny_config("cla2")), dataclasses.replace(CONFIG, cache_bytes=24 * 480)).generate([[1] * 24])
