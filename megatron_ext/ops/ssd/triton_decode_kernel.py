"""The recurrence for one more token: each state is read and written once, and little else is moved.

A tile of 16 channels x 128 states is 16 float32 a thread with 4 warps, and a layer of 128 heads x 64 channels makes 512
programs for each sequence. Offsets of rows, or of the slots they lie in, are 64 bits wide.
"""

import triton
import triton.language as tl

from megatron_ext.ops.ssd.triton_decay_kernels import step_sizes
from megatron_ext.ops.triton_jit import sigmoid


@triton.jit
def state_step_kernel(
    state, x, dt, A, B, C, D, z, bias, slots, y,
    x_row, dt_row, B_row, C_row, z_row, dt_h, dt_p, A_h, A_p, A_n, D_h, D_p, bias_h, bias_p,
    HEADS: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr, SOFTPLUS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """S = exp(dt A) S + dt x B^T and y = S C + D x, times silu(z) with a gate, for some channels of a head."""
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    slot = row
    if slots is not None:
        slot = tl.load(slots + row).to(tl.int64)
    p, n = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    in_p, in_n = p < P, n < N
    both = in_p[:, None] & in_n[None, :]
    at = state + (slot * HEADS + head) * P * N + p[:, None] * N + n[None, :]
    xs = tl.load(x + row * x_row + head * P + p, in_p, 0.0).to(tl.float32)
    raw = tl.load(dt + row * dt_row + head * dt_h + p * dt_p, in_p, 0.0).to(tl.float32)
    shift = tl.zeros([BLOCK_P], tl.float32)
    if bias is not None:
        shift = tl.load(bias + head * bias_h + p * bias_p, in_p, 0.0).to(tl.float32)
    steps, _ = step_sizes(raw, shift, float("-inf"), float("inf"), SOFTPLUS)
    rate = tl.load(A + head * A_h + p[:, None] * A_p + n[None, :] * A_n, both, 0.0).to(tl.float32)
    Bs = tl.load(B + row * B_row + head // GROUP * N + n, in_n, 0.0).to(tl.float32)
    Cs = tl.load(C + row * C_row + head // GROUP * N + n, in_n, 0.0).to(tl.float32)
    old = tl.load(at, both, 0.0).to(tl.float32)
    new = old * tl.exp(steps[:, None] * rate) + (steps * xs)[:, None] * Bs[None, :]
    tl.store(at, new.to(state.dtype.element_ty), both)
    out = tl.sum(new * Cs[None, :], 1)
    if D is not None:
        out += tl.load(D + head * D_h + p * D_p, in_p, 0.0).to(tl.float32) * xs
    if z is not None:
        gate = tl.load(z + row * z_row + head * P + p, in_p, 0.0).to(tl.float32)
        out *= gate * sigmoid(gate)
    tl.store(y + (row * HEADS + head) * P + p, out.to(y.dtype.element_ty), in_p)
