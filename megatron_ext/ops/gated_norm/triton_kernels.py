"""Gated root-mean-square norm: one program for a group of channels of one token forward, of many tokens backward.

The group is in registers: 1024 channels are 8 a thread with 4 warps; for the largest groups there are more warps.
"""

import triton
import triton.language as tl

from megatron_ext.ops.triton_jit import sigmoid


@triton.jit
def _start(row, length, batch_stride, token_stride):
    """Where a token of one of the sequences begins."""
    return row // length * batch_stride + row % length * token_stride


@triton.jit
def norm_kernel(
    x, weight, z, y, scale, x_batch, x_token, z_batch, z_token, y_batch, y_token, length, eps,
    SIZE: tl.constexpr, GATE_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """norm(x) silu(z) or norm(x silu(z)) of one token and group; the reciprocal root mean square is kept."""
    row, group, groups = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    inside = tl.arange(0, BLOCK) < SIZE
    d = group * SIZE + tl.arange(0, BLOCK)
    value = tl.load(x + _start(row, length, x_batch, x_token) + d, inside, 0.0).to(tl.float32)
    if z is not None:
        gate = tl.load(z + _start(row, length, z_batch, z_token) + d, inside, 0.0).to(tl.float32)
        gate *= sigmoid(gate)
        if GATE_FIRST:
            value *= gate
    reciprocal = tl.rsqrt(tl.sum(value * value, 0) / SIZE + eps)
    value *= reciprocal * tl.load(weight + d, inside, 0.0).to(tl.float32)
    if z is not None and not GATE_FIRST:
        value *= gate
    tl.store(y + _start(row, length, y_batch, y_token) + d, value.to(y.dtype.element_ty), inside)
    tl.store(scale + row * groups + group, reciprocal)


@triton.jit
def norm_backward_kernel(
    x, weight, z, scale, dy, dx, dz, dweight,
    x_batch, x_token, z_batch, z_token, dy_batch, dy_token, dz_batch, dz_token, length, rows,
    SIZE: tl.constexpr, GATE_FIRST: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx and dz of RUN tokens and one group, and the sum over these tokens that makes dweight."""
    group, groups = tl.program_id(1), tl.num_programs(1)
    inside = tl.arange(0, BLOCK) < SIZE
    d = group * SIZE + tl.arange(0, BLOCK)
    factor = tl.load(weight + d, inside, 0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    row = tl.program_id(0).to(tl.int64) * RUN
    for _ in range(RUN):
        in_row = inside & (row < rows)
        xs = tl.load(x + _start(row, length, x_batch, x_token) + d, in_row, 0.0).to(tl.float32)
        dys = tl.load(dy + _start(row, length, dy_batch, dy_token) + d, in_row, 0.0).to(tl.float32)
        reciprocal = tl.load(scale + row * groups + group, row < rows, 0.0)
        value, dout = xs, dys
        if z is not None:
            gate = tl.load(z + _start(row, length, z_batch, z_token) + d, in_row, 0.0).to(tl.float32)
            gate_sigmoid = sigmoid(gate)
            if GATE_FIRST:
                value = xs * gate * gate_sigmoid
            else:
                dout = dys * gate * gate_sigmoid
        normed = value * reciprocal
        total += dout * normed
        dnormed = dout * factor
        dvalue = (dnormed - normed * (tl.sum(dnormed * normed, 0) / SIZE)) * reciprocal
        dxs = dvalue
        if z is not None:
            if GATE_FIRST:
                dgate = dvalue * xs
                dxs = dvalue * gate * gate_sigmoid
            else:
                dgate = dys * normed * factor
            dgate *= gate_sigmoid * (1.0 + gate * (1.0 - gate_sigmoid))
            tl.store(dz + _start(row, length, dz_batch, dz_token) + d, dgate.to(dz.dtype.element_ty), in_row)
        tl.store(dx + row * groups * SIZE + d, dxs.to(dx.dtype.element_ty), in_row)
        row += 1
    tl.store(dweight + tl.program_id(0).to(tl.int64) * groups * SIZE + d, total, inside)
