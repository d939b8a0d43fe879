"""Products of some rows on a GPU: how the kernels of `crosslayer/kernels/some_rows_triton.py` are best cut.

    python -m benchmarks.some_rows --out results.json

What counts is the engine's decode step as a CUDA graph (see `benchmarks.decode_steps`), since each kernel begins while
the one before still runs. From the cuts in use on, each kernel in turn gets the one of `CANDIDATES` with which the step
takes least. For comparison: the step with cuBLAS's products.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.decode_steps import LENGTH, runner_of, step_of, without
from benchmarks.gpu import median_seconds
from crosslayer.engine.runner import Runner
from crosslayer.environment import describe_environment
from crosslayer.files import write_json
from crosslayer.kernels import some_rows_launch as kernels
from crosslayer.kernels.some_rows_launch import Cut, Cuts
from crosslayer.plan import parse_design, preset

ROWS = (16, 32, 64)
# For weights that are split along their columns into about a program for each of 132 processors.
ONE_WAVE = (Cut(64, 128, 4, 3, 128, 256), Cut(64, 128, 4, 4, 128, 256), Cut(64, 128, 8, 3, 128, 512))
LONG = (Cut(64, 128, 4, 5, 128, 128), Cut(64, 128, 4, 5, 128, 256), Cut(64, 64, 4, 6, 128, 256))
CANDIDATES = {
    "swiglu": (
        *(Cut(64, 128, 4, stages, 171, held) for stages, held in ((3, 256), (4, 0), (4, 256), (5, 0))),
        *(Cut(64, 64, 4, stages, 171, held) for stages, held in ((5, 128), (7, 0))),
        Cut(128, 64, 8, 4, 86, 0),
        Cut(64, 128, 4, 4, 342, 0),
    ),
    "rope_store": (
        *(Cut(64, 128, 4, stages, programs, 256) for stages, programs in ((3, 144), (4, 144), (4, 108))),
        *(Cut(64, 128, 8, 3, programs, 512) for programs in (108, 144)),
    ),
    "long_add": (*ONE_WAVE, *LONG),
    "add": ONE_WAVE,
}


def use(cuts: Cuts) -> AbstractContextManager[Any]:
    """Steps captured in this context have these cuts, whatever their number of rows."""
    return patch.object(kernels, "CUTS", (replace(cuts, most_tokens=64),))


def find_cuts(
    seconds: Callable[[], float], first: Cuts, candidates: Mapping[str, Sequence[Cut]]
) -> tuple[Cuts, list[dict[str, Any]]]:
    """The cuts with which `seconds` gives least, one kernel after the other; and all that was tried."""
    with use(first):
        best, least = first, seconds()
    tried = [{"kernel": None, "microseconds": least * 1e6}]
    for kernel, some in candidates.items():
        for cut in some:
            other = replace(best, **{kernel: cut})
            if other == best:
                continue
            try:
                with use(other):
                    spent = seconds()
            except Exception as failure:  # more shared memory than there is
                tried.append({"kernel": kernel, "cut": asdict(cut), "failed": f"{type(failure).__name__}: {failure}"})
                continue
            tried.append({"kernel": kernel, "cut": asdict(cut), "microseconds": spent * 1e6})
            print(f"  {kernel:10} {tuple(asdict(cut).values())!s:28} {spent * 1e6:8.1f} us", flush=True)
            if spent < least:
                best, least = other, spent
    return best, tried


def measure(runner: Runner, rows: int, length: int, candidates: Mapping[str, Sequence[Cut]]) -> dict[str, Any]:
    def seconds() -> float:
        return median_seconds(step_of(runner, rows, length))

    with without("fused products"):
        cublas = seconds()
    print(f"{rows} rows: {cublas * 1e6:.1f} us with cuBLAS's products", flush=True)
    best, tried = find_cuts(seconds, kernels.cuts_for(rows), candidates)
    with use(best):
        again = seconds()
    print(f"  best: {again * 1e6:.1f} us with {best}", flush=True)
    times = {"cublas_microseconds": cublas * 1e6, "microseconds": again * 1e6}
    return {"rows": rows, **times, "best": asdict(best), "tried": tried}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="results as JSON")
    arguments = parser.parse_args()
    runner = runner_of(parse_design("H128-MQA", preset("paper-1b")), max(ROWS), LENGTH, "cuda")
    results: dict[str, Any] = {"environment": describe_environment(), "rows": []}
    for rows in ROWS:
        results["rows"].append(measure(runner, rows, LENGTH, CANDIDATES))
        write_json(arguments.out, results)


if __name__ == "__main__":
    main()
