"""The search for cuts, with times that are made up, and a run on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.decode_steps import runner_of
from benchmarks.some_rows import CANDIDATES, find_cuts, measure
from crosslayer.kernels import some_rows_launch as kernels
from tests.conftest import tiny_config


def test_each_kernel_gets_the_cut_with_which_a_step_takes_least() -> None:
    first = kernels.cuts_for(20)
    swiglu, slow, huge = (replace(first.swiglu, num_stages=stages) for stages in (7, 8, 9))
    add = replace(first.add, held=0)

    def seconds() -> float:
        cuts = kernels.cuts_for(1)
        assert cuts == kernels.cuts_for(64)
        if cuts.swiglu == huge:
            raise RuntimeError("out of shared memory")
        return 10 - 2 * (cuts.swiglu == swiglu) + (cuts.swiglu == slow) - 3 * (cuts.add == add)

    best, tried = find_cuts(seconds, first, {"swiglu": (slow, huge, swiglu, first.swiglu), "add": (first.add, add)})
    assert best == replace(first, swiglu=swiglu, add=add)
    times = [row.get("microseconds", row.get("failed")) for row in tried]
    assert times == [10e6, 11e6, "RuntimeError: out of shared memory", 8e6, 10e6, 5e6]
    assert kernels.cuts_for(20) is first


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_run() -> None:
    runner = runner_of(tiny_config("cla2"), 8, 20, "cuda")
    result = measure(runner, 8, 20, {"add": CANDIDATES["add"]})
    assert result["microseconds"] > 0
    assert len(result["tried"]) > 1
