"""The official client, against a live server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch

from crosslayer.engine import LLM, Output, SamplingParams, TokenLogprobs
from crosslayer.server.responses import Choice, Speller
from tests.server.servers import CONFIG, MODEL, TOKENIZER, Live, greedy, serving

PROMPT = "three cats sat on mats and"
IDS = TOKENIZER.encode(PROMPT)


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving(overlaps=True) as live:
        yield live
        live.settle()


@pytest.fixture(scope="module")
def client(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        client.models.retrieve("gpt-4")


def test_greedy_is_the_models_own_greedy(client: openai.OpenAI) -> None:
    expected = TOKENIZER.decode(greedy(IDS, 12))
    for prompt in (PROMPT, IDS, [PROMPT], [IDS]):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=12, temperature=0)
        assert answer.choices[0].text == expected
        assert answer.choices[0].finish_reason == "length"
    usage = answer.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (len(IDS), 12, len(IDS) + 12)
    # Of four tokens a block, all but the last token may be found; the prompt was there three times before.
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == (len(IDS) - 1) // 4 * 4 > 0


def test_a_stream_adds_up_to_the_whole(client: openai.OpenAI) -> None:
    settings = {"model": "tiny", "prompt": [PROMPT, "rats"], "n": 2, "seed": 3, "max_tokens": 12}
    whole = client.completions.create(**settings)
    texts, reasons, usages = [""] * 4, {}, []
    for chunk in client.completions.create(stream=True, stream_options={"include_usage": True}, **settings):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
        usages += [chunk.usage] if chunk.usage else []
    assert texts == [choice.text for choice in whole.choices]
    assert len(set(texts)) == 4
    likeliest = client.completions.create(**{**settings, "temperature": 0, "max_tokens": 8})
    for choice, prompt in zip(likeliest.choices, [PROMPT, PROMPT, "rats", "rats"], strict=True):
        assert choice.text == TOKENIZER.decode(greedy(TOKENIZER.encode(prompt), 8))
    assert reasons == dict.fromkeys(range(4), "length")
    assert len(usages) == 1
    assert usages[0].completion_tokens == 48
    assert usages[0].prompt_tokens == whole.usage.prompt_tokens == len(IDS) + len(TOKENIZER.encode("rats"))


def test_chat_is_the_completion_of_the_rendered_template(client: openai.OpenAI) -> None:
    end = [TOKENIZER.eos_id]
    prompt = TOKENIZER.encode("[user] three cats") + end + TOKENIZER.encode("[assistant]")
    expected = TOKENIZER.decode(greedy(prompt, 10))
    messages = [{"role": "user", "content": [{"type": "text", "text": "three "}, {"type": "text", "text": "cats"}]}]
    settings = {"model": "tiny", "messages": messages, "max_completion_tokens": 10, "temperature": 0}
    whole = client.chat.completions.create(**settings)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage.prompt_tokens == len(prompt)
    chunks = list(client.chat.completions.create(stream=True, **settings))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "length"


def test_logprobs_are_the_models(client: openai.OpenAI) -> None:
    tokens = greedy(IDS, 6)
    with torch.no_grad():
        logprobs = MODEL(torch.tensor([IDS + tokens]))[0, len(IDS) - 1 : -1].log_softmax(dim=-1)
    drawn = logprobs.gather(-1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    answer = client.completions.create(model="tiny", prompt=IDS, max_tokens=6, temperature=0, logprobs=3)
    got = answer.choices[0].logprobs
    assert got.token_logprobs == pytest.approx(drawn, abs=1e-4)
    text = answer.choices[0].text
    for token, offset in zip(got.tokens, got.text_offset, strict=True):
        assert text[offset:].startswith("\ufffd" if token.startswith("bytes:") else token)
    assert sum(token.startswith("bytes:") for token in got.tokens) == 3
    for top, row in zip(got.top_logprobs, logprobs, strict=True):
        assert [*top.values()] == pytest.approx(row.topk(3).values.flip(0).tolist(), abs=1e-4)

    messages = [{"role": "user", "content": "rats"}]
    chat = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=6, temperature=0, logprobs=True, top_logprobs=2
    )
    for item in chat.choices[0].logprobs.content:
        assert item.logprob == item.top_logprobs[0].logprob >= item.top_logprobs[1].logprob
        assert bytes(item.bytes).decode(errors="replace") == item.token


def test_tokens_of_a_character() -> None:
    """Fed by hand, because a model of random weights writes none."""
    text, tokens = "é→😀 cats", TOKENIZER.encode("é→😀 cats")
    choice = Choice(Speller(TOKENIZER), "rats ")
    for token in tokens:  # the text is held back, as it is where a stop string may come
        choice.add(Output("0", 0, token, "", TokenLogprobs(0.0)))
    content = choice.take_chat_logprobs()["content"]
    assert bytes(byte for item in content for byte in item["bytes"] or ()) == text.encode()
    assert [item["token"] for item in content] == ["\ufffd"] * 9 + [" cats"]
    for token in [*tokens, TOKENIZER.eos_id, *tokens]:
        choice.add(Output("0", 0, token, "", TokenLogprobs(0.0)))
    got = choice.take_completion_logprobs()
    places = [0, 0, 1, 1, 1, 2, 2, 2, 2, 3]
    begin, end = len("rats " + text), len("rats " + 2 * text)
    assert got["text_offset"] == [*(begin + place for place in places), end, *(end + place for place in places)]
    assert got["tokens"][:2] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert got["tokens"][9:11] == [" cats", "<|endoftext|>"]


def test_seed_stop_echo_and_ends(client: openai.OpenAI) -> None:
    def complete(**settings: object) -> openai.types.CompletionChoice:
        return client.completions.create(model="tiny", prompt=PROMPT, **{"max_tokens": 20, **settings}).choices[0]

    assert complete(seed=1).text == complete(seed=1).text != complete(seed=2).text
    plain = complete(temperature=0)
    stop = plain.text[6:8]
    stopped = complete(temperature=0, stop=[stop])
    assert stopped.finish_reason == "stop"
    assert stopped.text == plain.text[: plain.text.index(stop)]
    assert complete(temperature=0, echo=True).text == PROMPT + plain.text
    first = greedy(IDS, 1)[0]
    ended = complete(temperature=0, extra_body={"stop_token_ids": [first]})
    assert (ended.text, ended.finish_reason) == ("", "stop")
    assert complete(temperature=0, extra_body={"stop_token_ids": [first], "min_tokens": 5}).text != ""
    assert complete(temperature=0, max_tokens=None).text == complete(temperature=0, max_tokens=16).text  # as at OpenAI


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.3},
        {"top_p": 0.05},
        {"top_k": 2},
        {"min_p": 0.9},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"repetition_penalty": 50.0},
    ],
)
def test_every_way_to_sample_reaches_the_engine(client: openai.OpenAI, change: dict[str, Any]) -> None:
    plain = {"temperature": 1.0, "seed": 5, "max_tokens": 30}
    llm = LLM(MODEL, CONFIG, tokenizer=TOKENIZER)
    settings = [SamplingParams(**plain), SamplingParams(**{**plain, **change})]
    (unchanged,), (expected,) = llm.generate([IDS, IDS], settings)
    answer = client.completions.create(model="tiny", prompt=IDS, extra_body={**plain, **change})
    assert answer.choices[0].text == expected.text != unchanged.text


def test_what_openai_knows_and_we_do_not_may_be_neutral(client: openai.OpenAI) -> None:
    client.completions.create(model="tiny", prompt="rats", best_of=1, logit_bias={}, suffix=None, user="me")
    client.completions.create(model="tiny", prompt="rats", best_of=2, n=2)
    reply = {"role": "assistant", "content": "cats", "refusal": None, "annotations": [], "tool_calls": []}
    settings = {"model": "tiny", "messages": [reply], "max_tokens": 1}
    client.chat.completions.create(logprobs=False, top_logprobs=0, **settings)
    for _ in client.chat.completions.create(stream=True, stream_options={"include_obfuscation": False}, **settings):
        pass
    with pytest.raises(openai.BadRequestError, match="does not support it") as refused:
        client.completions.create(model="tiny", prompt="rats", logit_bias={"1": 1})
    assert refused.value.param == "logit_bias"


def test_many_at_once_and_those_who_vanish(live: Live) -> None:
    """Streams that run to their end are not disturbed by those that break off, of which nothing is left."""
    prompts = [f"{'cats ' * (number % 5)}{number} rats" for number in range(40)]
    before = live.metric("crosslayer_finished_total")

    async def stream(client: openai.AsyncOpenAI, number: int) -> str | None:
        settings = {"model": "tiny", "prompt": prompts[number], "temperature": 0, "max_tokens": 30}
        text = ""
        async with await client.completions.create(stream=True, **settings) as chunks:
            async for chunk in chunks:
                text += chunk.choices[0].text
                if number % 2:
                    return None  # closes the connection in the middle
        return text

    async def whole(client: openai.AsyncOpenAI, number: int) -> None:
        settings = {"model": "tiny", "prompt": prompts[number], "max_tokens": 100}
        with pytest.raises(openai.APITimeoutError):
            await client.completions.create(timeout=0.05, n=4, **settings)

    async def run() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
            streams = [stream(client, number) for number in range(40)]
            return (await asyncio.gather(*streams, *(whole(client, number) for number in range(5))))[:40]

    texts = asyncio.run(run())
    for number, text in enumerate(texts):
        expected = TOKENIZER.decode(greedy(TOKENIZER.encode(prompts[number]), 30))
        assert text == (None if number % 2 else expected)
    live.settle()
    assert live.metric("crosslayer_finished_total") == before + 40 + 5 * 4
    assert live.metric('crosslayer_finished_total{reason="abort"}') > 0
