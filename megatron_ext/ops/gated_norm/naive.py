"""The gated root-mean-square norm by its definition, group by group: what every faster form is held against.

Plain differentiable torch, in float32 or, for float64 inputs, in float64.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def gated_rms_norm(
    x: Float[Tensor, "*batch d"],
    weight: Float[Tensor, "d"],
    z: Float[Tensor, "*batch d"] | None = None,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Float[Tensor, "*batch d"]:
    """Root-mean-square norm over groups of channels, times silu(z) after it (or before it).

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
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.to(dtype)
    if z is not None and not norm_before_gate:
        y = y * F.silu(z.to(dtype))
    groups = y.split(group_size or y.shape[-1], -1)
    normed = [group / (group.square().mean(-1, keepdim=True) + eps).sqrt() for group in groups]
    y = torch.cat(normed, -1) * weight.to(dtype)
    if z is not None and norm_before_gate:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype)
