"""The selective scan by its definition, token by token: slow, short, what every faster form is held against.

Plain differentiable torch, in float32 or, for float64 inputs, in float64.
Shapes: b batch, l tokens, d channels, n state size.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from megatron_ext.ops.ssd.step_sizes import NO_LIMIT, step_sizes


def selective_scan(
    x: Float[Tensor, "b l d"],
    dt: Float[Tensor, "b l d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b l n"],
    C: Float[Tensor, "b l n"],
    D: Float[Tensor, "d"] | None = None,
    z: Float[Tensor, "b l d"] | None = None,
    dt_bias: Float[Tensor, "d"] | None = None,
    initial_states: Float[Tensor, "b d n"] | None = None,
    dt_softplus: bool = False,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b d n"]]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,  y_t = (h_t C_t + D x_t) silu(z_t)  (Mamba, arXiv 2312.00752).

    Args:
        x: Inputs.
        dt: Step sizes, to which `dt_bias` is added and, with `dt_softplus`, a softplus applied.
        A: Decay rates, negative.
        B: Input projections, shared by all channels.
        C: Output projections, shared by all channels.
        D: Skip weights.
        z: The gate; None for none.
        dt_bias: Added to the step sizes.
        initial_states: The state before the first token (zero by default).
        dt_softplus: Whether step sizes pass through a softplus.

    Returns:
        y in the dtype of x, and the state after the last token in float32 (float64 for float64 inputs).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    steps = step_sizes(dt, dt_bias, dt_softplus, NO_LIMIT).to(dtype)
    xs, rates, Bs, Cs = (t.to(dtype) for t in (x, A, B, C))
    state = x.new_zeros(x.shape[0], *A.shape, dtype=dtype) if initial_states is None else initial_states.to(dtype)
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(steps[:, t, :, None] * rates)
        state = decay * state + torch.einsum("bd,bd,bn->bdn", steps[:, t], xs[:, t], Bs[:, t])
        outputs.append(torch.einsum("bdn,bn->bd", state, Cs[:, t]))
    y = torch.stack(outputs, 1)
    if D is not None:
        y = y + D.to(dtype) * xs
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype), state
