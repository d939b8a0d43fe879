"""Who takes part in the next step, first come first served.

Every step has a budget of tokens. Running sequences come first, each with its next token or the next chunk of its
prompt; what is left of the budget goes to waiting ones. Where blocks run out, the sequence that came last gives all of
its back and waits, at the head of the queue, to be computed anew; what of its blocks is still there then is not.
Whoever waits is let in only if some blocks stay free for the running ones: they would take them from the one that has
just come.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from crosslayer.engine.blocks import BlockManager
from crosslayer.engine.request import Sequence


class Scheduled(NamedTuple):
    """A sequence and how many of its tokens, from `num_cached` on, go through the model.

    `draws`: that is as far as its last token, so that the next one is drawn.
    """

    sequence: Sequence
    new: int
    draws: bool


class Scheduler:
    """Queues of sequences over one BlockManager. `running` is in order of arrival, and its values mean nothing."""

    def __init__(self, blocks: BlockManager, *, max_running: int, max_step_tokens: int) -> None:
        self.blocks = blocks
        self.max_step_tokens = max_step_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: dict[Sequence, None] = {}  # a dict, because many may end in one step
        self._free_slots = list(range(max_running))
        self.num_preemptions = 0
        self.num_prefix_tokens = 0  # found in the cache instead of computed

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> list[Scheduled]:
        """Choose the next step, and take the blocks it needs.

        Empty only when there is nothing to do, or not before the tokens of launched steps are known.
        """
        step: list[Scheduled] = []
        budget = self.max_step_tokens
        preempted = self.num_preemptions
        for sequence in list(self.running):
            if not budget or sequence.slot < 0:  # preempted, and all after it
                break
            if len(sequence.tokens) + sequence.num_pending == sequence.limit:
                continue
            item = self._next_tokens(sequence, budget)
            end = sequence.num_cached + item.new
            if end <= sequence.room or self._make_room(sequence, end):
                step.append(item)
                budget -= item.new
        # Those who had to give way come first, when there is room again.
        while budget and self.waiting and self._free_slots and preempted == self.num_preemptions:
            sequence = self.waiting[0]
            if sequence.num_pending:  # a step failed before this token of an earlier one was there
                break
            self.blocks.attach_prefix(sequence)
            item = self._next_tokens(sequence, budget)
            fits = self.blocks.has_room(sequence, len(self.running))
            if not (fits and self.blocks.grow(sequence, sequence.num_cached + item.new)):
                self.blocks.release(sequence)
                break
            self.num_prefix_tokens += sequence.num_cached
            if sequence.num_prefix is None:  # what it finds after a preemption may be its own
                sequence.num_prefix = sequence.num_cached
            sequence.slot = self._free_slots.pop()
            self.running[self.waiting.popleft()] = None
            step.append(item)
            budget -= item.new
        return step

    def launched(self, step: list[Scheduled]) -> None:
        """Take note that a step is on its way: what is launched after it finds its keys and values in the cache."""
        for sequence, new, draws in step:
            sequence.num_cached += new
            sequence.num_pending += draws
            if sequence.num_cached >= sequence.trim_at:
                self.blocks.trim(sequence)

    def remove(self, sequence: Sequence) -> None:
        """A sequence has ended, or is not wanted any more."""
        if sequence.slot < 0:
            self.waiting.remove(sequence)
        else:
            del self.running[sequence]
            self._stop(sequence)

    def _next_tokens(self, sequence: Sequence, budget: int) -> Scheduled:
        left = len(sequence.tokens) + sequence.num_pending - sequence.num_cached
        new = min(left, budget, self.blocks.max_new)
        return Scheduled(sequence, new, new == left)

    def _make_room(self, sequence: Sequence, length: int) -> bool:
        """Blocks for the first `length` tokens, from those that came later; False if the sequence itself gave way."""
        while not self.blocks.grow(sequence, length):
            last, _ = self.running.popitem()
            self._stop(last)
            self.waiting.appendleft(last)
            self.num_preemptions += 1
            if last is sequence:
                return False
        return True

    def _stop(self, sequence: Sequence) -> None:
        """Take blocks and slot from a sequence that ran. A step that was launched may still use them: the device works
        in order, so whoever gets them next writes after it."""
        self.blocks.release(sequence)
        self._free_slots.append(sequence.slot)
        sequence.slot = -1
