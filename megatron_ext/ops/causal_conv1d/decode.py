"""The causal convolution of one more token in plain torch, for generation; the window of inputs moves on in place."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from megatron_ext.ops.silu import is_silu


def conv_step(
    x: Float[Tensor, "b d"],
    window: Float[Tensor, "slots d w_state"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, "d"] | None = None,
    activation: str | None = None,
    slots: Int[Tensor, "b"] | None = None,
) -> Float[Tensor, "b d"]:
    """The causal convolution of one more token; the window is moved on in place.

    Args:
        x: The token.
        window: The last inputs, oldest first, at least w - 1 of them.
        weight: The taps; the last one meets the token itself.
        bias: Added before the activation.
        activation: None, "silu" or "swish".
        slots: The row of `window` of each row of x; by default its own.

    Returns:
        The output of this token, in the dtype of x.

    Raises:
        ConfigError: Another activation.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    previous = window if slots is None else window[slots]
    inputs = torch.cat([previous, x.unsqueeze(-1).to(window.dtype)], -1)
    window[... if slots is None else slots] = inputs[..., -window.shape[-1] :]
    y = (inputs[..., -weight.shape[-1] :].to(dtype) * weight.to(dtype)).sum(-1)
    if bias is not None:
        y = y + bias.to(dtype)
    return (F.silu(y) if is_silu(activation) else y).to(x.dtype)
