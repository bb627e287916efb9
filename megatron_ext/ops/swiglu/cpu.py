"""SwiGLU in blocks of tokens that fit the cache, with a backward by hand that keeps its input alone.

16-bit inputs are widened block by block, and rounded once.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.ops.cache_blocks import blocks
from megatron_ext.ops.silu import silu, silu_and_derivative


def swiglu(y: Float[Tensor, "*batch g"]) -> Float[Tensor, "*batch f"]:
    """silu(a) b, a the first half of the channels and b the second, computed in float32 (float64 for float64 inputs).

    Args:
        y: Both halves, side by side.

    Returns:
        The product, in the dtype of y.
    """
    return _SwiGLU.apply(y)  # type: ignore[return-value]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y):
        ctx.save_for_backward(y)
        rows = y.reshape(-1, y.shape[-1])
        out = rows.new_empty(rows.shape[0], rows.shape[1] // 2)
        for k in blocks(rows.shape[0], rows.shape[1], y.device):
            a, b = _halves(rows[k])
            out[k] = silu(a).mul_(b)
        return out.view(*y.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout):  # type: ignore[override]
        (y,) = ctx.saved_tensors
        rows, douts = y.reshape(-1, y.shape[-1]), dout.reshape(-1, dout.shape[-1])
        dy = torch.empty_like(rows, memory_format=torch.contiguous_format)
        for k in blocks(rows.shape[0], rows.shape[1], y.device):
            (a, b), (da, db) = _halves(rows[k]), dy[k].chunk(2, -1)
            value, derivative = silu_and_derivative(a)
            d = douts[k].to(value.dtype)
            torch.mul(value, d, out=value)
            db.copy_(value)
            da.copy_(derivative.mul_(b).mul_(d))
        return dy.view(y.shape)


def _halves(y: Tensor) -> tuple[Tensor, Tensor]:
    a, b = y.to(torch.promote_types(y.dtype, torch.float32)).chunk(2, -1)
    return a, b
