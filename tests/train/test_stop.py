"""SIGTERM in one of two processes stops both at the same step."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from crosslayer.train.stop import StopSignal


def process(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    stopped_at = []
    for asked in ({1: 7}, {0: 3, 1: 4}, {}):  # by rank, the step in which SIGTERM comes
        with StopSignal() as stop:
            for step in range(12):
                if rank == 0:
                    time.sleep(0.01)  # the other waits for it here, as in any collective of training
                dist.all_reduce(torch.ones(1))
                if asked.get(rank) == step:
                    signal.raise_signal(signal.SIGTERM)
                if stop.requested():
                    stopped_at.append(step)
                    stop._asked = False
                    break
    (folder / str(rank)).write_text(json.dumps(stopped_at))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_stop_at_one_step(tmp_path: Path) -> None:
    mp.spawn(process, (tmp_path,), nprocs=2)
    assert [json.loads((tmp_path / rank).read_text()) for rank in "01"] == [[8, 4], [8, 4]]


def test_a_thread_that_cannot_handle_signals_trains_all_the_same() -> None:
    before, asked = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with StopSignal() as stop:
            asked.append(stop.requested())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert asked == [False]
    assert signal.getsignal(signal.SIGTERM) == before
