"""The Triton kernels on a CPU: this folder's checks, with each twin replaced by the kernel in Triton's interpreter.

Run by `test_interpreted.py` in a process of its own, as the interpreter must be chosen before Triton is imported.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from triton.runtime import interpreter

from crosslayer.kernels import (
    cross_entropy,
    few_rows_launch,
    paged_attention,
    paged_attention_launch,
    rope_store,
    some_rows_launch,
    swiglu,
)
from crosslayer.kernels.cross_entropy_triton import launch_cross_entropy
from crosslayer.kernels.exchange_triton import fetch, give
from crosslayer.kernels.paged_attention_launch import Tiles, launch_paged_attention
from crosslayer.kernels.rope_store_triton import launch_rope_store
from crosslayer.kernels.swiglu_triton import launch_swiglu
from crosslayer.kernels.tokens_triton import launch_embed, launch_likeliest
from tests.kernels import (
    test_cross_entropy,
    test_exchange,
    test_few_rows,
    test_paged_attention,
    test_rope_store,
    test_swiglu,
    test_tokens,
)

TILES = {"many": Tiles(32, 16, 4, 2), "one": Tiles(16, 16, 4, 2)}
FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def _numpy_2_4(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 makes an int of an array of one number, which NumPy 2.4 refuses (triton-lang/triton#9171)."""
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: object, scope: interpreter._LangPatchScope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_and_mend)


@pytest.mark.parametrize("case", test_paged_attention.CASES.values(), ids=test_paged_attention.CASES)
@pytest.mark.parametrize("programs", [1, 7, 100])
def test_paged_attention_kernels(
    case: test_paged_attention.Case, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = partial(launch_paged_attention, **TILES, programs=programs)
    monkeypatch.setattr(paged_attention, "paged_attention_in_pytorch", kernels)
    pool_dtype = FP8 if programs == 7 else torch.float32
    test_paged_attention.check(case, "cpu", torch.float32, pool_dtype, 1e-6)


def test_paged_attention_of_more_rows_than_are_looked_at_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_attention_launch, "AT_A_TIME", (8,))
    kernels = partial(launch_paged_attention, **TILES, programs=20)
    monkeypatch.setattr(paged_attention, "paged_attention_in_pytorch", kernels)
    rows = tuple((2 if row % 5 == 4 else 1, 2 + row * 7 % 13 + 60 * (row == 20), 0) for row in range(27))
    case = test_paged_attention.Case(rows, heads=1, groups=1, dim=4)
    test_paged_attention.check(case, "cpu", torch.float32, torch.float32, 1e-6)


@pytest.mark.parametrize("name", ["single", "mixed"])
def test_paged_attention_as_launched(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not in bfloat16, which NumPy does not have: the interpreter multiplies matrices of its bits as integers.
    monkeypatch.setattr(paged_attention, "paged_attention_in_pytorch", launch_paged_attention)
    test_paged_attention.check(test_paged_attention.CASES[name], "cpu", torch.float16, torch.float16, 2e-3)


@pytest.mark.parametrize("case", test_rope_store.CASES.values(), ids=test_rope_store.CASES)
@pytest.mark.parametrize(("dtype", "pool_dtype"), [(torch.float32, torch.float32), (torch.bfloat16, FP8)])
def test_rope_store_kernel(
    case: test_rope_store.Case, dtype: torch.dtype, pool_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rope_store, "rope_store_in_pytorch", launch_rope_store)
    test_rope_store.check(case, "cpu", dtype, pool_dtype, 1e-6)


@pytest.mark.parametrize("shape", test_swiglu.SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_kernel(shape: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swiglu, "swiglu_in_pytorch", launch_swiglu)
    test_swiglu.check(*shape, "cpu", dtype)


@pytest.mark.parametrize("count", [1, 7, 1500])
def test_exchange_kernels(count: int) -> None:
    test_exchange.check("cpu", count, fetch, give)


def test_tokens_kernels() -> None:
    test_tokens.check_embed("cpu", torch.float32, 12, 5, launch_embed)
    for vocab_size in (50, 4096, 4097):
        test_tokens.check_likeliest("cpu", torch.float32, vocab_size, launch_likeliest)
    for rows in (1, 130):
        test_tokens.check_likeliest_of_rows("cpu", rows, launch_likeliest)


@pytest.mark.parametrize(("dtype", "n"), [(torch.float32, 3), (torch.bfloat16, 1)])
def test_few_rows_kernels(dtype: torch.dtype, n: int) -> None:
    draw = test_few_rows.Draw("cpu", dtype)
    for shape in test_few_rows.HEADS:
        if shape.pool_dtype != FP8:  # the interpreter rounds 127 to 64 there
            test_few_rows.check_rope_store(few_rows_launch, draw, n, shape)
    for size in test_few_rows.SIZES:
        test_few_rows.check_products(few_rows_launch, draw, n, *size)


@pytest.mark.parametrize("n", [3, 19])
def test_some_rows_kernels(n: int) -> None:
    draw = test_few_rows.Draw("cpu", torch.float16)
    for shape in test_few_rows.HEADS:
        if shape.pool_dtype != FP8:
            test_few_rows.check_rope_store(some_rows_launch, draw, n, shape)
    for size in test_few_rows.SIZES + test_few_rows.LARGER:
        test_few_rows.check_products(some_rows_launch, draw, n, *size)


@pytest.mark.parametrize("vocab_size", [7, 4096, 4097])
def test_cross_entropy_kernel(vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "cross_entropy_in_pytorch", launch_cross_entropy)
    test_cross_entropy.check("cpu", torch.float32, vocab_size, 1.0, 1e-6)
