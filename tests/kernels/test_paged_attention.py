"""Attention over block tables against dense attention, token by token, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from crosslayer.kernels import paged_attention as module
from crosslayer.kernels.paged_attention import AttentionRows, paged_attention

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
KEY_SCALE, VALUE_SCALE = 2.0, 0.5


@dataclass(frozen=True)
class Case:
    """Rows as (queries, length, first block)."""

    rows: tuple[tuple[int, int, int], ...]
    window: int | None = None
    heads: int = 4
    groups: int = 2
    dim: int = 10
    block_size: int = 4


# Single queries with and without blocks that a window has dropped, prompts, their continuations, a row that only fills
# up (of length 0), one without queries, and blocks whose size is no power of two.
CASES = {
    "single": Case(((1, 5, 0), (1, 60, 0), (1, 0, 0), (1, 33, 0), (1, 1, 0))),
    "single-window": Case(((1, 5, 0), (1, 60, 10), (1, 0, 0), (1, 33, 2), (1, 1, 0)), window=9, block_size=5),
    "single-uneven": Case(((1, 3, 0), (1, 230, 0), (1, 9, 0), (1, 1, 0), (1, 41, 0)), groups=1),
    "single-mqa": Case(((1, 70, 0), (1, 16, 0)), groups=1, heads=16, dim=32, block_size=16),
    "mixed": Case(((1, 5, 0), (7, 60, 0), (1, 60, 0), (40, 40, 0), (0, 8, 0), (3, 4, 0), (1, 0, 0), (2, 2, 0))),
    "mixed-window": Case(((1, 5, 0), (7, 60, 11), (1, 60, 2), (40, 47, 0), (3, 3, 0)), window=9),
    "mixed-mqa": Case(((1, 9, 0), (20, 45, 0), (1, 33, 0)), groups=1, heads=6, dim=16, block_size=5),
    "prompts": Case(((33, 33, 0), (17, 50, 1)), window=30, groups=4, dim=46),
}


def make(case: Case, dtype: torch.dtype, pool_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, AttentionRows]:
    generator = torch.Generator().manual_seed(0)
    size = case.block_size
    counts, lengths, firsts = (torch.tensor(column, dtype=torch.int32) for column in zip(*case.rows, strict=True))
    held = -(-lengths // size) - firsts
    # Blocks in any order, of no use to another row; entries after a row's last block are any.
    blocks = torch.randperm(int(held.clamp(min=0).sum()) + 3, generator=generator)
    tables = torch.randint(len(blocks), (len(counts), int(held.max()) + 2), generator=generator)
    taken = 0
    for table, count in zip(tables, held.clamp(min=0).tolist(), strict=True):
        table[:count] = blocks[taken : taken + count]
        taken += count
    starts = torch.cat((torch.zeros(1), counts.cumsum(0))).int()
    rows = AttentionRows(starts, lengths, tables.int(), firsts, int(counts.max()))
    # The queries lie in a fused projection, next to what else is there.
    width = case.heads + 2 * case.groups
    q = torch.randn(int(starts[-1]), width, case.dim, generator=generator).to(dtype)[:, : case.heads]
    shape = (len(blocks), size, case.groups, case.dim)
    keys, values = (torch.randn(shape, generator=generator).to(pool_dtype) for _ in range(2))
    return q, keys, values, rows


def expected(q: Tensor, keys: Tensor, values: Tensor, rows: AttentionRows, window: int | None) -> Tensor:
    size, share = keys.shape[1], q.shape[1] // keys.shape[2]
    output = torch.zeros(q.shape, dtype=torch.float64)
    for r, length in enumerate(rows.lengths.tolist()):
        end = int(rows.starts[r + 1])
        for query in range(int(rows.starts[r]), end) if length else ():
            position = length - end + query
            oldest = 0 if window is None else max(0, position - window + 1)
            places = [
                (int(rows.tables[r, token // size - int(rows.firsts[r])]), token % size)
                for token in range(oldest, position + 1)
            ]
            for head in range(q.shape[1]):
                k, v = (
                    torch.stack([pool[place][head // share].double() for place in places]) for pool in (keys, values)
                )
                weights = (k * KEY_SCALE @ q[query, head].double() / q.shape[2] ** 0.5).softmax(0)
                output[query, head] = weights @ v * VALUE_SCALE
    return output


def check(case: Case, device: str, dtype: torch.dtype, pool_dtype: torch.dtype, tolerance: float) -> None:
    q, keys, values, rows = make(case, dtype, pool_dtype)
    want = expected(q, keys, values, rows, case.window)
    on_device = AttentionRows(
        *(tensor.to(device) for tensor in (rows.starts, rows.lengths, rows.tables, rows.firsts)), rows.most_queries
    )
    # Not a copy of the queries alone, which would be contiguous.
    q = q.new_zeros(len(q), q.shape[1] + 1, q.shape[2]).copy_(torch.cat((q, q[:, :1]), 1)).to(device)[:, :-1]
    got = paged_attention(
        q,
        keys.to(device),
        values.to(device),
        on_device,
        window=case.window,
        key_scale=KEY_SCALE,
        value_scale=VALUE_SCALE,
    )
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert (got.cpu().double() - want).norm() <= tolerance * want.norm()
    for r in (rows.lengths == 0).nonzero()[:, 0].tolist():
        assert not got[rows.starts[r] : rows.starts[r + 1]].any()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(
    ("dtype", "pool_dtype", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-14),
        (torch.float32, torch.float32, 1e-6),
        (torch.bfloat16, torch.bfloat16, 1e-2),
        (torch.float32, torch.float8_e4m3fn, 1e-6),
    ],
)
def test_in_pytorch(case: Case, dtype: torch.dtype, pool_dtype: torch.dtype, tolerance: float) -> None:
    check(case, "cpu", dtype, pool_dtype, tolerance)


def test_in_pytorch_a_few_keys_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEYS_AT_A_TIME", 100)
    check(CASES["single-window"], "cpu", torch.float64, torch.float64, 1e-14)
    check(CASES["single"], "cpu", torch.float64, torch.float64, 1e-14)


def test_rows_are_used_again_with_another_window() -> None:
    q, keys, values, rows = make(CASES["mixed"], torch.float64, torch.float64)
    for window in (None, 3, None):
        got = paged_attention(
            q, keys, values, rows, window=window, key_scale=KEY_SCALE, value_scale=VALUE_SCALE
        )  # fmt: skip
        torch.testing.assert_close(got, expected(q, keys, values, rows, window))


# Beyond those: as many keys as make several tiles and splits of what a GPU is given, and as many rows as are cut
# otherwise than few.
LARGE = {
    "single-64": Case(tuple((1, 37 * row % 600, 0) for row in range(64)), None, 16, 1, 128, 16),
    "single-200": Case(tuple((1, 37 * row % 600, 0) for row in range(200)), None, 16, 1, 128, 16),
    "single": Case(((1, 700, 0), (1, 64, 0), (1, 0, 0), (1, 257, 0)), None, 16, 1, 128, 16),
    "single-uneven": Case(tuple((1, 6000 >> row % 12, 0) for row in range(135)), None, 24, 1, 128, 16),
    "single-window": Case(((1, 700, 30), (1, 64, 0), (1, 0, 0), (1, 257, 0)), 200, 16, 4, 64, 16),
    "mixed": Case(((1, 700, 0), (150, 150, 0), (1, 1, 0), (90, 300, 0)), None, 16, 1, 128, 16),
    "mixed-window": Case(((1, 700, 30), (150, 150, 0), (1, 1, 0), (90, 300, 5)), 100, 12, 4, 256, 16),
}


@needs_cuda
@pytest.mark.parametrize("case", [*CASES.values(), *LARGE.values()], ids=[*CASES, *(f"large-{name}" for name in LARGE)])
@pytest.mark.parametrize(
    ("dtype", "pool_dtype", "tolerance"),
    [
        (torch.bfloat16, torch.bfloat16, 1e-2),
        (torch.float16, torch.float16, 2e-3),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float8_e4m3fn, 1e-2),
    ],
)
def test_on_gpu(case: Case, dtype: torch.dtype, pool_dtype: torch.dtype, tolerance: float) -> None:
    check(case, "cuda", dtype, pool_dtype, tolerance)


@needs_cuda
@pytest.mark.parametrize("size", [0, 1, 10**5, 10**7])
def test_what_is_read_ahead_changes_nothing(size: int) -> None:
    q, keys, values, rows = make(LARGE["single-64"], torch.bfloat16, torch.bfloat16)
    q, keys, values = (tensor.cuda() for tensor in (q, keys, values))
    rows = AttentionRows(rows.starts.cuda(), rows.lengths.cuda(), rows.tables.cuda(), rows.firsts.cuda(), 1)
    ahead = torch.ones(size, device="cuda")
    want = paged_attention(q, keys, values, rows, window=None)
    assert torch.equal(paged_attention(q, keys, values, rows, window=None, ahead=ahead), want)
    assert ahead.eq(1).all()


@needs_cuda
def test_in_a_graph() -> None:
    """What was captured reads lengths and tables anew, and finds the counters of split keys at zero each time."""
    q, keys, values, rows = make(LARGE["single"], torch.bfloat16, torch.bfloat16)
    q, keys, values = (tensor.cuda() for tensor in (q, keys, values))
    static = AttentionRows(rows.starts.cuda(), rows.lengths.cuda(), rows.tables.cuda(), rows.firsts.cuda(), 1)

    def attend() -> Tensor:
        return paged_attention(q, keys, values, static, window=None, key_scale=KEY_SCALE, value_scale=VALUE_SCALE)

    attend()  # compiled before it is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = attend()
    shorter = AttentionRows(rows.starts, torch.tensor([300, 0, 5, 100]).int(), rows.tables, rows.firsts, 1)
    for now in (rows, shorter):
        static.lengths.copy_(now.lengths)
        graph.replay()
        want = expected(q.cpu(), keys.cpu(), values.cpu(), now, None)
        assert (got.cpu().double() - want).norm() <= 1e-2 * want.norm()
