"""The causal convolution: each program walks a run of tokens with the last inputs in registers.

So each input is read once and each activation computed once, forward (40 KB a token at 10,240 channels, bf16) and
backward (60 KB): what lies under the activation is computed again, walking backwards. Always four taps: weights of
fewer are led by zeros. Tokens go four at a time, whose inputs are asked for before the first of them is worked on:
a store could overwrite what a later load reads, as far as a compiler knows, so that loads of the next token would wait
for it, and one load at a time does not keep the memory busy.
"""

import triton
import triton.language as tl

from megatron_ext.ops.triton_jit import sigmoid
from megatron_ext.ops.triton_tiles import MAX_TAPS

TAPS: tl.constexpr = tl.constexpr(MAX_TAPS)


@triton.jit
def _tap(weight, d, in_d, back, WIDTH: tl.constexpr):
    """The weight of the input `back` tokens ago."""
    if back < WIDTH:
        return tl.load(weight + d * WIDTH + (WIDTH - 1 - back), in_d, 0.0).to(tl.float32)
    return tl.zeros(d.shape, tl.float32)


@triton.jit
def _input(x, past, x_token, t, d, in_d, length, D: tl.constexpr, WIDTH: tl.constexpr):
    """Input t of a row, of its past where t < 0, or zero; `x` points to token 0, `t` is 64 bits wide."""
    value = tl.load(x + t * x_token + d, in_d & (t >= 0) & (t < length), 0.0).to(tl.float32)
    if past is not None:
        value += tl.load(past + (t + WIDTH - 1) * D + d, in_d & (t < 0) & (t + WIDTH > 0), 0.0).to(tl.float32)
    return value


@triton.jit
def _document(seq_idx, t, length):
    """The document of token t; outside of the row one that no token belongs to."""
    return tl.load(seq_idx + t, (t >= 0) & (t < length), -2147483648)


@triton.jit
def _output(y, y_token, seq_idx, t, d, in_d, length, shift, w0, w1, w2, w3, x0, x1, x2, x3, SILU: tl.constexpr):
    """Write y of token t from its input x0 and those before it."""
    if seq_idx is not None:
        document = _document(seq_idx, t, length)
        value = shift + w0 * x0
        value += tl.where(_document(seq_idx, t - 1, length) == document, w1 * x1, 0.0)
        value += tl.where(_document(seq_idx, t - 2, length) == document, w2 * x2, 0.0)
        value += tl.where(_document(seq_idx, t - 3, length) == document, w3 * x3, 0.0)
    else:
        value = shift + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
    if SILU:
        value *= sigmoid(value)
    tl.store(y + t * y_token + d, value.to(y.dtype.element_ty), in_d & (t < length))


