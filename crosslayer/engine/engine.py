"""The engine: requests come in and outputs go out, a step at a time."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Mapping

import torch

from crosslayer.data import Tokenizer
from crosslayer.engine.blocks import BlockManager
from crosslayer.engine.config import EngineConfig
from crosslayer.engine.request import FinishReason, Output, Request, Sequence, TokenLogprobs
from crosslayer.engine.runner import Runner, current
from crosslayer.engine.sampler import Draws
from crosslayer.engine.scheduler import Scheduled, Scheduler
from crosslayer.engine.text import TextStream
from crosslayer.errors import UserError
from crosslayer.model import Transformer

# A GPU is done with a small step sooner than the next one can be launched; on a CPU, long steps keep everybody waiting.
GPU_STEP_TOKENS, STEP_TOKENS = 8192, 2048


class Engine:
    """Continues many requests at once. Not safe for threads: one caller adds, steps and aborts.

    Without a `tokenizer` it works on token ids alone, and texts are empty. `device` is where it runs, None: where the
    model is. Its weights are copies, so on another device the model need not stay.

    Raises:
        UserError: as `Runner`.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        self.config = config = config or EngineConfig()
        self.tokenizer = tokenizer
        self.max_length = config.max_length or model.config.max_position_embeddings
        place = torch.device(device or model.lm_head.weight.device)
        with current(place):
            self.runner = Runner(model, config, self.max_length, place)
        self.blocks = BlockManager(
            self.runner.cache.num_blocks, config.block_size, self.max_length, prefix_caching=config.prefix_caching
        )
        step_tokens = config.max_step_tokens or (GPU_STEP_TOKENS if self.runner.device.type == "cuda" else STEP_TOKENS)
        self.scheduler = Scheduler(self.blocks, max_running=config.max_running, max_step_tokens=step_tokens)
        self._samples: dict[str, list[Sequence]] = {}  # those that have not ended, by request
        self._launched: deque[tuple[list[Scheduled], Draws]] = deque()  # steps whose tokens were not collected yet

    @property
    def cache_tokens(self) -> int:
        """Tokens that the cache holds at a time: of whole contexts, or of windows where all layers have one."""
        return self.config.block_size * max(self.runner.cache.num_blocks.values())

    @property
    def most_cache_bytes_used(self) -> int:
        """Bytes of the most blocks that sequences have held at a time."""
        return self._bytes({span: pool.most_used for span, pool in self.blocks.pools.items()})

    @property
    def cache_bytes_used(self) -> int:
        """Bytes of the blocks that sequences hold now."""
        return self._bytes({span: pool.size - pool.num_free for span, pool in self.blocks.pools.items()})

    def _bytes(self, num_blocks: Mapping[int, int]) -> int:
        cache = self.runner.cache
        return sum(
            pool[0].nbytes * num_blocks[cache.spans[owner]]
            for pools in (cache.keys, cache.values)
            for owner, pool in pools.items()
        )

    # -- requests ----------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether there are requests, or steps that were launched for some and are not collected."""
        return bool(self._samples or self._launched)

    @property
    def request_ids(self) -> set[str]:
        """Those of the requests that have not ended."""
        return set(self._samples)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            UserError: its id is in use, its prompt is empty, or it asks for what the model, the cache or an engine
                without a tokenizer cannot give.
        """
        limit = self.check(request)
        params, config = request.params, self.runner.config
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

    def check(self, request: Request) -> int:
        """How many tokens a sample of the request may have, prompt included. Other threads may ask, too.

        Raises:
            UserError: as `add`.
        """
        config, length = self.runner.config, len(request.prompt)
        if request.id in self._samples:
            raise UserError(f"request id {request.id!r} is in use")
        if not length:
            raise UserError("there is nothing to continue: the prompt has no tokens")
        ids = (*request.prompt, *request.params.stop_token_ids)
        if not all(isinstance(token, int) for token in ids):
            raise UserError("token ids must be whole numbers")
        for token in (min(ids), max(ids)):
            if not 0 <= token < config.vocab_size:
                raise UserError(f"token {token} does not exist: the model knows 0 to {config.vocab_size - 1}")
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
        """Launch a step of the model and give out what came of one, at most one output per sample; nothing without
        work.

        Where the runner overlaps, that is the step before: while the device computes one step, this one's results are
        worked into the sequences and the next one is scheduled. Then a sequence that ends with a token or a text takes
        part in one step too many, whose token is dropped. Penalties need all tokens, so with them a step at a time.

        An exception on the way drops the requests that took part (they give their blocks back and are in the engine no
        more) and is raised again; the others go on with the next step.
        """
        ahead = self.runner.overlaps and not any(s.request.params.has_penalties for s in self.scheduler.running)
        launched = (ahead or not self._launched) and self._launch()
        assert self._launched or not self._samples, "requests wait for room that will never be there"
        return self._collect() if len(self._launched) > (ahead and launched) else []

    def _launch(self) -> bool:
        """Launch the next step, if there is one."""
        step = self.scheduler.schedule()
        if not step:
            return False
        try:
            with current(self.runner.device):
                draws = self.runner.launch(step)
            self.scheduler.launched(step)
        except BaseException:
            self._drop(step)
            raise
        self._launched.append((step, draws))
        return True

    def _collect(self) -> list[Output]:
        """Wait for the oldest step, and give its tokens to those that are still there."""
        step, draws = self._launched.popleft()
        drawing = [item.sequence for item in step if item.draws]
        try:
            results = zip(drawing, draws.result(), strict=True)
            return [self._advance(sequence, *result) for sequence, result in results if not sequence.ended]
        except BaseException:
            # Those that were launched since may have read what this one did not store.
            self._drop(step, *(later for later, _ in self._launched))
            self._launched.clear()
            raise

    def _drop(self, *steps: list[Scheduled]) -> None:
        """End all requests that took part in failed steps. Nobody knows what the blocks hold."""
        self.blocks.forget_contents()
        for step in steps:
            for item in step:
                self.abort(item.sequence.request.id)

    def _advance(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> Output:
        """Give a sequence its next token, and end it if that is due."""
        request, text_stream, text = sequence.request, sequence.text, ""
        reason: FinishReason | None = None
        sequence.num_pending -= 1
        given = token not in sequence.stop_ids
        if given:
            sequence.tokens.append(token)
            if len(sequence.tokens) == sequence.limit:
                reason = "length"
        else:
            reason = "stop"
        if text_stream is not None:
            if given:
                text = text_stream.push(token, may_stop=sequence.num_output >= request.params.min_tokens)
            if reason:
                text += text_stream.finish()
            if text_stream.stopped:
                reason = "stop"
        if reason:
            self._end(sequence)
        given_token, given_logprobs = (token, logprobs) if given else (None, None)
        prefix = sequence.num_prefix or 0
        return Output(request.id, sequence.index, given_token, text, given_logprobs, reason, prefix)

    def _end(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        sequence.ended = True
        samples = self._samples[sequence.request.id]
        samples.remove(sequence)
        if not samples:
            del self._samples[sequence.request.id]
