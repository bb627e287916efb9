"""Root-mean-square norm with a SiLU gate, over groups of channels: what follows the scan. Backward by hand.

It works in blocks of tokens that fit the cache and keeps its inputs and one number per group; what lies between is
computed again.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.ssm._blocks import blocks


def gated_rms_norm(
    x: Float[Tensor, "*batch d"],
    weight: Float[Tensor, "d"],
    z: Float[Tensor, "*batch d"] | None = None,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Float[Tensor, "*batch d"]:
    """norm(x) silu(z), or norm(x silu(z)), computed in float32 (float64 for float64 inputs).

    Args:
        x: Inputs.
        weight: One factor per channel.
        z: The gate; None for none.
        eps: Added to the mean square.
        group_size: Channels that are normalised together; all of them by default.
        norm_before_gate: norm(x) silu(z) if true, norm(x silu(z)) if false.

    Returns:
        The normalised, gated inputs, in the dtype of x.
    """
    return _GatedNorm.apply(x, weight, z, eps, group_size or x.shape[-1], norm_before_gate)  # type: ignore[return-value]


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, z, eps, group_size, norm_before_gate):
        dtype = torch.promote_types(x.dtype, torch.float32)
        xs, zs = _rows(x), None if z is None else _rows(z)
        y = torch.empty_like(xs, memory_format=torch.contiguous_format)
        scale = torch.empty(xs.shape[0], xs.shape[1] // group_size, 1, dtype=dtype, device=x.device)
        for k in blocks(xs.shape[0], xs.shape[1], xs.device):
            gate = None if zs is None else F.silu(zs[k].to(dtype))
            u = _times(xs[k].to(dtype), None if norm_before_gate else gate).unflatten(1, (-1, group_size))
            scale[k] = torch.rsqrt(u.square().mean(-1, keepdim=True).add_(eps))
            normed = (u * scale[k]).flatten(1).mul_(weight.to(dtype))
            y[k] = _times(normed, gate if norm_before_gate else None)
        ctx.save_for_backward(x, weight, z, scale)
        ctx.norm_before_gate = norm_before_gate
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy):  # type: ignore[override]
        x, weight, z, scale = ctx.saved_tensors
        dtype, groups = scale.dtype, (scale.shape[1], -1)
        xs, zs, dys, wide = _rows(x), None if z is None else _rows(z), _rows(dy), weight.to(dtype)
        dx = torch.empty_like(xs, memory_format=torch.contiguous_format)
        dz = None if zs is None else torch.empty_like(zs, memory_format=torch.contiguous_format)
        dweight = torch.zeros_like(wide)
        for k in blocks(xs.shape[0], xs.shape[1], xs.device):
            xk, dyk = xs[k].to(dtype), dys[k].to(dtype)
            gate = None if zs is None else F.silu(zs[k].to(dtype))
            inner, outer = (None, gate) if ctx.norm_before_gate else (gate, None)
            normed = _times(xk, inner).unflatten(1, groups) * scale[k]
            dout = _times(dyk, outer)
            dweight += (dout * normed.flatten(1)).sum(0)
            dnormed = (dout * wide).unflatten(1, groups)
            along = (dnormed * normed).mean(-1, keepdim=True)
            du = dnormed.addcmul_(normed, along, value=-1).mul_(scale[k]).flatten(1)
            dx[k] = _times(du, inner)
            if zs is not None and dz is not None:
                dgate = dyk * normed.flatten(1) * wide if ctx.norm_before_gate else du * xk
                dz[k] = torch.ops.aten.silu_backward(dgate, zs[k].to(dtype))
        dz = None if dz is None else dz.view(x.shape)
        return dx.view(x.shape), dweight.to(weight.dtype), dz, None, None, None


def _rows(t: Float[Tensor, "*batch d"]) -> Float[Tensor, "rows d"]:
    return t.reshape(-1, t.shape[-1])


def _times(t: Tensor, gate: Tensor | None) -> Tensor:
    return t if gate is None else t * gate
