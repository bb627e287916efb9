"""The state-space layer written as its definition: slow, short, the oracle of every faster version.

Everything here is plain differentiable torch, one token at a time, in float32 or, for float64 inputs, in float64.
Shapes: b batch, l tokens, h heads, p head channels, g groups of heads, n state size, d channels, w taps.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from megatron_ext.errors import ConfigError


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


def is_silu(activation: str | None) -> bool:
    """Whether the activation is SiLU.

    Raises:
        ConfigError: It is neither SiLU nor none.
    """
    if activation not in (None, "silu", "swish"):
        raise ConfigError("the causal convolution knows no such activation", got=activation, legal="None, silu, swish")
    return activation is not None


def causal_conv1d(
    x: Float[Tensor, "b l d"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, "d"] | None = None,
    initial_states: Float[Tensor, "b w-1 d"] | None = None,
    seq_idx: Int[Tensor, "b l"] | None = None,
    activation: str | None = None,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b w-1 d"]]:
    """y_t = act(bias + sum_j weight[:, w-1-j] x_{t-j}): each channel by itself, each token from itself and the past.

    Args:
        x: Inputs.
        weight: The taps; the last one meets the token itself.
        bias: Added before the activation.
        initial_states: The w - 1 inputs before the first token (zero by default).
        seq_idx: Document number of each token; taps do not reach into another document.
        activation: None, "silu" or "swish".

    Returns:
        y in the dtype of x, and the last w - 1 inputs.

    Raises:
        ConfigError: Another activation.
    """
    taps = weight.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    past = x.new_zeros(x.shape[0], taps - 1, x.shape[2]) if initial_states is None else initial_states
    padded = torch.cat([past.to(x.dtype), x], 1)
    outputs = []
    for t in range(x.shape[1]):
        y = torch.zeros_like(x[:, 0], dtype=dtype) + (0 if bias is None else bias.to(dtype))
        for j in range(taps):
            value = weight[:, taps - 1 - j].to(dtype) * padded[:, t + taps - 1 - j].to(dtype)
            if seq_idx is not None:
                value = value * (seq_idx[:, t] == seq_idx[:, max(t - j, 0)])[:, None]
            y = y + value
        outputs.append(F.silu(y) if is_silu(activation) else y)
    return torch.stack(outputs, 1).to(x.dtype), padded[:, x.shape[1] :]


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
