"""The short causal convolution before the scan: each channel by itself, in channels-last layout, backward by hand.

It works in blocks of tokens that fit the cache and keeps nothing but its inputs: what is under the activation is
computed again in the backward.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.errors import ConfigError
from megatron_ext.ssm._blocks import blocks
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
    past = x.new_zeros(x.shape[0], taps - 1, x.shape[2]) if initial_states is None else initial_states.to(x.dtype)
    same = None if seq_idx is None else _same_document(seq_idx, taps)
    y = _CausalConv.apply(x, past, weight, bias, same, silu)
    tail = torch.cat([past, x[:, max(0, length - taps + 1) :]], 1)
    return y, tail[:, tail.shape[1] - taps + 1 :]  # type: ignore[return-value]


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, past, weight, bias, same, silu):
        ctx.save_for_backward(x, past, weight, bias, same)
        ctx.silu = silu
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for block in blocks(x.shape[1], x.shape[0] * x.shape[2], x.device):
            start, stop = block.start, block.stop
            z = _weighted(_window(x, past, start, stop), weight, bias, same, start)
            y[:, start:stop] = F.silu(z) if silu else z
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy):  # type: ignore[override]
        x, past, weight, bias, same = ctx.saved_tensors
        taps = weight.shape[1]
        dtype = torch.promote_types(x.dtype, torch.float32)
        dpadded = torch.zeros(x.shape[0], x.shape[1] + taps - 1, x.shape[2], dtype=dtype, device=x.device)
        dweight, dbias = torch.zeros_like(weight.T, dtype=dtype), torch.zeros_like(weight[:, 0], dtype=dtype)
        kernel = weight.T.to(dtype).contiguous()
        for block in blocks(x.shape[1], x.shape[0] * x.shape[2], x.device):
            start, stop = block.start, block.stop
            window = _window(x, past, start, stop)
            dz = dy[:, start:stop].to(dtype)
            if ctx.silu:
                dz = torch.ops.aten.silu_backward(dz, _weighted(window, weight, bias, same, start))
            dbias += dz.sum((0, 1))
            for k in range(taps):
                dtap = dz if same is None else dz * same[k, :, start:stop]
                dweight[k] += (dtap * window[:, k : k + stop - start]).sum((0, 1))
                dpadded[:, start + k : stop + k].addcmul_(dtap, kernel[k])
        dpast, dx = dpadded.to(x.dtype).split([taps - 1, x.shape[1]], 1)
        return dx, dpast, dweight.T.to(weight.dtype), None if bias is None else dbias.to(bias.dtype), None, None


def _window(
    x: Float[Tensor, "b l d"], past: Float[Tensor, "b k d"], start: int, stop: int
) -> Float[Tensor, "b window d"]:
    """The inputs of a block, preceded by those that its first token reaches, in float32 or wider."""
    before = max(0, start - past.shape[1])
    window = x[:, before:stop]
    if start < past.shape[1]:
        window = torch.cat([past[:, start:], window], 1)
    return window.to(torch.promote_types(x.dtype, torch.float32))


def _weighted(
    window: Float[Tensor, "b window d"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, "d"] | None,
    same: Bool[Tensor, "w b l 1"] | None,
    start: int,
) -> Float[Tensor, "b block d"]:
    """The bias plus the inputs times the taps."""
    taps = weight.shape[1]
    length = window.shape[1] - taps + 1
    kernel = weight.T.to(window.dtype).contiguous()
    z = window.new_zeros(()) if bias is None else bias.to(window.dtype)
    for k in range(taps):
        value = window[:, k : k + length]
        if same is not None:
            value = value * same[k, :, start : start + length]
        z = torch.addcmul(z, value, kernel[k])
    return z


def _same_document(seq_idx: Int[Tensor, "b l"], taps: int) -> Bool[Tensor, "w b l 1"]:
    """Whether the token that tap k meets belongs to the same document as the token of the output."""
    reach = [min(taps - 1 - k, seq_idx.shape[1]) for k in range(taps)]
    same = [F.pad(seq_idx[:, j:] == seq_idx[:, : seq_idx.shape[1] - j], (j, 0)) for j in reach]
    return torch.stack(same).unsqueeze(-1)
