"""The recurrence of the scan for one more token in plain torch, for generation; the state is written in place."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from megatron_ext.ops.ssd.step_sizes import NO_LIMIT, step_sizes


def state_step(
    state: Float[Tensor, "slots h p n"],
    x: Float[Tensor, "b h p"],
    dt: Float[Tensor, "b h p"],
    A: Float[Tensor, "h p n"],
    B: Float[Tensor, "b g n"],
    C: Float[Tensor, "b g n"],
    D: Float[Tensor, "h p"] | None = None,
    z: Float[Tensor, "b h p"] | None = None,
    dt_bias: Float[Tensor, "h p"] | None = None,
    dt_softplus: bool = False,
    slots: Int[Tensor, "b"] | None = None,
) -> Float[Tensor, "b h p"]:
    """S = exp(dt A) S + dt x B^T and y = S C + D x, times silu(z) with a gate.

    Args:
        state: The state before the token; the one after it is written in place.
        x: The token.
        dt: Step sizes, before bias and softplus.
        A: Decay rates, negative.
        B: Input projection, one per group of h / g heads.
        C: Output projection, one per group of heads.
        D: Skip weights.
        z: The gate.
        dt_bias: Added to dt.
        dt_softplus: Apply softplus to dt after the bias.
        slots: The row of `state` of each row of x; by default its own.

    Returns:
        The output of this token, in the dtype of x.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    steps, xs = step_sizes(dt, dt_bias, dt_softplus, NO_LIMIT), x.to(dtype)
    Bh, Ch = (t.to(dtype).repeat_interleave(x.shape[1] // B.shape[1], 1) for t in (B, C))
    dt, previous = steps.to(dtype), state if slots is None else state[slots]
    new = previous.to(dtype) * torch.exp(dt.unsqueeze(-1) * A.to(dtype)) + (dt * xs).unsqueeze(-1) * Bh.unsqueeze(2)
    state[... if slots is None else slots] = new.to(state.dtype)
    y = torch.einsum("bhpn,bhn->bhp", new, Ch)
    y = (y if D is None else y + D.to(dtype) * xs).to(x.dtype)
    return y if z is None else (y * F.silu(z.to(steps.dtype))).to(x.dtype)
