"""Root-mean-square norm with a SiLU gate, over groups of channels: what follows the scan."""

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
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.to(dtype)
    if z is not None and not norm_before_gate:
        y = y * F.silu(z.to(dtype))
    groups = y.unflatten(-1, (-1, group_size or y.shape[-1]))
    y = F.rms_norm(groups, groups.shape[-1:], eps=eps).flatten(-2) * weight.to(dtype)
    if z is not None and norm_before_gate:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype)
