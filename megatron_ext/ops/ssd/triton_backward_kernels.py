"""The scan backward of each chunk by itself: dx, dB, dC, dD and what the gradient of the decays consists of.

A program of `scan_backward_kernel` loops over the heads of a group, so that dB and dC, sums over these heads, are in
registers until they are whole and are written once, without atomics; so is the gradient of C B^T, whose product with B
and C is taken once for all heads. The programs come in pairs on the same tokens, one that takes them as targets (dC)
and one that takes them as sources (dx, dB): both at once would not fit the registers. Neighbours in time, they find
what they share in the L2 cache. A chunk is two blocks of tokens at most: no token hears a later one, so targets in the
first block and sources in the second have pairs in their own block alone, and programs compiled for that.

Tiles lie such that sums over one side stay within a warp where they can, and that every operand of a product that is
computed is the second one, which comes from shared memory: ptxas before 13.3 may overwrite a first one in registers
before the matrix unit has read it. (Of float32 the parts that TF32 takes are made in registers all the same.)

Per token of a mixer of width 8192 (128 heads x 64, state 128, 8 groups, bf16, chunk 128): 90 KB to and from memory, the
published kernels 433 KB. For sources of the first block three float32 tiles of 128 x 64 are kept over the heads and
two are made for each head: with 8 warps all 255 registers of a thread, and 184 bytes that spill to L1 (up to 256 with
documents). Nearly nothing does for the others. The order of the products in the loops is the one that spills least.
With two stages the tiles of a head are asked for when those of the head before it are done with; with three they are on
their way meanwhile, which takes 182 KB of shared memory instead of 140, and only an H100 has.

The gradient of a log-decay is a sum over pairs of tokens around it. Here each token's row sum of the pairs' float32
terms is written; the same terms make both sums, so what must cancel does (`decay_backward_kernel` takes it on).
"""

# Names that exist only where there are documents, which is known when a kernel is compiled.
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false

import triton
import triton.language as tl

from megatron_ext.ops.triton_jit import PRUNE, configs, dot


