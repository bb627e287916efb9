"""One token of a Mamba-2 layer in two Triton kernels, for generation: convolution, then state, gate and output.

Two, because the heads of a group share B and C: a head that had moved their window on would spoil it for the next.
"""

# A launch takes numbers for constants, and num_warps, whatever Triton's annotations say.
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
from jaxtyping import Float, Int
from torch import Tensor

from megatron_ext.ssm.naive import is_silu
from megatron_ext.ssm.triton import _decode
from megatron_ext.ssm.triton._jit import cdiv, packed, power

CHANNELS = 128
HEAD_CHANNELS = 16


def conv_step(
    x: Float[Tensor, "b d"],
    window: Float[Tensor, "slots d w_state"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, "d"] | None = None,
    activation: str | None = None,
    slots: Int[Tensor, "b"] | None = None,
) -> Float[Tensor, "b d"]:
    """`ssm.decode.conv_step`: the causal convolution of one more token; the window is moved on in place.

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
    _decode.conv_step_kernel[(cdiv(d, CHANNELS), batch)](
        x, window, weight.contiguous(), bias, slots, y, x.stride(0), window.stride(0),
        D=d, WIDTH=weight.shape[1], HELD=held, SILU=is_silu(activation), TAPS=power(held), BLOCK=CHANNELS, num_warps=4,
    )  # fmt: skip
    return y


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
    """`mamba_ssm_api.selective_state_update`: the recurrence for one more token, the state in place.

    Args:
        state: The state before the token, contiguous; afterwards the one after it. In bfloat16 it is half the traffic.
        x: The token.
        dt: Step sizes, before bias and softplus. Like A, D and the bias it may be expanded from one value per head.
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
    batch, heads, p = x.shape
    groups, n = B.shape[1:]
    assert state.is_contiguous()
    x, B, C = packed(x, 2), packed(B, 2), packed(C, 2)
    z = None if z is None else packed(z, 2)
    y = torch.empty(batch, heads, p, dtype=x.dtype, device=x.device)
    rows = min(HEAD_CHANNELS, power(p))
    _decode.state_step_kernel[(cdiv(p, rows), heads, batch)](
        state, x, dt, A, B, C, D, z, dt_bias, slots, y,
        x.stride(0), dt.stride(0), B.stride(0), C.stride(0), 0 if z is None else z.stride(0), *dt.stride()[1:],
        *A.stride(), *((0, 0) if D is None else D.stride()), *((0, 0) if dt_bias is None else dt_bias.stride()),
        HEADS=heads, GROUP=heads // groups, P=p, N=n, SOFTPLUS=dt_softplus, BLOCK_P=rows, BLOCK_N=power(n), num_warps=4,
    )  # fmt: skip
    return y
