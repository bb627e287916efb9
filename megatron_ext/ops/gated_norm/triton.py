"""The gated root-mean-square norm as Triton kernels: one pass over memory forward, one backward."""

# A launch takes numbers for constants, and num_warps, whatever Triton's annotations say.
# pyright: reportArgumentType=false, reportCallIssue=false

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.errors import ConfigError
from megatron_ext.ops.gated_norm import triton_kernels
from megatron_ext.ops.triton_jit import INTERPRETED, packed
from megatron_ext.ops.triton_tiles import cdiv, next_power_of_two

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
    size = check_groups(x.shape[-1], group_size or x.shape[-1])
    return _GatedNorm.apply(x, weight.contiguous(), z, eps, size, norm_before_gate)  # type: ignore[return-value]


def check_groups(channels: int, size: int) -> int:
    """The size of a group, if a program can hold it.

    Raises:
        ConfigError: The groups do not divide the channels, or are too large.
    """
    if channels % size or size > LARGEST_GROUP:
        raise ConfigError(
            "no such groups of channels in the Triton norm", got=f"{channels} / {size}",
            legal=f"divisors of the channels up to {LARGEST_GROUP}",
        )  # fmt: skip
    return size


def forward(
    x: Float[Tensor, "b l d"],
    weight: Float[Tensor, "d"],
    z: Float[Tensor, "b l d"] | None,
    eps: float,
    size: int,
    norm_before_gate: bool,
    y: Float[Tensor, "b l d"],
) -> Float[Tensor, "b l g"]:
    """Write the gated norm into `y`; the reciprocal root mean square of each group.

    All of x, y and z may be parts of a projection, and tokens first in memory: only channels must be packed.
    """
    batch, length, d = x.shape
    scale = torch.empty(batch, length, d // size, dtype=torch.float32, device=x.device)
    triton_kernels.norm_kernel[(batch * length, d // size)](
        x, weight, z, y, scale, *_strides(x), *_strides(z), *_strides(y), length, eps,
        SIZE=size, GATE_FIRST=not norm_before_gate, BLOCK=next_power_of_two(size), num_warps=_warps(size),
    )  # fmt: skip
    return scale


def backward(
    x: Float[Tensor, "b l d"],
    weight: Float[Tensor, "d"],
    z: Float[Tensor, "b l d"] | None,
    scale: Float[Tensor, "b l g"],
    dy: Float[Tensor, "b l d"],
    norm_before_gate: bool,
    dz: Float[Tensor, "b l d"] | None,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "d"]]:
    """The gradients of x, contiguous, and of the weight; that of the gate is written to `dz`, laid out like any z."""
    batch, length, d = x.shape
    dx = torch.empty(batch, length, d, dtype=x.dtype, device=x.device)
    runs, size = cdiv(batch * length, RUN), d // scale.shape[-1]
    dweight = torch.empty(runs, d, dtype=torch.float32, device=x.device)
    triton_kernels.norm_backward_kernel[(runs, d // size)](
        x, weight, z, scale, dy, dx, dz, dweight,
        *_strides(x), *_strides(z), *_strides(dy), *_strides(dz), length, batch * length,
        SIZE=size, GATE_FIRST=not norm_before_gate, RUN=RUN, BLOCK=next_power_of_two(size), num_warps=_warps(size),
    )  # fmt: skip
    return dx, dweight.sum(0)


def _strides(t: Tensor | None) -> tuple[int, int]:
    return (0, 0) if t is None else (t.stride(0), t.stride(1))


def _rows(t: Float[Tensor, "*batch d"] | None) -> Float[Tensor, "1 rows d"] | None:
    """All tokens as those of one sequence; no copy where the batch has one stride."""
    return None if t is None else packed(t.reshape(1, -1, t.shape[-1]), 1)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, z, eps, size, norm_before_gate):
        y = torch.empty(1, x.numel() // x.shape[-1], x.shape[-1], dtype=x.dtype, device=x.device)
        scale = forward(_rows(x), weight, _rows(z), eps, size, norm_before_gate, y)  # type: ignore[arg-type]
        ctx.save_for_backward(x, weight, z, scale)
        ctx.norm_before_gate = norm_before_gate
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy):  # type: ignore[override]
        x, weight, z, scale = ctx.saved_tensors
        zs = _rows(z)
        dz = None if zs is None else torch.empty(zs.shape, dtype=zs.dtype, device=zs.device)
        dx, dweight = backward(_rows(x), weight, zs, scale, _rows(dy), ctx.norm_before_gate, dz)  # type: ignore[arg-type]
        dz = None if dz is None else dz.view(x.shape)
        return dx.view(x.shape), dweight.to(weight.dtype), dz, None, None, None


def _warps(size: int) -> int:
    """16 channels of a group for each thread, within what a program may have."""
    return max(1, min(16, next_power_of_two(size) // 512))
