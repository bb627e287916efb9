"""Step sizes of the scan: dt after bias, softplus and limits."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

NO_LIMIT = (0.0, float("inf"))


def step_sizes(
    dt: Float[Tensor, "*batch"], bias: Float[Tensor, "*last"] | None, softplus: bool, limit: Sequence[float]
) -> Float[Tensor, "*batch"]:
    """dt after bias, softplus and limits, in float32 or wider."""
    dtype = torch.promote_types(dt.dtype, torch.float32)
    dt = dt.to(dtype) if bias is None else dt.to(dtype) + bias.to(dtype)
    dt = F.softplus(dt) if softplus else dt
    return dt if tuple(limit) == NO_LIMIT else dt.clamp(*limit)
