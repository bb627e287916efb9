"""Root-mean-square norm with a SiLU gate, over groups of channels: what follows the scan. Backward by hand.

It works in blocks of tokens that fit the cache and keeps its inputs and one number per group; what lies between is
computed again.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.ops.cache_blocks import blocks
from megatron_ext.ops.silu import silu, silu_and_derivative


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
            zk = None if zs is None else zs[k].to(dtype)
            scale[k] = forward(xs[k].to(dtype), weight.to(dtype), zk, eps, group_size, norm_before_gate, y[k])
        ctx.save_for_backward(x, weight, z, scale)
        ctx.norm_before_gate = norm_before_gate
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy):  # type: ignore[override]
        x, weight, z, scale = ctx.saved_tensors
        xs, zs, dys, factor = _rows(x), None if z is None else _rows(z), _rows(dy), weight.to(scale.dtype)
        dx = torch.empty_like(xs, memory_format=torch.contiguous_format)
        dz = None if zs is None else torch.empty_like(zs, memory_format=torch.contiguous_format)
        dweight = torch.zeros_like(factor)
        for k in blocks(xs.shape[0], xs.shape[1], xs.device):
            zk = None if zs is None else zs[k].to(factor.dtype)
            dyk, dzk = dys[k].to(factor.dtype), None if dz is None else dz[k]
            dx[k], dweight_k = backward(xs[k].to(factor.dtype), factor, zk, scale[k], dyk, ctx.norm_before_gate, dzk)
            dweight += dweight_k
        dz = None if dz is None else dz.view(x.shape)
        return dx.view(x.shape), dweight.to(weight.dtype), dz, None, None, None


def forward(
    x: Float[Tensor, "*block d"],
    weight: Float[Tensor, "d"],
    z: Float[Tensor, "*block d"] | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    out: Float[Tensor, "*block d"],
) -> Float[Tensor, "*block g 1"]:
    """Write the gated norm of one block to `out`; the reciprocal root mean square of each group."""
    gate = None if z is None else silu(z)
    u = gate.mul_(x) if gate is not None and not norm_before_gate else x
    groups = u.unflatten(-1, (-1, group_size))
    scale = torch.linalg.vector_norm(groups, dim=-1, keepdim=True).square_().div_(group_size).add_(eps).rsqrt_()
    if u is gate:
        normed = groups.mul_(scale)
    else:
        normed = groups * scale if gate is None else gate.view(groups.shape).mul_(groups).mul_(scale)
    torch.mul(normed.view(x.shape), weight, out=out)
    return scale


def backward(
    x: Float[Tensor, "*block d"],
    weight: Float[Tensor, "d"],
    z: Float[Tensor, "*block d"] | None,
    scale: Float[Tensor, "*block g 1"],
    dy: Float[Tensor, "*block d"],
    norm_before_gate: bool,
    dz: Float[Tensor, "*block d"] | None,
) -> tuple[Float[Tensor, "*block d"], Float[Tensor, "d"]]:
    """The gradients of x and weight for one block; that of the gate is written to `dz`.

    With u what is normalised and v the gradient of its norm: the sum of v u over tokens is a product with a vector,
    which costs as little as one of reading it. What is no longer needed is written over, for memory at hand is in the
    cache.
    """
    gate, derivative = (None, None) if z is None else silu_and_derivative(z)
    inner, outer = (None, gate) if norm_before_gate else (gate, None)
    groups = (-1, scale.shape[-2], x.shape[-1] // scale.shape[-2])
    u, v = _times(x, inner).reshape(groups), _times(dy, outer).reshape(groups)
    scales, factor = scale.flatten(0, -3), weight.view(u.shape[1:])
    uv = u * v
    dweight = (scales.permute(1, 2, 0) @ uv.transpose(0, 1)).flatten()
    along = uv.mul_(factor).sum(-1, keepdim=True).mul_(scales.pow(3)).div_(-u.shape[-1])
    du = torch.mul(v, factor, out=uv).mul_(scales).addcmul_(u, along).view(x.shape)
    if derivative is not None and dz is not None:
        if norm_before_gate:
            derivative = derivative.reshape(u.shape).mul_(factor).mul_(scales).view(x.shape).mul_(dy)
        else:
            derivative.mul_(du)
        torch.mul(derivative, x, out=dz)
    return du if inner is None else du.mul_(inner), dweight


def _rows(t: Float[Tensor, "*batch d"]) -> Float[Tensor, "rows d"]:
    return t.reshape(-1, t.shape[-1])


def _times(t: Tensor, gate: Tensor | None) -> Tensor:
    return t if gate is None else t * gate
