"""Rotary position embedding as two fused products for each half of the channels, forward and back.

Where Megatron's formula makes a turned copy of its input, two products and their sum, and lets autograd keep both, this
writes each result once and keeps only the angles. Computed in the dtype of t, like Megatron's.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotary(
    t: Float[Tensor, "s b n d"], angles: Float[Tensor, "s #b #n r"], scale: float = 1.0, interleaved: bool = False
) -> Float[Tensor, "s b n d"]:
    """Each pair of channels times `scale` and the rotation by its angles.

    Args:
        t: Queries or keys; views are welcome.
        angles: Of both channels of the pairs, in radians; no gradient reaches them.
        scale: Of the cosines and sines.
        interleaved: Pairs are channels 2 i and 2 i + 1, instead of i and i + r / 2.
    """
    return _Rotary.apply(t, angles, scale, interleaved)  # type: ignore[return-value]


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t, angles, scale, interleaved):
        ctx.save_for_backward(angles)
        ctx.scale, ctx.interleaved = scale, interleaved
        return _turn(t, *_factors(angles, scale, t.dtype, interleaved), interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dt):  # type: ignore[override]
        (angles,) = ctx.saved_tensors
        cos, (first, second) = _factors(angles, ctx.scale, dt.dtype, ctx.interleaved)
        return _turn(dt, cos, (-second, -first), ctx.interleaved), None, None, None  # the transposed matrix


Pair = tuple[Tensor, Tensor]


def _factors(angles: Tensor, scale: float, dtype: torch.dtype, interleaved: bool) -> tuple[Pair, Pair]:
    """Cosines and sines, each of the first and of the second channel of the pairs."""
    cos, sin = angles.cos(), angles.sin()
    if scale != 1:
        cos, sin = cos * scale, sin * scale
    return _pair(cos.to(dtype), interleaved), _pair(sin.to(dtype), interleaved)


def _turn(t: Tensor, cos: Pair, sin: Pair, interleaved: bool) -> Tensor:
    """(a, b) to (a cos - b sin, b cos + a sin)."""
    out = torch.empty_like(t, memory_format=torch.contiguous_format)
    width = 2 * cos[0].shape[-1]
    (a, b), (to_a, to_b) = _pair(t[..., :width], interleaved), _pair(out[..., :width], interleaved)
    torch.mul(a, cos[0], out=to_a).addcmul_(b, sin[0], value=-1)
    torch.mul(b, cos[1], out=to_b).addcmul_(a, sin[1])
    if width < t.shape[-1]:
        out[..., width:] = t[..., width:]
    return out


def _pair(x: Tensor, interleaved: bool) -> Pair:
    if interleaved:
        return x[..., ::2], x[..., 1::2]
    a, b = x.chunk(2, -1)
    return a, b
