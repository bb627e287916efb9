"""The recurrence of the scan for one more token, its gate and its output in one Triton kernel, for generation."""

# A launch takes numbers for constants, and num_warps, whatever Triton's annotations say.
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
from jaxtyping import Float, Int
from torch import Tensor

from megatron_ext.ops.ssd import triton_decode_kernel
from megatron_ext.ops.triton_jit import packed
from megatron_ext.ops.triton_tiles import cdiv, next_power_of_two

HEAD_CHANNELS = 16


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
    """`ssd.decode.state_step` in one kernel: the same arguments and results.

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
    rows = min(HEAD_CHANNELS, next_power_of_two(p))
    triton_decode_kernel.state_step_kernel[(cdiv(p, rows), heads, batch)](
        state, x, dt, A, B, C, D, z, dt_bias, slots, y,
        x.stride(0), dt.stride(0), B.stride(0), C.stride(0), 0 if z is None else z.stride(0), *dt.stride()[1:],
        *A.stride(), *((0, 0) if D is None else D.stride()), *((0, 0) if dt_bias is None else dt_bias.stride()),
        HEADS=heads, GROUP=heads // groups, P=p, N=n, SOFTPLUS=dt_softplus, BLOCK_P=rows,
        BLOCK_N=next_power_of_two(n), num_warps=4,
    )  # fmt: skip
    return y
