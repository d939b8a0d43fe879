"""Products with what stands around them, against float64: `project`, and its kernels for few and for some rows."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor

from crosslayer.kernels import project

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
FP8 = torch.float8_e4m3fn
EPS = 1e-3


@dataclass(frozen=True)
class Heads:
    """A projection of query heads, and of heads of keys, of values, or both."""

    hidden: int
    head_dim: int
    num_heads: int
    num_kv_heads: int
    keys: bool = True
    values: bool = True
    bias: bool = False
    pool_dtype: torch.dtype | None = None  # x's own
    value_scale: float = 0.5

    @property
    def width(self) -> int:
        return (self.num_heads + (self.keys + self.values) * self.num_kv_heads) * self.head_dim


# A whole number of programs and tiles, and not; owners and readers of keys and values, alone and together.
HEADS = (
    Heads(64, 16, 2, 1),
    Heads(75, 10, 3, 3, bias=True),
    Heads(300, 46, 1, 1, keys=False),
    Heads(8, 6, 1, 1, values=False),
    Heads(136, 8, 3, 3, keys=False, values=False, bias=True),
    # Some values are beyond the range of the pool.
    Heads(64, 12, 2, 2, pool_dtype=torch.float16, value_scale=2.0**-13),
    Heads(64, 12, 2, 2, pool_dtype=FP8, value_scale=2.0**-6),
)
PAPER = (
    Heads(2048, 128, 16, 1),
    Heads(2048, 128, 16, 1, keys=False, values=False),
    Heads(2048, 128, 16, 1, pool_dtype=FP8),
)
# Rows and columns of weights.
SIZES = ((8, 64), (7, 75), (5, 300), (1, 1))
LARGER = ((70, 2100),)  # several tiles and parts of what the kernels for some rows are given
PAPER_SIZES = ((5472, 2048), (2048, 5472), (50304, 2048))
# Rows for the kernels of few rows on a GPU, of some, and for cuBLAS.
COUNTS = (1, project.FEW_ROWS + 2, project.SOME_ROWS + 1)


class Draw:
    """Random tensors on a device, all there before a kernel can start to read them early."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(*shape, generator=self.generator, device=self.device).to(dtype or self.dtype)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return drawn


def normalised(x: Tensor) -> Tensor:
    return x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt()


def sum_error(module: ModuleType, draw: Draw) -> float:
    """Of a sum made in float32, relative to a typical one; `project` may also round it to x's dtype on the way, and a
    GPU's tensor cores cut off what they cannot keep, always towards zero, so that errors add up."""
    error = 50 * torch.finfo(torch.promote_types(draw.dtype, torch.float32)).eps
    if draw.device == "cuda" and module.__name__.endswith("some_rows_launch"):
        error *= 6
    return max(error, 8 * torch.finfo(draw.dtype).eps) if module is project else error


def assert_near(got: Tensor, expected: Tensor, error: float) -> None:
    """Right up to the rounding of each number to its dtype, and to the error of the sums."""
    kept = torch.finfo(got.dtype)
    typical = expected.square().mean().sqrt()
    allowed = kept.eps * (expected.abs() + kept.smallest_normal) + error * (expected.abs() + typical)
    off = (got.double() - expected).abs()
    assert (off <= allowed).all(), (off / allowed).max()


