"""One token at a time: the convolution and the scan as a recurrence, for generation. Both write the state in place."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from megatron_ext.ssm.naive import is_silu


def conv_step(
    x: Float[Tensor, "b d"],
    window: Float[Tensor, "b d w_state"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, "d"] | None = None,
    activation: str | None = None,
) -> Float[Tensor, "b d"]:
    """The causal convolution of one more token.

    Args:
        x: The token.
        window: The last inputs, oldest first, at least w - 1 of them; shifted by one in place.
        weight: The taps; the last one meets the token itself.
        bias: Added before the activation.
        activation: None, "silu" or "swish".

    Returns:
        The output of this token, in the dtype of x.

    Raises:
        ConfigError: Another activation.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    inputs = torch.cat([window, x.unsqueeze(-1).to(window.dtype)], -1)
    window.copy_(inputs[..., -window.shape[-1] :])
    y = (inputs[..., -weight.shape[-1] :].to(dtype) * weight.to(dtype)).sum(-1)
    if bias is not None:
        y = y + bias.to(dtype)
    return (F.silu(y) if is_silu(activation) else y).to(x.dtype)


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
