"""The short causal convolution before the scan: each channel by itself, in channels-last layout."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.ssm.naive import is_silu


def causal_conv1d(
    x: Float[Tensor, "b l d"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, "d"] | None = None,
    initial_states: Float[Tensor, "b w-1 d"] | None = None,
    seq_idx: Int[Tensor, "b l"] | None = None,
    activation: str | None = None,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b w-1 d"]]:
    """y_t = act(bias + sum_j weight[:, w-1-j] x_{t-j}), accumulated in float32 (float64 for float64 inputs).

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
        ConfigError: Another activation, or initial states together with documents.
    """
    silu = is_silu(activation)
    if initial_states is not None and seq_idx is not None:
        raise ConfigError("a causal convolution takes initial states or packed documents, not both")
    length, taps = x.shape[1], weight.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    past = x.new_zeros(x.shape[0], taps - 1, x.shape[2]) if initial_states is None else initial_states
    padded = torch.cat([past.to(x.dtype), x], 1)
    y = padded.new_zeros(1, dtype=dtype) if bias is None else bias.to(dtype)
    for j in range(taps):
        tap = weight[:, taps - 1 - j].to(dtype)
        value = padded[:, taps - 1 - j : taps - 1 - j + length]
        if seq_idx is not None and j > 0:
            same = F.pad(seq_idx[:, j:] == seq_idx[:, :-j], (min(j, length), 0))
            value = value * same.unsqueeze(-1)
        y = torch.addcmul(y, value.to(dtype), tap)
    y = F.silu(y) if silu else y
    return y.to(x.dtype), padded[:, length:]
