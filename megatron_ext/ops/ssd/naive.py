"""The state-space scan (SSD) by its definition, token by token: slow, short, what every faster form is held against.

Plain differentiable torch, in float32 or, for float64 inputs, in float64.
Shapes: b batch, l tokens, h heads, p channels of a head, g groups of heads, n state size.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def ssd(
    x: Float[Tensor, "b l h p"],
    dt: Float[Tensor, "b l h"],
    A: Float[Tensor, "h"],
    B: Float[Tensor, "b l g n"],
    C: Float[Tensor, "b l g n"],
    D: Float[Tensor, "h"] | Float[Tensor, "h p"] | None = None,
    initial_states: Float[Tensor, "b h p n"] | None = None,
    seq_idx: Int[Tensor, "b l"] | None = None,
) -> tuple[Float[Tensor, "b l h p"], Float[Tensor, "b h p n"]]:
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T,  y_t = S_t C_t + D x_t  (Mamba-2, arXiv 2405.21060, section 2).

    Args:
        x: Inputs.
        dt: Step sizes, after bias and softplus.
        A: Decay rates, negative.
        B: Input projections, one per group of h / g heads.
        C: Output projections, one per group of heads.
        D: Skip weights, per head or per channel.
        initial_states: The state before the first token (zero by default).
        seq_idx: Document number of each token; the state is forgotten where it changes.

    Returns:
        y in the dtype of x, and the state after the last token in float32 (float64 for float64 inputs).
    """
    batch, length, heads, channels = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    repeats = heads // B.shape[2]
    xs, steps, rates = x.to(dtype), dt.to(dtype), A.to(dtype)
    Bs, Cs = (t.to(dtype).repeat_interleave(repeats, dim=2) for t in (B, C))
    state = x.new_zeros(batch, heads, channels, B.shape[3], dtype=dtype)
    if initial_states is not None:
        state = initial_states.to(dtype)
    outputs = []
    for t in range(length):
        decay = torch.exp(steps[:, t] * rates)
        if seq_idx is not None and t > 0:
            decay = decay * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None]
        drive = torch.einsum("bh,bhp,bhn->bhpn", steps[:, t], xs[:, t], Bs[:, t])
        state = decay[..., None, None] * state + drive
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, Cs[:, t]))
    y = torch.stack(outputs, 1)
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]).to(dtype) * xs
    return y.to(x.dtype), state
