"""Queries, keys and values as they are attended to and stored, against a rotation of complex numbers in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from crosslayer.kernels.rope_store import rope_store

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
EPS, KEY_SCALE, VALUE_SCALE = 1e-3, 4.0, 0.25
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Case:
    keys: bool = True
    values: bool = True
    bias: bool = False
    gains: bool = False
    heads: int = 4
    groups: int = 2
    dim: int = 10
    hidden: int = 24
    tokens: int = 5


CASES = {
    "owner": Case(),
    "reader": Case(keys=False, values=False, bias=True),
    "keys": Case(values=False, gains=True, heads=3, groups=1),
    "values": Case(keys=False, bias=True, dim=16),
    "all": Case(bias=True, gains=True, hidden=5000, tokens=3),
}
LARGE = {
    "mqa": Case(True, True, True, True, 16, 1, 128, 2048, 700),
    "gqa": Case(heads=64, groups=8, dim=128, hidden=8192),
}


def check(case: Case, device: str, dtype: torch.dtype, pool_dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def close(got: Tensor, want: Tensor, of: torch.dtype) -> bool:
        return bool((got.cpu().double() - want).norm() <= (tolerance + torch.finfo(of).eps) * want.norm())

    width = case.heads + case.groups * (case.keys + case.values)
    residual = (3 * draw(case.tokens, case.hidden)).to(dtype)
    qkv = draw(case.tokens, width * case.dim).to(dtype)
    qkv[0, -1] = 1e4 if pool_dtype == FP8 else 10.0  # outside of what 8 bits can say
    angles = draw(case.tokens, case.dim // 2) * 10
    bias = draw(width * case.dim).to(dtype) if case.bias else None
    q_gain, k_gain = ((1 + draw(case.dim)).to(dtype) if case.gains else None for _ in range(2))
    places = torch.randperm(4 * (case.tokens // 4 + 2), generator=generator)[: case.tokens]
    places[1] = -1
    before = draw(case.tokens // 4 + 2, 4, case.groups, case.dim).to(pool_dtype)
    pools = {
        "keys": before.clone().to(device) if case.keys else None,
        "values": before.clone().to(device) if case.values else None,
    }

    exact = qkv.double() / (residual.double().square().mean(1, keepdim=True) + EPS).sqrt()
    exact = (exact if bias is None else exact + bias.double()).unflatten(1, (width, case.dim))

    def turned(x: Tensor, gain: Tensor | None) -> Tensor:
        if gain is not None:
            x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * gain.double()
        half = case.dim // 2
        turn = torch.polar(torch.ones_like(angles, dtype=torch.float64), angles.double())
        rotated = torch.complex(x[..., :half], x[..., half:]) * turn[:, None]
        return torch.cat((rotated.real, rotated.imag), -1)

    on_device = qkv.to(device)
    got = rope_store(
        on_device,
        residual.to(device),
        EPS,
        angles.double().cos().float().to(device),
        angles.double().sin().float().to(device),
        head_dim=case.dim,
        num_heads=case.heads,
        num_kv_heads=case.groups,
        bias=None if bias is None else bias.to(device),
        q_gain=None if q_gain is None else q_gain.to(device),
        k_gain=None if k_gain is None else k_gain.to(device),
        keys=pools["keys"],
        values=pools["values"],
        places=places.to(device),
        key_scale=KEY_SCALE,
        value_scale=VALUE_SCALE,
    )
    assert got.shape == (case.tokens, case.heads, case.dim)
    assert got.data_ptr() == on_device.data_ptr()
    assert close(got, turned(exact[:, : case.heads], q_gain), dtype)
    # The keys and values in the projection are of no more use, and nobody has touched them.
    assert torch.equal(on_device[:, case.heads * case.dim :].cpu(), qkv[:, case.heads * case.dim :])
    made = {
        "keys": turned(exact[:, case.heads : case.heads + case.groups], k_gain) / KEY_SCALE,
        "values": exact[:, -case.groups :] / VALUE_SCALE,
    }
    for name, pool in pools.items():
        if pool is not None:
            limit = torch.finfo(pool_dtype).max
            want = before.double().flatten(0, 1)
            kept = places >= 0
            want[places[kept]] = made[name][kept].clamp(-limit, limit)
            assert close(pool.flatten(0, 1), want, pool_dtype)
            untouched = torch.ones(len(want), dtype=torch.bool)
            untouched[places[kept]] = False
            assert torch.equal(pool.cpu().flatten(0, 1)[untouched].float(), before.flatten(0, 1)[untouched].float())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(
    ("dtype", "pool_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, FP8), (torch.bfloat16, FP8)],
)
def test_in_pytorch(case: Case, dtype: torch.dtype, pool_dtype: torch.dtype) -> None:
    check(case, "cpu", dtype, pool_dtype, 1e-6)


@needs_cuda
@pytest.mark.parametrize("case", [*CASES.values(), *LARGE.values()], ids=[*CASES, *LARGE])
@pytest.mark.parametrize(
    ("dtype", "pool_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, FP8)],
)
def test_on_gpu(case: Case, dtype: torch.dtype, pool_dtype: torch.dtype) -> None:
    check(case, "cuda", dtype, pool_dtype, 1e-6)
