"""The causal convolution by its definition, tap by tap: slow, short, what every faster form is held against.

Plain differentiable torch, in float32 or, for float64 inputs, in float64.
Shapes: b batch, l tokens, d channels, w taps.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from megatron_ext.ops.silu import is_silu


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
