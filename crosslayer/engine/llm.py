"""Offline use: prompts in, continuations out."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import index
from pathlib import Path

import torch

from crosslayer import checkpoint
from crosslayer.data import Tokenizer
from crosslayer.engine.config import EngineConfig
from crosslayer.engine.engine import Engine
from crosslayer.engine.request import FinishReason, Output, Request, SamplingParams, TokenLogprobs
from crosslayer.errors import UserError
from crosslayer.model import Transformer

Prompt = str | Sequence[int]


@contextmanager
def few_collections() -> Iterator[None]:
    """Keep Python from looking through all objects for garbage in the meantime.

    It does when there are many new ones, as there are with every token, and for a tenth of a second nothing else is
    done. What the engine makes is gone without that.
    """
    young, middle, old = gc.get_threshold()
    gc.set_threshold(young, middle, 1_000_000)
    try:
        yield
    finally:
        gc.set_threshold(young, middle, old)


@dataclass
class Completion:
    """A continuation of a prompt. `logprobs` has an entry per token where they were asked for."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, output: Output) -> None:
        self.text += output.text
        if output.token is not None:
            self.token_ids.append(output.token)
        if output.logprobs is not None:
            self.logprobs.append(output.logprobs)
        self.finish_reason = output.finish_reason


class LLM:
    """A model folder, or a model that is there already, behind an engine of its own.

    `tokenizer` is that of the folder unless given. A model without one takes and gives token ids only. `dtype` says
    how a folder is loaded, `device` where the engine runs (None: where the model is; with a folder, on the CPU).

    Raises:
        UserError: as `checkpoint.load` and `Tokenizer.load`, and as `Engine`.
    """

    def __init__(
        self,
        model: str | Path | Transformer,
        config: EngineConfig | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(model, Transformer):
            tokenizer = tokenizer or Tokenizer.load(model)
            model = checkpoint.load(model, dtype=dtype)
        self.tokenizer = tokenizer
        self.engine = Engine(model, tokenizer, config, device=device)

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[list[Completion]]:
        """The `params.n` continuations of each prompt (a text or token ids), in order of the prompts.

        `params` are those of all prompts or, as a sequence, of each.

        Raises:
            UserError: a prompt or its params cannot be served; then nothing is generated.
        """
        each = self._params(prompts, params)
        completions = [[Completion() for _ in range(p.n)] for p in each]
        for prompt, output in self.stream(prompts, each):
            completions[prompt][output.index].add(output)
        return completions

    def stream(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[tuple[int, Output]]:
        """Like `generate`, but token by token: the number of a prompt and what a step adds to one of its samples.

        The prompts that have not ended are dropped when the iterator is closed; until then there can be no other.
        """
        each = self._params(prompts, params)
        if self.engine.has_work:
            raise UserError("this model is generating already; finish or close that first")
        ids = [str(number) for number in range(len(prompts))]
        try:
            for name, prompt, prompt_params in zip(ids, prompts, each, strict=True):
                self.engine.add(Request(name, tuple(self._encode(prompt)), prompt_params))
            with few_collections():
                while self.engine.has_work:
                    for output in self.engine.step():
                        yield int(output.request_id), output
        finally:
            for name in ids:
                self.engine.abort(name)
            while self.engine.has_work:  # what was launched for them
                self.engine.step()

    def _params(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> Sequence[SamplingParams]:
        if isinstance(prompts, str):
            raise UserError("prompts must be a list of prompts, got one text")
        if params is None or isinstance(params, SamplingParams):
            return [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise UserError(f"there are {len(prompts)} prompts but {len(params)} params")
        return params

    def _encode(self, prompt: Prompt) -> Sequence[int]:
        if not isinstance(prompt, str):
            try:
                return [index(token) for token in prompt]  # NumPy's and torch's numbers, too
            except TypeError:
                raise UserError(f"a prompt must be a text or a list of token ids, got {prompt!r}") from None
        if self.tokenizer is None:
            raise UserError("this model has no tokenizer; give the prompts as token ids")
        return self.tokenizer.encode(prompt)
