"""The scan forward of each chunk by itself, with the state before it, which `states_kernel` has left behind.

`scan_kernel` multiplies C with B once for all heads of a group, keeps the product in registers, and gates y before it
is written.

Per token of a mixer of width 8192 (128 heads x 64, state 128, 8 groups, bf16, chunk 128): 52 KB to and from memory (84
with a gate, when y and the gated y are written). Compiled for Hopper it takes 147 to 167 registers a thread with 8
warps: B C^T and the weights of a head are 128 x 64 float32 each, y and what it owes to the state 64 x 64.

Where a row of tokens is addressed, the offset of its first token is 64 bits wide; within a chunk 32 bits do.
"""

import triton
import triton.language as tl

from megatron_ext.ops.triton_jit import PRUNE, configs, dot, sigmoid


@triton.jit
def _targets(
    x, B, C, D, z, step, total, doc, states,
    y, out,
    x_token, B_token, C_token, z_token, y_token, left, per_head, before_doc,
    P: tl.constexpr, N: tl.constexpr, HEADS_PER_PROGRAM: tl.constexpr,
    PART: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y of ROWS tokens i: what they hear of tokens j of the chunk, none of them later, and of the state before it."""
    i, j = PART * ROWS + tl.arange(0, ROWS), tl.arange(0, (PART + 1) * ROWS)
    n, p = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    in_n, in_p, in_i, in_j = n < N, p < P, i < left, j < left
    in_x = in_i[:, None] & in_p[None, :]
    Cs = tl.load(C + i[:, None] * C_token + n[None, :], in_i[:, None] & in_n[None, :], 0.0)
    Bs = tl.load(B + j[:, None] * B_token + n[None, :], in_j[:, None] & in_n[None, :], 0.0)
    reached, carries = j[:, None] <= i[None, :], i >= 0
    if doc is not None:
        own_doc = tl.load(doc + i)
        reached &= tl.load(doc + j)[:, None] == own_doc[None, :]
        carries = own_doc == before_doc
    BC = tl.where(reached, dot(Bs, tl.trans(Cs)), 0.0)
    for head in range(HEADS_PER_PROGRAM):
        if D is not None:  # loaded long before it is used, as no pipeline does it
            own_xs = tl.load(x + i[:, None] * x_token + p[None, :], in_x, 0.0)
            skip = tl.load(D + head * P + p, in_p, 0.0)
        if z is not None:
            gates = tl.load(z + i[:, None] * z_token + p[None, :], in_x, 0.0)
        own_sums = tl.load(total + i)
        exponents = tl.minimum(own_sums[None, :] - tl.load(total + j)[:, None], 0.0)
        weights = BC * tl.exp2(exponents) * tl.load(step + j)[:, None]
        xs = tl.load(x + j[:, None] * x_token + p[None, :], in_j[:, None] & in_p[None, :], 0.0)
        state = tl.load(states + n[:, None] * P + p[None, :], in_n[:, None] & in_p[None, :], 0.0)
        decay = tl.where(carries, tl.exp2(own_sums), 0.0)
        within = dot(tl.trans(xs), weights.to(xs.dtype))
        before = dot(tl.trans(state), tl.trans(Cs))
        # not a sum: Triton would chain the two products in one accumulator, which up to 3.8 it miscompiles on Blackwell
        ys = tl.trans(tl.fma(before, tl.broadcast_to(decay[None, :], before.shape), within))
        if D is not None:
            ys += skip[None, :] * own_xs.to(tl.float32)
        if y is not None:
            tl.store(y + i[:, None] * y_token + p[None, :], ys.to(y.dtype.element_ty), in_x)
            y += P
        if z is not None:
            gate = gates.to(tl.float32)
            gated = (ys * gate * sigmoid(gate)).to(out.dtype.element_ty)
            tl.store(out + i[:, None] * y_token + p[None, :], gated, in_x)
            z += P
            out += P
        x += P
        step += per_head
        total += per_head
        states += N * P


@triton.autotune(
    configs=configs((8, 2), (4, 2), (8, 3), (8, 1)),
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
    PARTS: tl.constexpr = CHUNK // ROWS
    tl.static_assert(PARTS <= 2)
    chunk, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    first, row = tl.program_id(1) * HEADS_PER_PROGRAM, tl.program_id(2).to(tl.int64)
    start, left = (chunk * CHUNK).to(tl.int64), length - chunk * CHUNK
    per_head = CHUNK * chunks
    C += row * C_batch + start * C_token + first // GROUP * N
    B += row * B_batch + start * B_token + first // GROUP * N
    x += row * x_batch + start * x_token + first * P
    at_step = (row * HEADS + first) * per_head + start
    step += at_step
    total += at_step
    states += ((row * chunks + chunk) * HEADS + first) * N * P
    at_row = (row * length + start) * (HEADS * P) + first * P
    before_doc = 0
    if doc is not None:
        doc += row * per_head + start
        before_doc = tl.load(doc + tl.where(chunk > 0, -1, 0))
    if D is not None:
        D += first * P
    if y is not None:
        y += at_row
    if z is not None:
        z += row * z_batch + start * z_token + first * P
        out += at_row
    if part == PARTS - 1:
        _targets(
            x, B, C, D, z, step, total, doc, states, y, out,
            x_token, B_token, C_token, z_token, HEADS * P, left, per_head, before_doc,
            P, N, HEADS_PER_PROGRAM, PARTS - 1, ROWS, BLOCK_P, BLOCK_N,
        )  # fmt: skip
    elif PARTS > 1:
        _targets(
            x, B, C, D, z, step, total, doc, states, y, out,
            x_token, B_token, C_token, z_token, HEADS * P, left, per_head, before_doc,
            P, N, HEADS_PER_PROGRAM, 0, ROWS, BLOCK_P, BLOCK_N,
        )  # fmt: skip