@triton.jit
def _targets(
    x, B, C, dy, step, total, doc, states,
    dC, target, source,
    x_token, B_token, C_token, dy_token, dC_token, left, per_head, before,
    P: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dC of ROWS tokens i: what they read from tokens j of the chunk, none of them later, and from the state before it.

    Tiles are (j, i) and (i, state).
    """
    HEARD: tl.constexpr = (PART + 1) * ROWS
    i, j = PART * ROWS + tl.arange(0, ROWS), tl.arange(0, HEARD)
    n, p = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    in_i, in_j, in_n, in_p = i < left, j < left, n < N, p < P
    own_C = tl.load(C + i[:, None] * C_token + n[None, :], in_i[:, None] & in_n[None, :], 0.0)
    all_B = tl.load(B + j[:, None] * B_token + n[None, :], in_j[:, None] & in_n[None, :], 0.0)
    reached, carries = j[:, None] <= i[None, :], i >= 0
    if doc is not None:
        own_doc = tl.load(doc + i)
        reached &= tl.load(doc + j)[:, None] == own_doc[None, :]
        carries = own_doc == before
    BC = tl.where(reached, dot(all_B, tl.trans(own_C)), 0.0)
    dBC = tl.zeros([HEARD, ROWS], tl.float32)
    dCs = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for _ in range(GROUP):
        dys = tl.load(dy + i[:, None] * dy_token + p[None, :], in_i[:, None] & in_p[None, :], 0.0)
        xs = tl.load(x + j[:, None] * x_token + p[None, :], in_j[:, None] & in_p[None, :], 0.0)
        state = tl.load(states + n[:, None] * P + p[None, :], in_n[:, None] & in_p[None, :], 0.0)
        own_sums, sums, steps = tl.load(total + i), tl.load(total + j), tl.load(step + j)[:, None]
        weights = dot(xs, tl.trans(dys))
        weights *= tl.exp2(tl.minimum(own_sums[None, :] - sums[:, None], 0.0))
        pairs = weights * BC
        dBC += weights * steps
        tl.store(source + j, tl.sum(pairs, 1))
        by_state = dot(dys, tl.trans(state)) * tl.where(carries, tl.exp2(own_sums), 0.0)[:, None]
        dCs += by_state
        read = tl.sum(by_state * own_C.to(tl.float32), 1)
        tl.store(target + i, tl.sum(pairs * steps, 0) + read)
        x += P
        dy += P
        states += N * P
        step += per_head
        total += per_head
        target += per_head
        source += per_head * PARTS
    dCs += tl.trans(dot(tl.trans(all_B), tl.where(reached, dBC, 0.0).to(all_B.dtype)))
    tl.store(dC + i[:, None] * dC_token + n[None, :], dCs.to(dC.dtype.element_ty), in_i[:, None] & in_n[None, :])


@triton.jit
def _sources(
    x, B, C, D, dy, step, total, doc, dstates,
    dx, dB, dD, arriving,
    x_token, B_token, C_token, dy_token, dx_token, dB_token, left, per_head, after_doc,
    P: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx and dB of ROWS tokens j: what they give to tokens i of the chunk, none of them earlier, and to its last state.

    Tiles are (i, j), (j, state) and (j, channels).
    """
    HEARING: tl.constexpr = (PARTS - PART) * ROWS
    j, i = PART * ROWS + tl.arange(0, ROWS), PART * ROWS + tl.arange(0, HEARING)
    n, p = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    in_j, in_i, in_n, in_p = j < left, i < left, n < N, p < P
    in_x, in_state = in_j[:, None] & in_p[None, :], in_n[:, None] & in_p[None, :]
    own_B = tl.load(B + j[:, None] * B_token + n[None, :], in_j[:, None] & in_n[None, :], 0.0)
    all_C = tl.load(C + i[:, None] * C_token + n[None, :], in_i[:, None] & in_n[None, :], 0.0)
    reached, leaves = i[:, None] >= j[None, :], j >= 0
    if doc is not None:
        own_doc = tl.load(doc + j)
        reached &= tl.load(doc + i)[:, None] == own_doc[None, :]
        leaves = own_doc == after_doc
    CB = tl.where(reached, dot(all_C, tl.trans(own_B)), 0.0)
    dCB = tl.zeros([HEARING, ROWS], tl.float32)
    dBs = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for _ in range(GROUP):
        xs = tl.load(x + j[:, None] * x_token + p[None, :], in_x, 0.0)
        dys = tl.load(dy + i[:, None] * dy_token + p[None, :], in_i[:, None] & in_p[None, :], 0.0)
        dstate = tl.load(dstates + n[:, None] * P + p[None, :], in_state, 0.0)
        if D is not None:  # loaded long before it is used, as no pipeline does it
            own_dys = tl.load(dy + j[:, None] * dy_token + p[None, :], in_x, 0.0)
            skip = tl.load(D + p, in_p, 0.0)
        own_sums, steps, last = tl.load(total + j), tl.load(step + j), tl.load(total + PARTS * ROWS - 1)
        sums = tl.load(total + i)
        products = dot(dys, tl.trans(xs))
        weights = tl.exp2(tl.minimum(sums[:, None] - own_sums[None, :], 0.0))
        dCB += weights * products * steps[None, :]
        within = dot(tl.trans(dys), (weights * CB).to(dys.dtype))
        to_end = tl.where(leaves, tl.exp2(last - own_sums), 0.0)
        after = dot(own_B, dstate)
        tl.store(arriving + j, tl.sum(after * xs.to(tl.float32), 1) * to_end)
        dxs = tl.fma(after, tl.broadcast_to(to_end[:, None], after.shape), tl.trans(within)) * steps[:, None]
        if D is not None:
            dy_j = own_dys.to(tl.float32)
            dxs += skip[None, :] * dy_j
            tl.store(dD + p, tl.sum(dy_j * xs.to(tl.float32), 0), in_p)
            D += P
            dD += P
        tl.store(dx + j[:, None] * dx_token + p[None, :], dxs.to(dx.dtype.element_ty), in_x)
        dBs += dot(xs, tl.trans(dstate)) * (to_end * steps)[:, None]
        x += P
        dy += P
        dx += P
        dstates += N * P
        step += per_head
        total += per_head
        arriving += per_head
    dBs += tl.trans(dot(tl.trans(all_C), tl.where(reached, dCB, 0.0).to(all_C.dtype)))
    tl.store(dB + j[:, None] * dB_token + n[None, :], dBs.to(dB.dtype.element_ty), in_j[:, None] & in_n[None, :])


@triton.autotune(
    configs=configs((8, 2), (8, 3), (8, 4)),
    key=["HEADS", "GROUP", "P", "N", "CHUNK", "ROWS", "BLOCK_P", "BLOCK_N"],
    prune_configs_by=PRUNE,
)
@triton.jit
def scan_backward_kernel(
    x, B, C, D, dy, step, total, doc, states, dstates,
    dx, dB, dC, dD, target, source, arriving,
    x_batch, x_token, B_batch, B_token, C_batch, C_token, dy_batch, dy_token,
    dx_batch, dx_token, dB_batch, dB_token, dC_batch, dC_token,
    length: "i32", chunks: "i32",
    HEADS: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program for ROWS tokens of a chunk and all heads of a group, as targets (even programs) or sources (odd)."""
    PARTS: tl.constexpr = CHUNK // ROWS
    tl.static_assert(PARTS <= 2)
    role, place = tl.program_id(0) % 2, tl.program_id(0) // 2
    chunk, part = place // PARTS, place % PARTS
    group, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    start, left = (chunk * CHUNK).to(tl.int64), length - chunk * CHUNK
    first, per_head = group * GROUP, CHUNK * chunks

    x += row * x_batch + start * x_token + first * P
    dy += row * dy_batch + start * dy_token + first * P
    B += row * B_batch + start * B_token + group * N
    C += row * C_batch + start * C_token + group * N
    at_step = (row * HEADS + first) * per_head + start
    at_state = ((row * chunks + chunk) * HEADS + first) * N * P
    step += at_step
    total += at_step
    before, after = 0, 0
    if doc is not None:
        doc += row * per_head + start
        before, after = tl.load(doc + tl.where(chunk > 0, -1, 0)), tl.load(doc + CHUNK - 1)
    if role == 0:
        states += at_state
        dC += row * dC_batch + start * dC_token + group * N
        target += at_step
        source += (row * HEADS + first) * per_head * PARTS + part * per_head + start
        if part == PARTS - 1:
            _targets(
                x, B, C, dy, step, total, doc, states, dC, target, source,
                x_token, B_token, C_token, dy_token, dC_token, left, per_head, before,
                P, N, GROUP, PARTS, PARTS - 1, ROWS, BLOCK_P, BLOCK_N,
            )  # fmt: skip
        elif PARTS > 1:
            _targets(
                x, B, C, dy, step, total, doc, states, dC, target, source,
                x_token, B_token, C_token, dy_token, dC_token, left, per_head, before,
                P, N, GROUP, PARTS, 0, ROWS, BLOCK_P, BLOCK_N,
            )  # fmt: skip
    else:
        dstates += at_state
        dx += row * dx_batch + start * dx_token + first * P
        dB += row * dB_batch + start * dB_token + group * N
        arriving += at_step
        if D is not None:
            D += first * P
            dD += ((row * chunks * PARTS + place) * HEADS + first) * P
        if part == PARTS - 1:
            _sources(
                x, B, C, D, dy, step, total, doc, dstates, dx, dB, dD, arriving,
                x_token, B_token, C_token, dy_token, dx_token, dB_token, left, per_head, after,
                P, N, GROUP, PARTS, PARTS - 1, ROWS, BLOCK_P, BLOCK_N,
            )  # fmt: skip
        elif PARTS > 1:
            _sources(
                x, B, C, D, dy, step, total, doc, dstates, dx, dB, dD, arriving,
                x_token, B_token, C_token, dy_token, dx_token, dB_token, left, per_head, after,
                P, N, GROUP, PARTS, 0, ROWS, BLOCK_P, BLOCK_N,
            )  # fmt: skip
