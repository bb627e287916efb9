"""The scan forward of each chunk by itself, with the state before it, which `states_kernel` has left behind.

`scan_kernel` multiplies C with B once for all heads of a group, keeps the product in registers, and gates y before it
is written.

Per token of a mixer of width 8192 (128 heads x 64, state 128, 8 groups, bf16, chunk 128): 52 KB to and from memory (84
with a gate, when y and the gated y are written). Compiled for Hopper it takes 160 to 174 registers a thread with 8
warps: B C^T and the weights of a head are 128 x 64 float32 each, y and what it owes to the state 64 x 64.

Where a row of tokens is addressed, the offset of its first token is 64 bits wide; within a chunk 32 bits do.
"""

import triton
import triton.language as tl

from megatron_ext.ops.triton_jit import PRUNE, configs, dot, sigmoid


@triton.autotune(
    configs=configs((8, 2), (4, 2), (8, 1), (4, 3)),
    key=["HEADS", "GROUP", "P", "N", "HEADS_PER_PROGRAM", "CHUNK", "ROWS", "BLOCK_P", "BLOCK_N"],
    prune_configs_by=PRUNE,
)
@triton.jit
def scan_kernel(
    x, B, C, D, z, step, total, doc, states,
    y, out,
    x_batch, x_token, B_batch, B_token, C_batch, C_token, z_batch, z_token,
    length: "i32", chunks: "i32",
    HEADS: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr, HEADS_PER_PROGRAM: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program for ROWS tokens of a chunk and some heads of a group: y, and with a gate also y silu(z)."""
    chunk, part = tl.program_id(0) // (CHUNK // ROWS), tl.program_id(0) % (CHUNK // ROWS)
    first, row = tl.program_id(1) * HEADS_PER_PROGRAM, tl.program_id(2).to(tl.int64)
    start = (chunk * CHUNK).to(tl.int64)
    left = length - chunk * CHUNK
    targets, sources = part * ROWS + tl.arange(0, ROWS), tl.arange(0, CHUNK)
    n, p = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    in_n, in_p, in_target, in_source = n < N, p < P, targets < left, sources < left

    C += row * C_batch + start * C_token + first // GROUP * N
    B += row * B_batch + start * B_token + first // GROUP * N
    Cs = tl.load(C + targets[:, None] * C_token + n[None, :], in_target[:, None] & in_n[None, :], 0.0)
    Bs = tl.load(B + sources[:, None] * B_token + n[None, :], in_source[:, None] & in_n[None, :], 0.0)
    reached = sources[:, None] <= targets[None, :]
    if doc is not None:
        doc += row * CHUNK * chunks + start
        target_doc = tl.load(doc + targets)
        reached &= tl.load(doc + sources)[:, None] == target_doc[None, :]
        carries = target_doc == tl.load(doc + tl.where(chunk > 0, -1, 0))
    BC = tl.where(reached, dot(Bs, tl.trans(Cs)), 0.0)

    x += row * x_batch + start * x_token + first * P
    at_step = (row * HEADS + first) * CHUNK * chunks + start
    step += at_step
    total += at_step
    states += ((row * chunks + chunk) * HEADS + first) * N * P
    at_x = targets[:, None] * x_token + p[None, :]
    in_x = in_target[:, None] & in_p[None, :]
    at_y = targets[:, None] * (HEADS * P) + p[None, :]
    at_row = (row * length + start) * (HEADS * P) + first * P
    if y is not None:
        y += at_row
    if z is not None:
        z += row * z_batch + start * z_token + first * P
        out += at_row
    for head in range(HEADS_PER_PROGRAM):
        own_sums = tl.load(total + targets)
        exponents = tl.minimum(own_sums[None, :] - tl.load(total + sources)[:, None], 0.0)
        weights = BC * tl.exp2(exponents) * tl.load(step + sources)[:, None]
        xs = tl.load(x + sources[:, None] * x_token + p[None, :], in_source[:, None] & in_p[None, :], 0.0)
        state = tl.load(states + n[:, None] * P + p[None, :], in_n[:, None] & in_p[None, :], 0.0)
        decay = tl.exp2(own_sums)
        if doc is not None:
            decay = tl.where(carries, decay, 0.0)
        within = dot(tl.trans(xs), weights.to(xs.dtype))
        before = dot(tl.trans(state), tl.trans(Cs))
        # not a sum: Triton would chain the two products in one accumulator, which up to 3.8 it miscompiles on Blackwell
        ys = tl.trans(tl.fma(before, tl.broadcast_to(decay[None, :], before.shape), within))
        if D is not None:
            skip = tl.load(D + (first + head) * P + p, in_p, 0.0)
            ys += skip[None, :] * tl.load(x + at_x, in_x, 0.0).to(tl.float32)
        if y is not None:
            tl.store(y + at_y, ys.to(y.dtype.element_ty), in_x)
        if z is not None:
            gate = tl.load(z + targets[:, None] * z_token + p[None, :], in_x, 0.0).to(tl.float32)
            tl.store(out + at_y, (ys * gate * sigmoid(gate)).to(out.dtype.element_ty), in_x)
            z += P
            out += P
        if y is not None:
            y += P
        x += P
        step += CHUNK * chunks
        total += CHUNK * chunks
        states += N * P
