"""The causal convolution with its activation as Triton kernels. Nothing but the inputs is kept for the backward."""

# A launch takes numbers for constants, and num_warps, whatever Triton's annotations say.
# pyright: reportArgumentType=false, reportCallIssue=false

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.errors import ConfigError
from megatron_ext.ops.causal_conv1d import triton_kernels
from megatron_ext.ops.silu import is_silu
from megatron_ext.ops.triton_jit import INTERPRETED, packed
from megatron_ext.ops.triton_tiles import MAX_TAPS, cdiv, next_power_of_two

# Tokens of a program. Each starts with a halo of three and, backward, ends with five float32 sums per channel: 5% of
# the traffic each at 64; and there are programs enough to hide that each waits for memory token by token.
RUN = 8 if INTERPRETED else 64
# 16 bytes of bfloat16 for each of 32 threads.
CHANNELS = 256
# Of a program of the convolution of one token.
STEP_CHANNELS = 128


def forward(
    x: Float[Tensor, "b l d"],
    past: Float[Tensor, "b k d"] | None,
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, "d"] | None,
    seq_idx: Int[Tensor, "b l"] | None,
    silu: bool,
) -> Float[Tensor, "b l d"]:
    """The convolution; x may be part of a projection: only its last dimension must be packed."""
    batch, length, d = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    triton_kernels.conv_kernel[(cdiv(d, CHANNELS), cdiv(length, RUN), batch)](
        x, past, weight, bias, seq_idx, y,
        x.stride(0), x.stride(1), y.stride(0), y.stride(1), length,
        D=d, WIDTH=weight.shape[1], SILU=silu, RUN=RUN, BLOCK=CHANNELS, num_warps=1,
    )  # fmt: skip
    return y


def backward(
    x: Float[Tensor, "b l d"],
    past: Float[Tensor, "b k d"] | None,
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, "d"] | None,
    seq_idx: Int[Tensor, "b l"] | None,
    silu: bool,
    dy: Float[Tensor, "b l d"],
    dx: Float[Tensor, "b l d"],
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Write the gradient of x into `dx`; return those of the past, the weight and the bias."""
    batch, length, d = x.shape
    width, runs = weight.shape[1], cdiv(length, RUN)
    steps = 4 * cdiv(RUN + (3 if past is None else 6), 4)
    dpast = None if past is None else torch.empty_like(past)
    dweight = torch.empty(batch * runs, d, width, dtype=torch.float32, device=x.device)
    dbias = None if bias is None else torch.empty(batch * runs, d, dtype=torch.float32, device=x.device)
    triton_kernels.conv_backward_kernel[(cdiv(d, CHANNELS), runs, batch)](
        x, past, weight, bias, seq_idx, dy, dx, dpast, dweight, dbias,
        x.stride(0), x.stride(1), dy.stride(0), dy.stride(1), dx.stride(0), dx.stride(1), length,
        D=d, WIDTH=width, SILU=silu, RUN=RUN, STEPS=steps, BLOCK=CHANNELS, num_warps=2,
    )  # fmt: skip
    return dpast, dweight.sum(0), None if dbias is None else dbias.sum(0)


def causal_conv1d(
    x: Float[Tensor, "b l d"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, "d"] | None = None,
    initial_states: Float[Tensor, "b w-1 d"] | None = None,
    seq_idx: Int[Tensor, "b l"] | None = None,
    activation: str | None = None,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b w-1 d"]]:
    """y_t = act(bias + sum_j weight[:, w-1-j] x_{t-j}), accumulated in float32, for up to four taps.

    Args:
        x: Inputs.
        weight: The taps; the last one meets the token itself.
        bias: Added before the activation.
        initial_states: The w - 1 inputs before the first token (zero by default).
        seq_idx: Document number of each token, not negative; taps do not reach into another document.
        activation: None, "silu" or "swish".

    Returns:
        y in the dtype of x, and the last w - 1 inputs.

    Raises:
        ConfigError: Another activation, more taps, or initial states together with documents.
    """
    silu, (length, taps) = is_silu(activation), (x.shape[1], weight.shape[1])
    if taps > MAX_TAPS:
        raise ConfigError("the Triton convolution has too many taps", got=taps, legal=f"up to {MAX_TAPS}")
    if initial_states is not None and seq_idx is not None:
        raise ConfigError("a causal convolution takes initial states or packed documents, not both")
    past = None if initial_states is None else initial_states.to(x.dtype).contiguous()
    seq_idx = None if seq_idx is None else seq_idx.int().contiguous()
    y = _CausalConv.apply(packed(x, 1), past, weight.contiguous(), bias, seq_idx, silu)
    before = x.new_zeros(x.shape[0], taps - 1, x.shape[2]) if past is None else past
    tail = torch.cat([before, x[:, max(0, length - taps + 1) :]], 1)
    return y, tail[:, tail.shape[1] - taps + 1 :]  # type: ignore[return-value]


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, past, weight, bias, seq_idx, silu):
        ctx.save_for_backward(x, past, weight, bias, seq_idx)
        ctx.silu = silu
        return forward(x, past, weight, bias, seq_idx, silu)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy):  # type: ignore[override]
        x, past, weight, bias, seq_idx = ctx.saved_tensors
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dpast, dweight, dbias = backward(x, past, weight, bias, seq_idx, ctx.silu, packed(dy, 1), dx)
        return dx, dpast, dweight.to(weight.dtype), None if dbias is None else dbias.to(bias.dtype), None, None


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
    (batch, d), held = x.shape, window.shape[2]
    assert window[0].is_contiguous()
    x, y = packed(x, 1), torch.empty(batch, d, dtype=x.dtype, device=x.device)
    triton_kernels.conv_step_kernel[(cdiv(d, STEP_CHANNELS), batch)](
        x, window, weight.contiguous(), bias, slots, y, x.stride(0), window.stride(0),
        D=d, WIDTH=weight.shape[1], HELD=held, SILU=is_silu(activation), TAPS=next_power_of_two(held),
        BLOCK=STEP_CHANNELS, num_warps=4,
    )  # fmt: skip
    return y
