"""Matrix products together with what comes right before and after them in a layer.

`x` [N, K] is the residual stream, which has not been normalised: the gain of the norm is part of the weight, and the
division by the root mean square commutes with the product, so it is left to whoever handles the product next. Only the
last norm keeps its gain, as the weight behind it may be the embedding too.

With few rows on a GPU, the time of a product is that of reading its weight, and one kernel does all at once: one kind
for one or two rows, and on a Hopper GPU another, which uses tensor cores, for up to 64. With more, cuBLAS makes the
product, and a second kernel the rest. All tensors are contiguous, and x, weights, biases and gains of one dtype. The
kernels that do all at once read the weight before the kernels that were launched before them have ended, so none of
those must write the weight.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from crosslayer.kernels.rope_store import rope_store
from crosslayer.kernels.swiglu import swiglu

# Beyond so many rows, the other kernels are faster, as measured on an H100.
FEW_ROWS = 2
SOME_ROWS = 64


def project_rope_store(
    x: Tensor,
    weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    *,
    head_dim: int,
    num_heads: int,
    num_kv_heads: int,
    bias: Tensor | None,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    keys: Tensor | None,
    values: Tensor | None,
    places: Tensor,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> Tensor:
    """Queries [N, H, D] of x [N, hidden] by weight [W, hidden]; keys and values go into pools.

    The other arguments are those of `rope_store`, which says what is done to the product.
    """
    kernels = _all_at_once(x)
    if kernels is not None and q_gain is None and k_gain is None:  # these need whole heads, which no program has
        q: Tensor = kernels.project_rope_store(
            x, weight, eps, cos, sin, head_dim=head_dim, num_heads=num_heads, num_kv_heads=num_kv_heads, bias=bias,
            keys=keys, values=values, places=places, key_scale=key_scale, value_scale=value_scale,
        )  # fmt: skip
        return q
    return rope_store(
        *_product(x, weight, eps), cos, sin, head_dim=head_dim, num_heads=num_heads, num_kv_heads=num_kv_heads,
        bias=bias, q_gain=q_gain, k_gain=k_gain, keys=keys, values=values, places=places, key_scale=key_scale,
        value_scale=value_scale,
    )  # fmt: skip


def project_swiglu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """SwiGLU [N, I] of the normalised x [N, hidden], by weight [2 I, hidden]: gates, then what they let through."""
    if (kernels := _all_at_once(x)) is not None:
        mixed: Tensor = kernels.project_swiglu(x, weight, eps)
        return mixed
    return swiglu(*_product(x, weight, eps))


def project_add(x: Tensor, weight: Tensor, residual: Tensor) -> None:
    """Add x [N, K] times weight [hidden, K] to residual [N, hidden]."""
    if (kernels := _all_at_once(x)) is not None:
        kernels.project_add(x, weight, residual)
    else:
        residual.addmm_(x, weight.T)


def project_logits(x: Tensor, weight: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Logits [N, V] of x / RMS(x) times gain [K], by weight [V, K]: float32 from the kernel for few rows, else as x."""
    if _are_few(x):
        from crosslayer.kernels import few_rows_launch

        return few_rows_launch.project_logits(x, weight, gain, eps)
    return linear(rms_norm(x, gain.shape, gain, eps), weight)


def _product(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, float]:
    """The product, and the residual stream and eps by which it is still to be normalised."""
    if x.dtype != torch.float16:
        return linear(x, weight), x, eps
    # A product with what is not normalised may be more than float16 can say.
    return linear(rms_norm(x, x.shape[-1:], None, eps), weight), torch.ones_like(x), 0.0


def _all_at_once(x: Tensor) -> ModuleType | None:
    """The kernels that make a product of so many rows and do the rest; None if there are none."""
    if _are_few(x):
        from crosslayer.kernels import few_rows_launch

        return few_rows_launch
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and 0 < len(x) <= SOME_ROWS:
        from crosslayer.kernels import some_rows_launch

        return some_rows_launch if some_rows_launch.are_fast_on(x.device) else None
    return None


def _are_few(x: Tensor) -> bool:
    # Triton is there only where there is a GPU.
    return x.is_cuda and x.dtype != torch.float64 and 0 < len(x) <= FEW_ROWS