@triton.jit
def conv_kernel(
    x, past, weight, bias, seq_idx, y,
    x_batch, x_token, y_batch, y_token, length: "i32",
    D: tl.constexpr, WIDTH: tl.constexpr, SILU: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for RUN tokens and BLOCK channels of a row."""
    d, row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(2).to(tl.int64)
    in_d = d < D
    t = tl.program_id(1).to(tl.int64) * RUN
    x += row * x_batch
    y += row * y_batch
    if past is not None:
        past += row * (WIDTH - 1) * D
    if seq_idx is not None:
        seq_idx += row * length
    w0, w1 = _tap(weight, d, in_d, 0, WIDTH), _tap(weight, d, in_d, 1, WIDTH)
    w2, w3 = _tap(weight, d, in_d, 2, WIDTH), _tap(weight, d, in_d, 3, WIDTH)
    x1 = _input(x, past, x_token, t - 1, d, in_d, length, D, WIDTH)
    x2 = _input(x, past, x_token, t - 2, d, in_d, length, D, WIDTH)
    x3 = _input(x, past, x_token, t - 3, d, in_d, length, D, WIDTH)
    shift = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        shift = tl.load(bias + d, in_d, 0.0).to(tl.float32)
    for _ in range(RUN // 4):
        a0 = _input(x, past, x_token, t, d, in_d, length, D, WIDTH)
        a1 = _input(x, past, x_token, t + 1, d, in_d, length, D, WIDTH)
        a2 = _input(x, past, x_token, t + 2, d, in_d, length, D, WIDTH)
        a3 = _input(x, past, x_token, t + 3, d, in_d, length, D, WIDTH)
        _output(y, y_token, seq_idx, t, d, in_d, length, shift, w0, w1, w2, w3, a0, x1, x2, x3, SILU)
        _output(y, y_token, seq_idx, t + 1, d, in_d, length, shift, w0, w1, w2, w3, a1, a0, x1, x2, SILU)
        _output(y, y_token, seq_idx, t + 2, d, in_d, length, shift, w0, w1, w2, w3, a2, a1, a0, x1, SILU)
        _output(y, y_token, seq_idx, t + 3, d, in_d, length, shift, w0, w1, w2, w3, a3, a2, a1, a0, SILU)
        x3 = a1
        x2 = a2
        x1 = a3
        t += 4


@triton.jit
def _given(dy, dy_token, t, d, in_d, length):
    """The gradient of y of token t, or zero."""
    return tl.load(dy + t * dy_token + d, in_d & (t >= 0) & (t < length), 0.0).to(tl.float32)


@triton.jit
def _gradients(
    dx, dpast, seq_idx, dx_token, start, t, d, in_d, length, shift, w0, w1, w2, w3,
    x0, x1, x2, x3, z0, z1, z2, z3, sum0, sum1, sum2, sum3, sum_bias,
    D: tl.constexpr, WIDTH: tl.constexpr, SILU: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Write dx of token t; its gradient under the activation, and the sums with what it adds to them.

    x0 to x3 are the inputs of t to t - 3, z0 the gradient of y, z1 to z3 those under the activation of t + 1 to t + 3.
    """
    y1, y2, y3 = w1 * x1, w2 * x2, w3 * x3
    to1, to2, to3 = z1, z2, z3
    by1, by2, by3 = x1, x2, x3
    if seq_idx is not None:
        document = _document(seq_idx, t, length)
        same1 = _document(seq_idx, t - 1, length) == document
        same2 = _document(seq_idx, t - 2, length) == document
        same3 = _document(seq_idx, t - 3, length) == document
        y1, by1 = tl.where(same1, y1, 0.0), tl.where(same1, x1, 0.0)
        y2, by2 = tl.where(same2, y2, 0.0), tl.where(same2, x2, 0.0)
        y3, by3 = tl.where(same3, y3, 0.0), tl.where(same3, x3, 0.0)
        to1 = tl.where(_document(seq_idx, t + 1, length) == document, z1, 0.0)
        to2 = tl.where(_document(seq_idx, t + 2, length) == document, z2, 0.0)
        to3 = tl.where(_document(seq_idx, t + 3, length) == document, z3, 0.0)
    if SILU:
        value = shift + w0 * x0 + y1 + y2 + y3
        value_sigmoid = sigmoid(value)
        z0 *= value_sigmoid * (1.0 + value * (1.0 - value_sigmoid))
    dxs = w0 * z0 + w1 * to1 + w2 * to2 + w3 * to3
    in_run = (t >= start) & (t < start + RUN)
    tl.store(dx + t * dx_token + d, dxs.to(dx.dtype.element_ty), in_d & in_run & (t < length))
    if dpast is not None:
        before = (start == 0) & (t < 0) & (t + WIDTH > 0)
        tl.store(dpast + (t + WIDTH - 1) * D + d, dxs.to(dpast.dtype.element_ty), in_d & before)
    z = tl.where(in_run, z0, 0.0)
    return z0, sum0 + z * x0, sum1 + z * by1, sum2 + z * by2, sum3 + z * by3, sum_bias + z


@triton.jit
def conv_backward_kernel(
    x, past, weight, bias, seq_idx, dy, dx, dpast, dweight, dbias,
    x_batch, x_token, dy_batch, dy_token, dx_batch, dx_token, length: "i32",
    D: tl.constexpr, WIDTH: tl.constexpr, SILU: tl.constexpr, RUN: tl.constexpr, STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for RUN tokens and BLOCK channels of a row, walking backwards from three tokens after the run.

    dx of token t gathers what the gradients under the activation of t to t + 3 owe to it. With an initial state there
    are three STEPS more: in the first run they are the tokens before the row. STEPS are a multiple of four. Sums over
    tokens are written per program.
    """
    d, row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(2).to(tl.int64)
    in_d = d < D
    start = tl.program_id(1).to(tl.int64) * RUN
    x += row * x_batch
    dy += row * dy_batch
    dx += row * dx_batch
    if past is not None:
        past += row * (WIDTH - 1) * D
        dpast += row * (WIDTH - 1) * D
    if seq_idx is not None:
        seq_idx += row * length
    w0, w1 = _tap(weight, d, in_d, 0, WIDTH), _tap(weight, d, in_d, 1, WIDTH)
    w2, w3 = _tap(weight, d, in_d, 2, WIDTH), _tap(weight, d, in_d, 3, WIDTH)
    shift = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        shift = tl.load(bias + d, in_d, 0.0).to(tl.float32)
    t = start + RUN + TAPS - 2
    x0 = _input(x, past, x_token, t, d, in_d, length, D, WIDTH)
    x1 = _input(x, past, x_token, t - 1, d, in_d, length, D, WIDTH)
    x2 = _input(x, past, x_token, t - 2, d, in_d, length, D, WIDTH)
    # Gradients under the activation of t + 1, t + 2 and t + 3. Each has a zero of its own: Triton takes a name that a
    # loop sets to another name's very value for one that the loop does not change.
    z1, z2, z3 = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    zero = tl.zeros([BLOCK], tl.float32)
    sum0, sum1, sum2, sum3, sum_bias = zero, zero, zero, zero, zero
    for _ in range(STEPS // 4):
        a0 = _input(x, past, x_token, t - 3, d, in_d, length, D, WIDTH)
        a1 = _input(x, past, x_token, t - 4, d, in_d, length, D, WIDTH)
        a2 = _input(x, past, x_token, t - 5, d, in_d, length, D, WIDTH)
        a3 = _input(x, past, x_token, t - 6, d, in_d, length, D, WIDTH)
        g0 = _given(dy, dy_token, t, d, in_d, length)
        g1 = _given(dy, dy_token, t - 1, d, in_d, length)
        g2 = _given(dy, dy_token, t - 2, d, in_d, length)
        g3 = _given(dy, dy_token, t - 3, d, in_d, length)
        n0, sum0, sum1, sum2, sum3, sum_bias = _gradients(
            dx, dpast, seq_idx, dx_token, start, t, d, in_d, length, shift, w0, w1, w2, w3,
            x0, x1, x2, a0, g0, z1, z2, z3, sum0, sum1, sum2, sum3, sum_bias, D, WIDTH, SILU, RUN,
        )  # fmt: skip
        n1, sum0, sum1, sum2, sum3, sum_bias = _gradients(
            dx, dpast, seq_idx, dx_token, start, t - 1, d, in_d, length, shift, w0, w1, w2, w3,
            x1, x2, a0, a1, g1, n0, z1, z2, sum0, sum1, sum2, sum3, sum_bias, D, WIDTH, SILU, RUN,
        )  # fmt: skip
        n2, sum0, sum1, sum2, sum3, sum_bias = _gradients(
            dx, dpast, seq_idx, dx_token, start, t - 2, d, in_d, length, shift, w0, w1, w2, w3,
            x2, a0, a1, a2, g2, n1, n0, z1, sum0, sum1, sum2, sum3, sum_bias, D, WIDTH, SILU, RUN,
        )  # fmt: skip
        n3, sum0, sum1, sum2, sum3, sum_bias = _gradients(
            dx, dpast, seq_idx, dx_token, start, t - 3, d, in_d, length, shift, w0, w1, w2, w3,
            a0, a1, a2, a3, g3, n2, n1, n0, sum0, sum1, sum2, sum3, sum_bias, D, WIDTH, SILU, RUN,
        )  # fmt: skip
        x0 = a1
        x1 = a2
        x2 = a3
        z3 = n1
        z2 = n2
        z1 = n3
        t -= 4
    out = row * tl.num_programs(1) + tl.program_id(1)
    dweight += out * D * WIDTH + d * WIDTH + WIDTH - 1
    tl.store(dweight, sum0, in_d)
    if WIDTH > 1:
        tl.store(dweight - 1, sum1, in_d)
    if WIDTH > 2:
        tl.store(dweight - 2, sum2, in_d)
    if WIDTH > 3:
        tl.store(dweight - 3, sum3, in_d)
    if bias is not None:
        tl.store(dbias + out * D + d, sum_bias, in_d)


@triton.jit
def conv_step_kernel(
    x, window, weight, bias, slots, y, x_row, window_row,
    D: tl.constexpr, WIDTH: tl.constexpr, HELD: tl.constexpr, SILU: tl.constexpr, TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The convolution of a token, and the window (slots, D, HELD) moved on by it; HELD >= WIDTH - 1."""
    row = tl.program_id(1).to(tl.int64)
    slot = row
    if slots is not None:
        slot = tl.load(slots + row).to(tl.int64)
    d, k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, TAPS)
    in_d = d < D
    window += slot * window_row + d[:, None] * HELD
    new = tl.load(x + row * x_row + d, in_d, 0.0)
    later = tl.load(window + k[None, :] + 1, in_d[:, None] & (k[None, :] < HELD - 1), 0.0)
    moved = tl.where(k[None, :] == HELD - 1, new[:, None].to(later.dtype), later)  # the last HELD inputs
    if WIDTH <= HELD:
        taps = tl.load(
            weight + d[:, None] * WIDTH + k[None, :] - (HELD - WIDTH),
            in_d[:, None] & (k[None, :] >= HELD - WIDTH) & (k[None, :] < HELD), 0.0,
        ).to(tl.float32)  # fmt: skip
        value = tl.sum(taps * moved.to(tl.float32), 1)
    else:  # the window holds WIDTH - 1 inputs, and the oldest leaves it now
        taps = tl.load(weight + d[:, None] * WIDTH + k[None, :] + 1, in_d[:, None] & (k[None, :] < HELD), 0.0)
        value = tl.sum(taps.to(tl.float32) * moved.to(tl.float32), 1)
        oldest = tl.load(window + k[None, :], in_d[:, None] & (k[None, :] == 0), 0.0).to(tl.float32)
        value += tl.sum(oldest, 1) * tl.load(weight + d * WIDTH, in_d, 0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + d, in_d, 0.0).to(tl.float32)
    if SILU:
        value *= sigmoid(value)
    tl.debug_barrier()  # no thread writes the window before all have read it
    tl.store(window + k[None, :], moved, in_d[:, None] & (k[None, :] < HELD))
    tl.store(y + row * D + d, value.to(y.dtype.element_ty), in_d)
