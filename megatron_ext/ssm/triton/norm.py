"""The gated root-mean-square norm as Triton kernels: one pass over memory forward, one backward."""

# A launch takes numbers for constants, and num_warps, whatever Triton's annotations say.
# pyright: reportArgumentType=false, reportCallIssue=false

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.errors import ConfigError
from megatron_ext.ssm.triton import _norm
from megatron_ext.ssm.triton._jit import INTERPRETED, cdiv, power

# Tokens of a program of the backward: its sums for the weight's gradient are then 1/16 of a float32 pass.
RUN = 4 if INTERPRETED else 16
# Channels of a group that a program can hold, 64 a thread.
LARGEST_GROUP = 32768


def gated_rms_norm(
    x: Float[Tensor, "*batch d"],
    weight: Float[Tensor, "d"],
    z: Float[Tensor, "*batch d"] | None = None,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Float[Tensor, "*batch d"]:
    """norm(x) silu(z), or norm(x silu(z)), computed in float32.

    Args:
        x: Inputs.
        weight: One factor per channel.
        z: The gate; None for none.
        eps: Added to the mean square.
        group_size: Channels that are normalised together; all of them by default.
        norm_before_gate: norm(x) silu(z) if true, norm(x silu(z)) if false.

    Returns:
        The normalised, gated inputs, in the dtype of x.

    Raises:
        ConfigError: The groups do not divide the channels, or are too large.
    """
    size = group_size or x.shape[-1]
    if x.shape[-1] % size or size > LARGEST_GROUP:
        raise ConfigError(
            "no such groups of channels in the Triton norm", got=f"{x.shape[-1]} / {size}",
            legal=f"divisors of the channels up to {LARGEST_GROUP}",
        )  # fmt: skip
    return _GatedNorm.apply(x, weight.contiguous(), z, eps, size, norm_before_gate)  # type: ignore[return-value]


def _rows(t: Tensor) -> Tensor:
    """(*batch, d) as (rows, d) with packed channels; no copy where the batch has one stride."""
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, z, eps, size, norm_before_gate):
        xs, zs = _rows(x), None if z is None else _rows(z)
        (rows, d), groups = xs.shape, x.shape[-1] // size
        y = torch.empty(rows, d, dtype=x.dtype, device=x.device)
        scale = torch.empty(rows, groups, dtype=torch.float32, device=x.device)
        _norm.norm_kernel[(rows, groups)](
            xs, weight, zs, y, scale, xs.stride(0), 0 if zs is None else zs.stride(0), eps,
            SIZE=size, GATE_FIRST=not norm_before_gate, BLOCK=power(size), num_warps=_warps(size),
        )  # fmt: skip
        ctx.save_for_backward(x, weight, z, scale)
        ctx.size, ctx.norm_before_gate = size, norm_before_gate
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy):  # type: ignore[override]
        x, weight, z, scale = ctx.saved_tensors
        xs, zs, dys = _rows(x), None if z is None else _rows(z), _rows(dy)
        (rows, d), size = xs.shape, ctx.size
        dx = torch.empty(rows, d, dtype=x.dtype, device=x.device)
        dz = None if z is None else torch.empty(rows, d, dtype=z.dtype, device=x.device)
        runs = cdiv(rows, RUN)
        dweight = torch.empty(runs, d, dtype=torch.float32, device=x.device)
        _norm.norm_backward_kernel[(runs, d // size)](
            xs, weight, zs, scale, dys, dx, dz, dweight,
            xs.stride(0), 0 if zs is None else zs.stride(0), dys.stride(0), rows,
            SIZE=size, GATE_FIRST=not ctx.norm_before_gate, RUN=RUN, BLOCK=power(size),
            num_warps=_warps(size),
        )  # fmt: skip
        dz = None if dz is None else dz.view(x.shape)
        return dx.view(x.shape), dweight.sum(0).to(weight.dtype), dz, None, None, None


def _warps(size: int) -> int:
    """16 channels of a group for each thread, within what a program may have."""
    return max(1, min(16, power(size) // 512))
