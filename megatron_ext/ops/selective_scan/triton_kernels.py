"""The selective scan: each program walks a row's chunks with the state of some channels in registers.

A chunk is one tile (tokens, channels, states), in which tokens are composed by an associative scan. Threads lie along
channels and states, so a thread has all tokens of its states in registers and exchanges nothing for them. y, dB and dC
are sums over states or channels of the tile.

Forward a tile is what x, dt, B and C make; the state before each chunk is left behind. Backward the chunks are walked
from the last: states are made again from those, and gradients come towards them in a scan in reverse. dB and dC sum
over channels, so each program writes its part, and torch adds them: the same sum at each run.

Compiled for Hopper at 8 states and 16 tokens a chunk they take 80 and 254 registers a thread with 4 warps, and spill
none; they have not yet run on one.

Where a row of tokens is addressed, the offset of its first token is 64 bits wide; within a chunk 32 bits do.
"""

# What `step_sizes` gives is not to be seen through Triton's annotations.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from megatron_ext.ops.ssd.triton_decay_kernels import step_sizes
from megatron_ext.ops.triton_jit import PRUNE, configs, sigmoid, times

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
ENDLESS: tl.constexpr = tl.constexpr(float("inf"))


@triton.jit
def _after(decay, state, next_decay, next_state):
    """One stretch of tokens, then the next: what becomes of a state, as its factor and what is added."""
    return decay * next_decay, next_decay * state + next_state


@triton.jit
def _steps(dt, at, inside, shift, SOFTPLUS: tl.constexpr):
    """Step sizes, zero outside, where a state stays as it is; and their derivative by the raw ones."""
    steps, slope = step_sizes(tl.load(dt + at, inside, 0.0).to(tl.float32), shift, -ENDLESS, ENDLESS, SOFTPLUS)
    return tl.where(inside, steps, 0.0), slope


@triton.jit
def _drive(steps, x, B, at, at_B, inside, inside_B):
    """What each token adds to each state."""
    xs = tl.load(x + at, inside, 0.0).to(tl.float32)
    Bs = tl.load(B + at_B, inside_B, 0.0).to(tl.float32)
    return (steps * xs)[:, :, None] * Bs[:, None, :]


