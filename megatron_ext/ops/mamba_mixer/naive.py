"""All between a Mamba-2 layer's two projections, unfused: one naive operation after the other."""

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from megatron_ext.ops.causal_conv1d.naive import causal_conv1d
from megatron_ext.ops.gated_norm.naive import gated_rms_norm
from megatron_ext.ops.mamba_mixer.projection import Projection
from megatron_ext.ops.ssd.naive import ssd
from megatron_ext.ops.ssd.step_sizes import NO_LIMIT, step_sizes


def conv_scan_norm(
    zxbcdt: Float[Tensor, "b l in_proj"],
    conv_weight: Float[Tensor, "d w"],
    conv_bias: Float[Tensor, "d"] | None,
    dt_bias: Float[Tensor, "h"],
    A: Float[Tensor, "h"],
    D: Float[Tensor, "h"] | Float[Tensor, "h p"],
    projection: Projection,
    initial_states: Float[Tensor, "b h p n"] | None = None,
    seq_idx: Int[Tensor, "b l"] | None = None,
    dt_limit: Sequence[float] = NO_LIMIT,
    activation: str | None = "silu",
    norm_weight: Float[Tensor, "hp"] | None = None,
    norm_eps: float = 1e-6,
    norm_before_gate: bool = True,
) -> tuple[Float[Tensor, "b l hp"], Float[Tensor, "b h p n"]]:
    """norm(y) silu(z), norm(y silu(z)) or y silu(z), of the scan y of what the convolution makes of x, B and C.

    Arguments, results and errors are those of `mamba_mixer.cpu.conv_scan_norm`.
    """
    z, xBC, dt = projection.parts(zxbcdt)
    xBC, _ = causal_conv1d(xBC, conv_weight, conv_bias, None, seq_idx, activation)
    x, B, C = projection.inputs(xBC)
    y, state = ssd(x, step_sizes(dt, dt_bias, True, dt_limit), A, B, C, D, initial_states, seq_idx)
    y = y.flatten(2)
    if norm_weight is None:
        return (y * F.silu(z.to(state.dtype))).to(y.dtype), state
    group_size = projection.inner // projection.groups
    return gated_rms_norm(y, norm_weight, z, norm_eps, group_size, norm_before_gate), state
