"""Stopping between two steps when SIGTERM comes, as it does from a scheduler that wants its machine back."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from crosslayer.errors import Stopped
from crosslayer.ranks import side_group


class StopSignal:
    """Between `with` and its end SIGTERM is only noted, and `requested` says so, in every process at the same step.

    The processes of a run receive the signal at different moments, and must not wait for each other at every step. So
    each step starts a reduction of who has been asked, over gloo and in the background, and reads the one that the step
    before has started: all stop together, one step later. One process stops at once.

    A signal that comes too late for a step takes its usual effect at the end of the block. Ctrl-C is left as it is.
    """

    def __init__(self) -> None:
        self._asked = False
        self._group = side_group()
        self._reduction: tuple[dist.Work, Tensor] | None = None

    def __enter__(self) -> StopSignal:
        self._installed = threading.current_thread() is threading.main_thread()  # others cannot handle signals
        if self._installed:
            self._former = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._former is None else self._former)
        if self._reduction is not None and (kind is None or issubclass(kind, Stopped)):
            self._reduction[0].wait()  # the others wait for it too
        if kind is None and self._asked:
            signal.raise_signal(signal.SIGTERM)

    def requested(self) -> bool:
        """Whether to stop after this step. All processes must ask, once a step."""
        if self._group is None:
            return self._asked
        before = self._reduction
        asked = torch.tensor(int(self._asked))
        work = dist.all_reduce(asked, dist.ReduceOp.MAX, self._group, async_op=True)
        assert work is not None
        self._reduction = work, asked
        if before is None:
            return False
        before[0].wait()
        return bool(before[1])

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._asked = True