def check_rope_store(module: ModuleType, draw: Draw, n: int, shape: Heads) -> None:
    error = sum_error(module, draw)
    x, weight = draw(n, shape.hidden), draw(shape.width, shape.hidden)
    bias = draw(shape.width) if shape.bias else None
    cos, sin = (draw(n, shape.head_dim // 2, dtype=torch.float32) for _ in range(2))
    pool_dtype = shape.pool_dtype or draw.dtype
    scales = {"keys": 0.25, "values": shape.value_scale}
    slots = n + 8
    pools = {name: draw(slots // 4, 4, shape.num_kv_heads, shape.head_dim).to(pool_dtype) for name in scales}
    before = {name: pool.clone() for name, pool in pools.items()}
    places = torch.randperm(slots // 4 * 4, generator=draw.generator, device=x.device)[:n]
    places[1::3] = -1
    gains = {"q_gain": None, "k_gain": None} if module is project else {}
    got = module.project_rope_store(
        x,
        weight,
        EPS,
        cos,
        sin,
        head_dim=shape.head_dim,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        bias=bias,
        keys=pools["keys"] if shape.keys else None,
        values=pools["values"] if shape.values else None,
        places=places,
        key_scale=scales["keys"],
        value_scale=scales["values"],
        **gains,
    )
    y = normalised(x) @ weight.double().T + (0 if bias is None else bias.double())
    y = y.view(n, -1, shape.head_dim)
    # A pair is a complex number, and its rotation a product.
    half = shape.head_dim // 2
    pairs = torch.complex(y[..., :half], y[..., half:]) * torch.complex(cos, sin)[:, None]
    turned = torch.cat((pairs.real, pairs.imag), -1)
    assert got.dtype == x.dtype
    assert got.shape == (n, shape.num_heads, shape.head_dim)
    assert_near(got, turned[:, : shape.num_heads], error)
    stored = {"keys": turned[:, shape.num_heads :], "values": y[:, -shape.num_kv_heads :]}
    for name, pool in pools.items():
        expected = before[name].double().flatten(0, 1)
        if getattr(shape, name):
            limit = torch.finfo(pool_dtype).max
            new = (stored[name][:, : shape.num_kv_heads] / scales[name]).clamp(-limit, limit)
            expected[places[places >= 0]] = new[places >= 0]
        assert_near(pool.flatten(0, 1), expected, error)
        untouched = torch.ones(len(pool) * 4, dtype=torch.bool)
        untouched[places[places >= 0].cpu() if getattr(shape, name) else []] = False
        kept = (pool.flatten(0, 1).float().cpu()[untouched], before[name].flatten(0, 1).float().cpu()[untouched])
        assert torch.equal(*kept)


def check_products(module: ModuleType, draw: Draw, n: int, rows: int, columns: int) -> None:
    error = sum_error(module, draw)
    x, weight, both = draw(n, columns), draw(rows, columns), draw(2 * rows, columns)
    gain, residual = draw(columns), draw(n, rows)
    gate, up = (normalised(x) @ both.double().T).chunk(2, -1)
    assert_near(module.project_swiglu(x, both, EPS), gate / (1 + (-gate).exp()) * up, error)
    expected = residual.double() + x.double() @ weight.double().T
    module.project_add(x, weight, residual)
    assert_near(residual, expected, error)
    if hasattr(module, "project_logits"):
        logits = module.project_logits(x, weight, gain, EPS)
        assert module is project or logits.dtype == torch.float32
        assert_near(logits, normalised(x) * gain.double() @ weight.double().T, error)


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rope_store_in_pytorch(dtype: torch.dtype, shape: Heads, n: int) -> None:
    check_rope_store(project, Draw("cpu", dtype), n, shape)


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_in_pytorch(dtype: torch.dtype, size: tuple[int, int], n: int) -> None:
    check_products(project, Draw("cpu", dtype), n, *size)


def test_only_weights_are_read_before_the_wait() -> None:
    """Compiled for an H100: wide loads of a program's rows, and nothing else, come before the kernels before have
    ended."""
    pytest.importorskip("triton")
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from crosslayer.kernels.few_rows_launch import ADD
    from crosslayer.kernels.few_rows_triton import add_kernel

    options = ADD.options(torch.empty(1, 2048, dtype=torch.bfloat16)) | {"PDL": True}
    num_warps, _ = options.pop("num_warps"), options.pop("launch_pdl")
    pointers = dict.fromkeys(("x", "weight", "residual"), "*bf16")
    signature = {**pointers, "size": "i32", **dict.fromkeys(options, "constexpr")}
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(4)}
    source = ASTSource(add_kernel, signature, options, aligned)
    ptx = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps}).asm["ptx"]
    before, after = ptx.split("griddepcontrol.wait")
    tiles = 2048 // int(options["BLOCK"])
    assert before.count("ld.global") == before.count(".v4.b32") == tiles
    assert "st.global" not in before
    assert after.count("ld.global") == tiles + 1  # x and the residual


@pytest.mark.parametrize("tokens", [16, 64])
def test_what_is_held_of_a_weight_is_read_before_the_wait(tokens: int) -> None:
    """Compiled for an H100: wide loads of as many columns as a cut says, no more, and products on tensor cores."""
    pytest.importorskip("triton")
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from crosslayer.kernels.some_rows_launch import cuts_for
    from crosslayer.kernels.some_rows_triton import add_kernel

    cut = cuts_for(tokens).add
    sizes = {"K": 2048, "TOKENS": tokens, "ROWS": cut.rows, "BLOCK": cut.block, "SPLITS": 4, "HELD": cut.held}
    pointers = {"x": "*bf16", "weight": "*bf16", "residual": "*bf16", "parts": "*fp32", "arrived": "*i32"}
    signature = {**pointers, "size": "i32", "count": "i32", **dict.fromkeys([*sizes, "PDL"], "constexpr")}
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(6)}
    source = ASTSource(add_kernel, signature, {**sizes, "PDL": True}, aligned)
    options = {"num_warps": cut.num_warps, "num_stages": cut.num_stages}
    ptx = compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    before, after = ptx.split("griddepcontrol.wait")
    loads = [line for line in before.splitlines() if "ld.global" in line]
    assert len(loads) == 2 * cut.rows * cut.held // (16 * 32 * cut.num_warps)
    assert all(".v4.b32" in line for line in loads)
    assert "st.global" not in before
    assert "cp.async" not in before
    assert "wgmma" in after


@torch.no_grad()
def test_large_streams_in_float16() -> None:
    """Values of thousands, as large models have, times weights: without the norm, more than float16 can say."""
    draw = Draw("cpu", torch.float16)
    x, weight = 5000 * draw(3, 64), draw(2 * 12, 64)
    assert not (x @ weight.T).isfinite().all()
    gate, up = (normalised(x) @ weight.double().T).chunk(2, -1)
    expected = gate / (1 + (-gate).exp()) * up
    assert (project.project_swiglu(x, weight, EPS).double() - expected).norm() < 3e-3 * expected.norm()
    places, cos, sin = torch.tensor([0, 1, 2]), torch.ones(3, 4), torch.zeros(3, 4)
    keys = torch.zeros(1, 4, 1, 8, dtype=torch.float16)
    heads = {"head_dim": 8, "num_heads": 2, "num_kv_heads": 1, "bias": None, "q_gain": None, "k_gain": None}
    q = project.project_rope_store(x, weight, EPS, cos, sin, **heads, keys=keys, values=None, places=places)
    made = torch.cat((q.flatten(1), keys[0, :3, 0]), 1).double()
    expected = normalised(x) @ weight.double().T
    assert (made - expected).norm() < 3e-3 * expected.norm()


@needs_cuda
@pytest.mark.parametrize("n", range(1, 5))
@pytest.mark.parametrize("shape", HEADS + PAPER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rope_store_on_a_gpu(dtype: torch.dtype, shape: Heads, n: int) -> None:
    from crosslayer.kernels import few_rows_launch

    check_rope_store(few_rows_launch, Draw("cuda", dtype), n, shape)
    check_rope_store(project, Draw("cuda", dtype), n, shape)


@needs_cuda
@pytest.mark.parametrize("n", range(1, 5))
@pytest.mark.parametrize("size", SIZES + PAPER_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_on_a_gpu(dtype: torch.dtype, size: tuple[int, int], n: int) -> None:
    from crosslayer.kernels import few_rows_launch

    check_products(few_rows_launch, Draw("cuda", dtype), n, *size)
    check_products(project, Draw("cuda", dtype), n, *size)


@needs_cuda
@pytest.mark.parametrize("n", [3, 16, 17, 40, 64])
@pytest.mark.parametrize("shape", HEADS + PAPER)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rope_store_of_some_rows_on_a_gpu(dtype: torch.dtype, shape: Heads, n: int) -> None:
    from crosslayer.kernels import some_rows_launch

    check_rope_store(some_rows_launch, Draw("cuda", dtype), n, shape)


@needs_cuda
@pytest.mark.parametrize("n", [3, 16, 17, 40, 64])
@pytest.mark.parametrize("size", SIZES + LARGER + PAPER_SIZES[:2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_some_rows_on_a_gpu(dtype: torch.dtype, size: tuple[int, int], n: int) -> None:
    from crosslayer.kernels import some_rows_launch

    check_products(some_rows_launch, Draw("cuda", dtype), n, *size)


@needs_cuda
@pytest.mark.parametrize(("name", "n"), [("few_rows_launch", 1), ("some_rows_launch", 16), ("some_rows_launch", 60)])
def test_overlap_changes_nothing(name: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers one after the other, where a kernel that did not wait would read what is not yet written: bit by bit what
    they make when each starts after the one before."""
    kernels = importlib.import_module(f"crosslayer.kernels.{name}")
    draw = Draw("cuda", torch.bfloat16)
    hidden, inner, heads, dim = 2048, 5472, 16, 128
    start, gain, keys, values = draw(n, hidden), draw(hidden), draw(5, 16, 1, dim), draw(5, 16, 1, dim)
    cos, sin = (draw(n, dim // 2, dtype=torch.float32) for _ in range(2))
    shapes = {"qkv": (hidden + 2 * dim, hidden), "o": (hidden, hidden), "gate_up": (2 * inner, hidden)}
    shapes |= {"down": (hidden, inner)}
    layers = [{name: draw(*shape) / shape[1] ** 0.5 for name, shape in shapes.items()} for _ in range(6)]
    places = 5 + torch.arange(n, device="cuda")
    sizes = {"head_dim": dim, "num_heads": heads, "num_kv_heads": 1, "key_scale": 1.0, "value_scale": 1.0}
    pools = {"keys": keys, "values": values, "places": places, "bias": None}

    def outcome() -> Tensor:
        residual = start.clone()
        for layer in layers:
            q = kernels.project_rope_store(residual, layer["qkv"], EPS, cos, sin, **sizes, **pools)
            attended = q.flatten(1) + values.flatten(0, 1)[places, 0].repeat(1, heads)
            kernels.project_add(attended, layer["o"], residual)
            mixed = kernels.project_swiglu(residual, layer["gate_up"], EPS)
            kernels.project_add(mixed, layer["down"], residual)
        if not hasattr(kernels, "project_logits"):
            return residual
        return kernels.project_logits(residual, layers[0]["gate_up"], gain, EPS)

    with monkeypatch.context() as patched:
        patched.setattr(kernels, "dependent_launch", lambda x: {"PDL": False, "launch_pdl": False})
        expected = outcome()
    outcome()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = outcome()
    for _ in range(100):
        got.zero_()
        graph.replay()
        assert torch.equal(got, expected)
