"""The engine's Triton kernels compiled, as they are launched, for GPUs that are not here.

That shows that a GPU's instructions and shared memory suffice; what comes out, the interpreter and real GPUs tell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from tests.kernels.test_paged_attention import Case, make

FP8 = torch.float8_e4m3fn
# Bytes of shared memory that a program may have, by compute capability: A100, most that are not for servers, H100.
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
HEADS = {"mqa": (16, 1), "gqa": (32, 8), "wide-mqa": (64, 1)}


class Compiled(NamedTuple):
    kernel: str
    shared_bytes: int
    ptx: str


Compile = Callable[[int, Callable[[], object]], list[Compiled]]


@pytest.fixture
def compile_for(monkeypatch: pytest.MonkeyPatch) -> Compile:
    """All kernels that are launched are compiled for a compute capability, and nothing runs."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit

    from crosslayer.kernels import dependent_launch_triton, paged_attention_launch

    compiled: list[Compiled] = []
    compile_or_launch = jit.JITFunction.run

    def only_compile(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = compile_or_launch(self, *arguments, grid=grid, warmup=True, **options)
        compiled.append(Compiled(self.fn.__name__, kernel.metadata.shared, kernel.asm["ptx"]))
        return kernel

    def run(capability: int, launch: Callable[[], object]) -> list[Compiled]:
        class Driver:
            def get_current_target(self) -> GPUTarget:
                return GPUTarget("cuda", capability, 32)

            def get_current_device(self) -> int:
                return capability  # what is compiled is kept by device

            def get_current_stream(self, device: int) -> int:
                return 0

        monkeypatch.setattr(driver, "_active", Driver())
        monkeypatch.setattr(dependent_launch_triton, "_can_overlap", lambda device: capability >= 90)
        monkeypatch.setattr(paged_attention_launch, "shared_memory", lambda device: SHARED[capability])
        compiled.clear()
        launch()
        return list(compiled)

    monkeypatch.setattr(jit.JITFunction, "run", only_compile)
    return run


def attend(heads: str, dim: int, dtype: torch.dtype, pool_dtype: torch.dtype, ones: int, prompts: int = 0) -> None:
    """`ones` rows times key heads of one query, and some of many."""
    from crosslayer.kernels.paged_attention_launch import launch_paged_attention

    num_heads, groups = HEADS[heads]
    rows = ((1, 9, 0),) * max(1, ones // groups) + ((20, 40, 0),) * prompts
    q, keys, values, rows_there = make(Case(rows, None, num_heads, groups, dim, 32), dtype, pool_dtype)
    launch_paged_attention(q, keys, values, rows_there, None, 1.0, 1.0, ahead=q)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_attention_fits_into_the_shared_memory(capability: int, compile_for: Compile) -> None:
    bf16, fp32 = torch.bfloat16, torch.float32
    # Each cut of ONE_QUERY; heads that are padded, and large ones; and rows of many queries.
    cases: list[tuple[Any, ...]] = [("mqa", 128, bf16, bf16, count) for count in (4, 16, 64, 512)]
    cases += [(heads, dim, bf16, bf16, 16, 1) for heads in HEADS for dim in (80, 256)]
    cases += [("gqa", 128, fp32, fp32, 16, 1), ("wide-mqa", 128, fp32, fp32, 16, 1), ("mqa", 256, fp32, fp32, 16, 1)]
    if capability >= 89:
        cases += [("mqa", 128, bf16, FP8, count, 1) for count in (16, 512)]
    for case in cases:
        for kernel in compile_for(capability, lambda case=case: attend(*case)):  # type: ignore[misc]
            assert kernel.shared_bytes <= SHARED[capability], (case, kernel[:2])


def test_tiles_are_smaller_only_where_they_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from crosslayer.kernels import paged_attention_launch as module
    from crosslayer.kernels.paged_attention_launch import Tiles, fitting, tiles_of_one

    q = torch.empty(0, dtype=torch.bfloat16)
    for capability, expected in {90: Tiles(16, 128, 8, 3), 80: Tiles(16, 128, 8, 3), 89: Tiles(16, 128, 8, 2)}.items():
        monkeypatch.setattr(module, "shared_memory", lambda device, most=SHARED[capability]: most)
        tiles, _ = tiles_of_one(16, 16, 128, q.dtype)
        assert fitting(tiles, 16, q, q, 128) == expected
    monkeypatch.setattr(module, "shared_memory", lambda device: 2**14)
    assert fitting(Tiles(64, 128, 8, 3), 32, q, q, 128) == Tiles(32, 16, 8, 2)


def test_all_threads_know_whose_turn_it_is_before_it_changes(compile_for: Compile) -> None:
    from crosslayer.kernels.exchange_triton import give

    turn, numbers = torch.zeros(1, dtype=torch.int32), torch.zeros(2, 40, dtype=torch.int64)
    (kernel,) = compile_for(90, lambda: give(numbers[0], numbers, turn))
    behind_the_loop = kernel.ptx.rsplit("bra", 1)[1]
    assert "bar.sync" in behind_the_loop.split("st.global")[0]


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_the_other_kernels_compile(capability: int, compile_for: Compile) -> None:
    from crosslayer.kernels import few_rows_launch, some_rows_launch
    from crosslayer.kernels.cross_entropy_triton import launch_cross_entropy
    from crosslayer.kernels.exchange_triton import fetch, give
    from crosslayer.kernels.rope_store_triton import launch_rope_store
    from crosslayer.kernels.swiglu_triton import launch_swiglu
    from crosslayer.kernels.tokens_triton import launch_embed, launch_likeliest

    bf16, long = torch.bfloat16, torch.int64
    pool_dtype = FP8 if capability >= 89 else bf16
    heads, dim, hidden, words = 16, 128, 2048, 50304

    def made(*shape: int, dtype: torch.dtype = bf16) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def launch(n: int, products: Any) -> None:
        cos, sin = made(n, dim // 2, dtype=torch.float32), made(n, dim // 2, dtype=torch.float32)
        numbers, x, pool = made(n, dtype=long), made(n, hidden), made(2, 32, 1, dim, dtype=pool_dtype)
        launch_embed(numbers, numbers, numbers, made(words, hidden), numbers, cos, sin)
        if products is not None:
            products.project_rope_store(
                x, made((heads + 2) * dim, hidden), 1e-5, cos, sin, head_dim=dim, num_heads=heads, num_kv_heads=1,
                bias=None, keys=pool, values=pool, places=numbers, key_scale=1.0, value_scale=1.0,
            )  # fmt: skip
            products.project_swiglu(x, made(2 * 5504, hidden), 1e-5)
            products.project_add(made(n, 5504), made(hidden, 5504), x)
        launch_rope_store(
            made(n, heads + 2, dim), x, 1e-5, cos, sin, heads, 1, None, (None, None), (pool, pool), numbers, (1.0, 1.0)
        )
        launch_swiglu(made(n, 2 * 5504), x, 1e-5)
        launch_likeliest(made(n, words, dtype=torch.float32), numbers, numbers)
        launch_cross_entropy(made(n, words), numbers, want_grad=True)
        turn, places = made(1, dtype=torch.int32), made(2, n, dtype=long)
        fetch(places.view(torch.uint8), turn, made(8 * n, dtype=torch.uint8))
        give(numbers, places, turn)

    few = compile_for(capability, lambda: launch(1, few_rows_launch))
    some = compile_for(capability, lambda: launch(48, some_rows_launch if capability == 90 else None))
    for kernel in few + some:
        assert kernel.shared_bytes <= SHARED[capability], kernel[:2]
    assert len(few) == 10
    assert len(some) == (10 if capability == 90 else 7)
