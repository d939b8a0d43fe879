"""The engine: requests come in and outputs go out, a step at a time."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from crosslayer.data import Tokenizer
from crosslayer.engine.blocks import BlockManager
from crosslayer.engine.request import FinishReason, Output, Request, Sequence, TokenLogprobs
from crosslayer.engine.runner import Runner
from crosslayer.engine.sampler import Drawing, draw
from crosslayer.engine.scheduler import Scheduler
from crosslayer.engine.text import TextStream
from crosslayer.errors import UserError
from crosslayer.model import Transformer
from crosslayer.model.fp8 import FP8, slot_scales
from crosslayer.model.paged import PagedCache, divide_memory, sequence_bytes

CacheDtype = Literal["auto", "fp8"]

CPU_CACHE_BYTES = 2**30
# Of the memory that is free once the model is on the GPU; the rest is for what a step computes.
GPU_CACHE_SHARE = 0.85


@dataclass(frozen=True)
class EngineConfig:
    """How the engine divides memory and time.

    `cache_bytes`: for keys and values (None: 85% of the GPU memory that the model leaves free, or 1 GiB on a CPU, but
    no more than `max_running` sequences of `max_length` tokens need). `block_size`: tokens per block. `max_length`:
    tokens of a sequence, prompt and continuation (None: the model's context). `max_running`: sequences that take turns.
    `max_step_tokens`: tokens that go through the model in one step, prompts in chunks if need be. `prefix_caching`:
    prompts use the blocks of earlier sequences that began alike. `cache_dtype`: keys and values are stored in the
    model's precision ("auto") or in 8 bits ("fp8"; see `model.fp8`).

    Raises:
        UserError: a number that is not positive.
    """

    cache_bytes: int | None = None
    block_size: int = 16
    max_length: int | None = None
    max_running: int = 256
    max_step_tokens: int = 2048
    prefix_caching: bool = True
    cache_dtype: CacheDtype = "auto"

    def __post_init__(self) -> None:
        for name in ("cache_bytes", "block_size", "max_length", "max_running", "max_step_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be positive, got {value}")
        if self.cache_dtype not in get_args(CacheDtype):
            raise UserError(f"cache_dtype must be one of {', '.join(get_args(CacheDtype))}, got {self.cache_dtype!r}")


class Engine:
    """Continues many requests at once. Not safe for threads: one caller adds, steps and aborts.

    Without a `tokenizer` it works on token ids alone, and texts are empty.

    Raises:
        UserError: the cache is too small, or the model's plan has keys and values that cannot share block tables.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer | None = None, config: EngineConfig | None = None
    ) -> None:
        self.config = config = config or EngineConfig()
        self.tokenizer = tokenizer
        self.max_length = config.max_length or model.config.max_position_embeddings
        self.cache = _make_cache(model, config, self.max_length)
        num_blocks = self.cache.num_blocks
        self.blocks = BlockManager(num_blocks, config.block_size, self.max_length, prefix_caching=config.prefix_caching)
        self.scheduler = Scheduler(self.blocks, max_running=config.max_running, max_step_tokens=config.max_step_tokens)
        self.runner = Runner(model, self.cache)
        self._samples: dict[str, list[Sequence]] = {}  # those that have not ended, by request

    @property
    def cache_tokens(self) -> int:
        """Tokens that the cache holds at a time: of whole contexts, or of windows where all layers have one."""
        return self.config.block_size * max(len(pool.references) for pool in self.blocks.pools.values())

    @property
    def most_cache_bytes_used(self) -> int:
        """Bytes of the most blocks that sequences have held at a time."""
        return sum(
            pool[0].nbytes * self.blocks.pools[self.cache.spans[owner]].most_used
            for pools in (self.cache.keys, self.cache.values)
            for owner, pool in pools.items()
        )

    # -- requests ----------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self._samples)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            UserError: its id is in use, its prompt is empty, or it asks for what the model, the cache or an engine
                without a tokenizer cannot give.
        """
        limit = self._check(request)
        params, config = request.params, self.runner.model.config
        stop_ids = frozenset(params.stop_token_ids).union(() if params.ignore_eos else config.eos_token_ids)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        self._samples[request.id] = []
        for index in range(params.n):
            text = None if self.tokenizer is None else TextStream(self.tokenizer, params.stop)
            sequence = Sequence(request, index, seed, limit, stop_ids, text, list(request.prompt))
            self._samples[request.id].append(sequence)
            self.scheduler.add(sequence)

    def abort(self, request_id: str) -> list[Output]:
        """End a request and give its blocks back; nothing happens if it has ended already."""
        samples = list(self._samples.get(request_id, ()))
        for sequence in samples:
            self._end(sequence)
        return [Output(request_id, sequence.index, None, "", None, "abort") for sequence in samples]

    def _check(self, request: Request) -> int:
        """How many tokens a sample of the request may have, prompt included."""
        config, length = self.runner.model.config, len(request.prompt)
        if request.id in self._samples:
            raise UserError(f"request id {request.id!r} is in use")
        if not length:
            raise UserError("there is nothing to continue: the prompt has no tokens")
        ids = (*request.prompt, *request.params.stop_token_ids)
        if wrong := next((token for token in ids if not 0 <= token < config.vocab_size), None):
            raise UserError(f"token {wrong} does not exist: the model knows 0 to {config.vocab_size - 1}")
        if request.params.stop and self.tokenizer is None:
            raise UserError("stop strings need an engine with a tokenizer")
        most = min(self.max_length, self.blocks.max_tokens)
        wanted = length + (request.params.max_tokens or 1)
        if wanted > most:
            what = "the context" if most == self.max_length else "the cache"
            raise UserError(
                f"a prompt of {length} tokens and {wanted - length} more do not fit in {what}, which holds {most}"
            )
        return wanted if request.params.max_tokens else most

    # -- steps -------------------------------------------------------------------------------------------------

    def step(self) -> list[Output]:
        """Run the model once and give out what came of it, at most one output per sample; nothing without work.

        An exception on the way drops the requests that took part (they give their blocks back and are in the engine no
        more) and is raised again; the others go on with the next step.
        """
        scheduled = self.scheduler.schedule()
        if not scheduled:
            return []
        drawing = [item.sequence for item in scheduled if item.draws]
        try:
            logits = self.runner.run(scheduled)
            for item in scheduled:
                self.scheduler.computed(item)
            drawn = draw(logits, [_drawing(sequence) for sequence in drawing])
            return [self._advance(sequence, *result) for sequence, result in zip(drawing, drawn, strict=True)]
        except BaseException:
            self.blocks.forget_contents()
            for item in scheduled:
                self.abort(item.sequence.request.id)
            raise

    def _advance(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> Output:
        """Give a sequence its next token, and end it if that is due."""
        reason: FinishReason | None = "stop" if token in sequence.stop_ids else None
        text = ""
        if reason is None:
            sequence.tokens.append(token)
            if sequence.text is not None:
                may_stop = len(sequence.output) >= sequence.request.params.min_tokens
                text = sequence.text.push(token, may_stop=may_stop)
            if len(sequence.tokens) == sequence.limit:
                reason = "length"
        if sequence.text is not None:
            if reason:
                text += sequence.text.finish()
            if sequence.text.stopped:
                reason = "stop"
        if reason:
            self._end(sequence)
        given = None if token in sequence.stop_ids else token
        return Output(sequence.request.id, sequence.index, given, text, logprobs if given is not None else None, reason)

    def _end(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        samples = self._samples[sequence.request.id]
        samples.remove(sequence)
        if not samples:
            del self._samples[sequence.request.id]


def _drawing(sequence: Sequence) -> Drawing:
    request = sequence.request
    return Drawing(request.params, sequence.seed, sequence.index, request.prompt, sequence.output, sequence.stop_ids)


def _make_cache(model: Transformer, config: EngineConfig, max_length: int) -> PagedCache:
    weight, block_size = model.lm_head.weight, config.block_size
    fp8 = config.cache_dtype == "fp8"
    dtype = FP8 if fp8 else weight.dtype
    memory = config.cache_bytes
    if memory is None:
        memory = CPU_CACHE_BYTES
        if weight.device.type == "cuda":
            memory = int(GPU_CACHE_SHARE * torch.cuda.mem_get_info(weight.device)[0])
        memory = min(memory, config.max_running * sequence_bytes(model.config, block_size, max_length, dtype))
    num_blocks = divide_memory(model.config, memory, block_size, max_length, dtype)
    key_scales, value_scales = slot_scales(model) if fp8 else (None, None)
    return PagedCache(
        model.config,
        num_blocks,
        block_size,
        max_length,
        dtype=dtype,
        device=weight.device,
        key_scales=key_scales,
        value_scales=value_scales,
    )
