"""Who takes part in the next step, first come first served.

Every step has a budget of tokens. Running sequences come first, each with its next token or the next chunk of its
prompt; what is left of the budget goes to waiting ones. Where blocks run out, the sequence that came last gives all of
its back and waits, at the head of the queue, to be computed anew; what of its blocks is still there then is not.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from crosslayer.engine.blocks import BlockManager
from crosslayer.engine.request import Sequence


class Scheduled(NamedTuple):
    """A sequence and how many of its tokens, from `num_cached` on, go through the model."""

    sequence: Sequence
    new: int

    @property
    def draws(self) -> bool:
        """Whether the step reaches the sequence's last token, so that the next one is drawn."""
        return self.sequence.num_cached + self.new == len(self.sequence.tokens) + self.sequence.num_pending


class Scheduler:
    """Queues of sequences over one BlockManager. `running` is in order of arrival."""

    def __init__(self, blocks: BlockManager, *, max_running: int, max_step_tokens: int) -> None:
        self.blocks = blocks
        self.max_running, self.max_step_tokens = max_running, max_step_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_prefix_tokens = 0  # found in the cache instead of computed

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> list[Scheduled]:
        """Choose the next step, and take the blocks it needs. Empty only when there is nothing to do."""
        step: list[Scheduled] = []
        budget = self.max_step_tokens
        waited = self.num_preemptions
        while budget and len(step) < len(self.running):
            sequence = self.running[len(step)]
            new = self._next_tokens(sequence, budget)
            while not self.blocks.grow(sequence, sequence.num_cached + new):
                last = self.running.pop()
                self._preempt(last)
                if last is sequence:
                    break
            else:
                step.append(Scheduled(sequence, new))
                budget -= new
        # Those who had to give way come first, when there is room again.
        while budget and self.waiting and len(self.running) < self.max_running and waited == self.num_preemptions:
            sequence = self.waiting[0]
            self.blocks.attach_prefix(sequence)
            new = self._next_tokens(sequence, budget)
            if not (self.blocks.has_room(sequence) and self.blocks.grow(sequence, sequence.num_cached + new)):
                self.blocks.release(sequence)
                break
            self.num_prefix_tokens += sequence.num_cached
            if sequence.num_prefix is None:  # what it finds after a preemption may be its own
                sequence.num_prefix = sequence.num_cached
            self.running.append(self.waiting.popleft())
            step.append(Scheduled(sequence, new))
            budget -= new
        return step

    def computed(self, item: Scheduled) -> None:
        """Take note that the keys and values of a step's tokens are in the cache."""
        item.sequence.num_cached += item.new
        self.blocks.trim(item.sequence)

    def remove(self, sequence: Sequence) -> None:
        """A sequence has ended, or is not wanted any more."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.blocks.release(sequence)

    def _next_tokens(self, sequence: Sequence, budget: int) -> int:
        return min(len(sequence.tokens) - sequence.num_cached, budget, self.blocks.max_new)

    def _preempt(self, sequence: Sequence) -> None:
        self.blocks.release(sequence)
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1