@triton.autotune(configs=configs((4, 2), (2, 2), (8, 2)), key=["N", "CHUNK", "BLOCK"], prune_configs_by=PRUNE)
@triton.jit
def forward_kernel(
    x, dt, A, B, C, D, z, bias, initial,
    y, states, final,
    x_batch, x_token, dt_batch, dt_token, B_batch, B_token, C_batch, C_token, z_batch, z_token,
    length: "i32", channels: "i32", chunks: "i32",
    N: tl.constexpr, SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK channels of a row: y, the state before each chunk (b, chunks, d, n), and the last one."""
    d, row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    t, n = tl.arange(0, CHUNK), tl.arange(0, BLOCK_N)
    in_d, in_n = d < channels, n < N
    in_state, at_state = in_d[:, None] & in_n[None, :], d[:, None] * N + n[None, :]
    rates = tl.load(A + at_state, in_state, 0.0).to(tl.float32) * LOG2E
    shift = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        shift = tl.load(bias + d, in_d, 0.0).to(tl.float32)
    state = tl.zeros([BLOCK, BLOCK_N], tl.float32)
    if initial is not None:
        state = tl.load(initial + row * channels * N + at_state, in_state, 0.0).to(tl.float32)
    x += row * x_batch
    dt += row * dt_batch
    B += row * B_batch
    C += row * C_batch
    y += row * length * channels
    if z is not None:
        z += row * z_batch
    states += row * chunks * channels * N
    left = length
    for _ in range(times(chunks)):
        tl.store(states + at_state, state, in_state)
        inside, inside_n = (t < left)[:, None] & in_d[None, :], (t < left)[:, None] & in_n[None, :]
        at = t[:, None] * x_token + d[None, :]
        steps, _slope = _steps(dt, t[:, None] * dt_token + d[None, :], inside, shift[None, :], SOFTPLUS)
        decay = tl.exp2(steps[:, :, None] * rates[None, :, :])
        drive = _drive(steps, x, B, at, t[:, None] * B_token + n[None, :], inside, inside_n)
        drive += tl.where(t[:, None, None] == 0, decay * state[None, :, :], 0.0)
        _all, each = tl.associative_scan((decay, drive), 0, _after)
        state = tl.sum(tl.where(t[:, None, None] == CHUNK - 1, each, 0.0), 0)
        Cs = tl.load(C + t[:, None] * C_token + n[None, :], inside_n, 0.0).to(tl.float32)
        ys = tl.sum(each * Cs[:, None, :], 2)
        if D is not None:
            skip = tl.load(D + d, in_d, 0.0).to(tl.float32)
            ys += skip[None, :] * tl.load(x + at, inside, 0.0).to(tl.float32)
        if z is not None:
            gate = tl.load(z + t[:, None] * z_token + d[None, :], inside, 0.0).to(tl.float32)
            ys *= gate * sigmoid(gate)
        tl.store(y + t[:, None] * channels + d[None, :], ys.to(y.dtype.element_ty), inside)
        x += CHUNK * x_token
        dt += CHUNK * dt_token
        B += CHUNK * B_token
        C += CHUNK * C_token
        y += CHUNK * channels
        if z is not None:
            z += CHUNK * z_token
        states += channels * N
        left -= CHUNK
    tl.store(final + row * channels * N + at_state, state, in_state)


@triton.autotune(configs=configs((4, 2), (8, 2)), key=["N", "CHUNK", "BLOCK"], prune_configs_by=PRUNE)
@triton.jit
def backward_kernel(
    x, dt, A, B, C, D, z, bias, states, dy, dfinal,
    dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial,
    x_batch, x_token, dt_batch, dt_token, B_batch, B_token, C_batch, C_token, z_batch, z_token, dy_batch, dy_token,
    length: "i32", channels: "i32", chunks: "i32",
    N: tl.constexpr, SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK channels of a row: all gradients; dB and dC (b, programs, l, n) are its own parts."""
    d, row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    t, n = tl.arange(0, CHUNK), tl.arange(0, BLOCK_N)
    in_d, in_n = d < channels, n < N
    in_state, at_state = in_d[:, None] & in_n[None, :], d[:, None] * N + n[None, :]
    rates = tl.load(A + at_state, in_state, 0.0).to(tl.float32) * LOG2E
    shift, skip = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        shift = tl.load(bias + d, in_d, 0.0).to(tl.float32)
    if D is not None:
        skip = tl.load(D + d, in_d, 0.0).to(tl.float32)
    carried = tl.zeros([BLOCK, BLOCK_N], tl.float32)  # the gradient of the state after the chunk at hand
    if dfinal is not None:
        carried = tl.load(dfinal + row * channels * N + at_state, in_state, 0.0).to(tl.float32)
    sum_A = tl.zeros([BLOCK, BLOCK_N], tl.float32)
    sum_D, sum_bias = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    start = row * 0 + (chunks - 1) * CHUNK
    x += row * x_batch + start * x_token
    dt += row * dt_batch + start * dt_token
    B += row * B_batch + start * B_token
    C += row * C_batch + start * C_token
    dy += row * dy_batch + start * dy_token
    dx += (row * length + start) * channels
    ddt += (row * length + start) * channels
    if z is not None:
        z += row * z_batch + start * z_token
        dz += (row * length + start) * channels
    own = (row * tl.num_programs(0) + tl.program_id(0)) * length + start
    dB += own * N
    dC += own * N
    states += (row * chunks + chunks - 1) * channels * N
    left = length - (chunks - 1) * CHUNK
    for _ in range(times(chunks)):
        inside, inside_n = (t < left)[:, None] & in_d[None, :], (t < left)[:, None] & in_n[None, :]
        at, at_dt, at_B = t[:, None] * x_token + d[None, :], t[:, None] * dt_token + d[None, :], t[:, None] * B_token
        is_first, is_last = t[:, None, None] == 0, t[:, None, None] == CHUNK - 1
        xs = tl.load(x + at, inside, 0.0).to(tl.float32)
        Bs = tl.load(B + at_B + n[None, :], inside_n, 0.0).to(tl.float32)
        Cs = tl.load(C + t[:, None] * C_token + n[None, :], inside_n, 0.0).to(tl.float32)
        steps, slope = _steps(dt, at_dt, inside, shift[None, :], SOFTPLUS)
        decay = tl.exp2(steps[:, :, None] * rates[None, :, :])
        # The state before each token, by a scan of the tokens before: what is then left of it is not a difference.
        earlier, earlier_n = inside & (t > 0)[:, None], inside_n & (t > 0)[:, None]
        steps_before, _slope = _steps(dt, at_dt - dt_token, earlier, shift[None, :], SOFTPLUS)
        decay_before = tl.exp2(steps_before[:, :, None] * rates[None, :, :])
        drive = _drive(steps_before, x, B, at - x_token, at_B - B_token + n[None, :], earlier, earlier_n)
        state = tl.load(states + at_state, in_state, 0.0)
        drive += tl.where(is_first, state[None, :, :], 0.0)
        _all, before = tl.associative_scan((decay_before, drive), 0, _after)
        each = decay * before + (steps * xs)[:, :, None] * Bs[:, None, :]
        dys = tl.load(dy + t[:, None] * dy_token + d[None, :], inside, 0.0).to(tl.float32)
        at_out = t[:, None] * channels + d[None, :]
        if z is not None:
            gate = tl.load(z + t[:, None] * z_token + d[None, :], inside, 0.0).to(tl.float32)
            gate_sigmoid = sigmoid(gate)
            ys = tl.sum(each * Cs[:, None, :], 2) + skip[None, :] * xs
            dgate = dys * ys * gate_sigmoid * (1.0 + gate * (1.0 - gate_sigmoid))
            tl.store(dz + at_out, dgate.to(dz.dtype.element_ty), inside)
            dys *= gate * gate_sigmoid
            z -= CHUNK * z_token
            dz -= CHUNK * channels
        tl.store(dC + t[:, None] * N + n[None, :], tl.sum(dys[:, :, None] * each, 1), inside_n)
        later = (t + 1 < left)[:, None] & (t + 1 < CHUNK)[:, None] & in_d[None, :]
        steps_after, _slope = _steps(dt, at_dt + dt_token, later, shift[None, :], SOFTPLUS)
        decay_after = tl.exp2(steps_after[:, :, None] * rates[None, :, :])
        owed = dys[:, :, None] * Cs[:, None, :] + tl.where(is_last, carried[None, :, :], 0.0)
        _all, dstates = tl.associative_scan((decay_after, owed), 0, _after, reverse=True)
        carried = tl.sum(tl.where(is_first, decay * dstates, 0.0), 0)
        tl.store(dB + t[:, None] * N + n[None, :], tl.sum((steps * xs)[:, :, None] * dstates, 1), inside_n)
        ddriven = tl.sum(dstates * Bs[:, None, :], 2)
        dxs = ddriven * steps + dys * skip[None, :]
        tl.store(dx + at_out, dxs.to(dx.dtype.element_ty), inside)
        dlog = dstates * decay * before
        sum_A += tl.sum(dlog * steps[:, :, None], 0)
        dsteps = (ddriven * xs + tl.sum(dlog * rates[None, :, :], 2) / LOG2E) * slope
        tl.store(ddt + at_out, dsteps.to(ddt.dtype.element_ty), inside)
        sum_bias += tl.sum(tl.where(inside, dsteps, 0.0), 0)
        sum_D += tl.sum(dys * xs, 0)
        x -= CHUNK * x_token
        dt -= CHUNK * dt_token
        B -= CHUNK * B_token
        C -= CHUNK * C_token
        dy -= CHUNK * dy_token
        dx -= CHUNK * channels
        ddt -= CHUNK * channels
        dB -= CHUNK * N
        dC -= CHUNK * N
        states -= channels * N
        left += CHUNK
    tl.store(dA + row * channels * N + at_state, sum_A, in_state)
    if D is not None:
        tl.store(dD + row * channels + d, sum_D, in_d)
    if bias is not None:
        tl.store(dbias + row * channels + d, sum_bias, in_d)
    if dinitial is not None:
        tl.store(dinitial + row * channels * N + at_state, carried, in_state)
