"""The recurrence of the scan for one more token in plain torch, for generation; the state is written in place."""

import torch
from jaxtyping import Float
from torch import Tensor


def ssd_step(
    state: Float[Tensor, "b h p n"],
    x: Float[Tensor, "b h p"],
    dt: Float[Tensor, "b h p"],
    A: Float[Tensor, "h p n"],
    B: Float[Tensor, "b g n"],
    C: Float[Tensor, "b g n"],
    D: Float[Tensor, "h p"] | None = None,
) -> Float[Tensor, "b h p"]:
    """The recurrence for one more token.

    Args:
        state: The state before the token; the one after it is written in place.
        x: The token.
        dt: Step sizes, after bias and softplus.
        A: Decay rates, negative.
        B: Input projection, one per group of h / g heads.
        C: Output projection, one per group of heads.
        D: Skip weights.

    Returns:
        The output of this token, in the dtype of x.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    repeats = x.shape[1] // B.shape[1]
    Bh, Ch = (t.to(dtype).repeat_interleave(repeats, 1) for t in (B, C))
    xf, step = x.to(dtype), dt.to(dtype)
    new = state.to(dtype) * torch.exp(step.unsqueeze(-1) * A.to(dtype)) + (step * xf).unsqueeze(-1) * Bh.unsqueeze(2)
    state.copy_(new)
    y = torch.einsum("bhpn,bhn->bhp", new, Ch)
    return (y if D is None else y + D.to(dtype) * xf).to(x.dtype)
