"""The scan backward in two kernels: gradients of states on their way back, then everything else chunk by chunk.

`states_backward_kernel` walks the chunks from the last to the first with the gradient of the state in registers; where
y is gated it takes the gate off on the way. `scan_backward_kernel` then makes dx, dB, dC, dD and what the gradient of
the decays consists of. A program loops over the heads of a group, so that dB and dC, sums over these heads, are in
registers until they are whole and are written once, without atomics; so is the gradient of C B^T, whose product with B
and C is taken once for all heads. The programs come in pairs on the same tokens, one that takes them as targets (dC)
and one that takes them as sources (dx, dB): both at once would not fit the registers. Neighbours in time, they find
what they share in the L2 cache.

Per token of a mixer of width 8192 (128 heads x 64, state 128, 8 groups, bf16, chunk 128): 50 KB to and from memory (114
with a gate) and 90 KB, the published kernels 433 KB. Three float32 tiles of 128 x 64 are kept over the heads and two
are made for each head: with 8 warps all 255 registers of a thread, and 300 to 480 bytes that spill to L1. With 64
tokens in a chunk nearly nothing spills, and states are twice the traffic.

The gradient of a log-decay is a sum over pairs of tokens around it. Here each token's row sum of the pairs' float32
terms is written; the same terms make both sums, so what must cancel does (`decay_backward_kernel` takes it on).
"""

# Names that exist only where there are documents, which is known when a kernel is compiled.
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false

import triton
import triton.language as tl

from megatron_ext.ops.triton_jit import PRUNE, configs, dot, sigmoid, times


@triton.autotune(
    configs=configs((4, 2), (4, 3), (8, 2)),
    key=["HEADS", "GROUP", "P", "N", "CHUNK", "BLOCK_P", "BLOCK_N", "MEASURE"],
    prune_configs_by=PRUNE,
)
@triton.jit
def states_backward_kernel(
    C, dout, z, y, total, doc, states, dfinal,
    dstates, dy, dz, dinitial, carried, own, kept,
    C_batch, C_token, dout_batch, dout_token, z_batch, z_token, dz_batch, dz_token,
    length: "i32", chunks: "i32", run: "i32",
    HEADS: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
    MEASURE: tl.constexpr,
):  # fmt: skip
    """One program for some channels of one head of one row: the gradient (N, P) of the state after each chunk.

    With a gate: y silu(z) = out, dy and dz are written too. Runs of chunks in two passes are those of `states_kernel`,
    from the last to the first.
    """
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tokens, n = tl.arange(0, CHUNK), tl.arange(0, BLOCK_N)
    part = tl.program_id(0) % PARTS
    p = part * BLOCK_P + tl.arange(0, BLOCK_P)
    in_n, in_p = n < N, p < P
    in_state = in_n[:, None] & in_p[None, :]
    steps, is_first, is_last = chunks, True, True
    end = chunks
    if own is not None:
        place, runs = tl.program_id(0) // PARTS, (chunks + run - 1) // run
        if MEASURE:
            place += 1  # of the first run nothing needs to be known
        end = tl.minimum(chunks, place * run + run)
        steps, is_first, is_last = end - place * run, place == 0, place == runs - 1
        kept += (row * HEADS + head) * runs
        own += (row * HEADS + head) * runs * N * P
    last_chunk = row * 0 + end - 1
    left = length - (end - 1) * CHUNK
    C += row * C_batch + last_chunk * CHUNK * C_token + head // GROUP * N
    dout += row * dout_batch + last_chunk * CHUNK * dout_token + head * P
    at_y = (row * length + last_chunk * CHUNK) * (HEADS * P) + head * P
    if z is not None:
        z += row * z_batch + last_chunk * CHUNK * z_token + head * P
        if not MEASURE:
            dz += row * dz_batch + last_chunk * CHUNK * dz_token + head * P
            y += at_y
            dy += at_y
    total += ((row * HEADS + head) * chunks + last_chunk) * CHUNK
    at_state = n[:, None] * P + p[None, :]
    outside = (row * HEADS + head) * N * P + p[None, :] * N + n[:, None]
    dstate = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    if dfinal is not None:
        dstate = tl.load(dfinal + outside, in_state & is_last, 0.0).to(tl.float32)
    if doc is not None:
        doc += (row * chunks + last_chunk) * CHUNK
    if MEASURE:
        remains = 1.0
    else:
        first_state = ((row * chunks + last_chunk) * HEADS + head) * N * P
        states += first_state
        dstates += first_state
        carried += ((row * HEADS + head) * PARTS + part) * chunks + last_chunk
        if own is not None:
            for later in range(times(runs - 1 - place)):
                at_run = runs - 1 - later
                dstate = dstate * tl.load(kept + at_run) + tl.load(own + at_run * N * P + at_state, in_state, 0.0)
    for _ in range(times(steps)):
        if not MEASURE:
            tl.store(dstates + at_state, dstate.to(dstates.dtype.element_ty), in_state)
        in_token = tokens < left
        inside = in_token[:, None] & in_p[None, :]
        weight, keep = tl.exp2(tl.load(total + tokens)), tl.exp2(tl.load(total + CHUNK - 1))
        if doc is not None:
            before = tl.load(doc + tl.where(left == length, 0, -1))
            weight = tl.where(tl.load(doc + tokens) == before, weight, 0.0)
            keep = tl.where(tl.load(doc + CHUNK - 1) == before, keep, 0.0)
            doc -= CHUNK
        if MEASURE:
            remains *= keep
        else:
            state = tl.load(states + at_state, in_state, 0.0).to(tl.float32)
            tl.store(carried, keep * tl.sum(tl.sum(state * dstate, 1), 0))
        dys = tl.load(dout + tokens[:, None] * dout_token + p[None, :], inside, 0.0).to(tl.float32)
        if z is not None:
            gate = tl.load(z + tokens[:, None] * z_token + p[None, :], inside, 0.0).to(tl.float32)
            gate_sigmoid = sigmoid(gate)
            if not MEASURE:
                at = tokens[:, None] * (HEADS * P) + p[None, :]
                ys = tl.load(y + at, inside, 0.0).to(tl.float32)
                dgate = dys * ys * gate_sigmoid * (1.0 + gate * (1.0 - gate_sigmoid))
                tl.store(dz + tokens[:, None] * dz_token + p[None, :], dgate.to(dz.dtype.element_ty), inside)
            dys *= gate * gate_sigmoid
            if not MEASURE:
                tl.store(dy + at, dys.to(dy.dtype.element_ty), inside)
                dz -= CHUNK * dz_token
                y -= CHUNK * HEADS * P
                dy -= CHUNK * HEADS * P
            z -= CHUNK * z_token
        Cs = tl.load(C + tokens[:, None] * C_token + n[None, :], in_token[:, None] & in_n[None, :], 0.0)
        dstate = dstate * keep + dot(tl.trans(Cs), (dys * weight[:, None]).to(Cs.dtype))
        C -= CHUNK * C_token
        dout -= CHUNK * dout_token
        total -= CHUNK
        if not MEASURE:
            states -= HEADS * N * P
            dstates -= HEADS * N * P
            carried -= 1
        left += CHUNK
    if MEASURE:
        tl.store(own + place * N * P + at_state, dstate, in_state)
        tl.store(kept + place, remains)
    elif dinitial is not None:
        tl.store(dinitial + outside, dstate, in_state & is_first)


@triton.jit
def _targets(
    x, dy, step, total, states,
    dC, target, source,
    all_B, own_C, reached, carries, x_token, dy_token, dC_token, left, part, per_head,
    P: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dC of ROWS tokens i: what they read from tokens j of the chunk and from the state before it.

    Tiles are (j, i) and (state, i): the long side first, which is the one that matrix units and warps are laid along.
    """
    i, j = part * ROWS + tl.arange(0, ROWS), tl.arange(0, CHUNK)
    n, p = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    in_i, in_j, in_n, in_p = i < left, j < left, n < N, p < P
    BC = tl.where(reached, dot(all_B, tl.trans(own_C)), 0.0)
    dBC = tl.zeros([CHUNK, ROWS], tl.float32)
    dCs = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for _ in range(GROUP):
        dys = tl.load(dy + i[:, None] * dy_token + p[None, :], in_i[:, None] & in_p[None, :], 0.0)
        xs = tl.load(x + j[:, None] * x_token + p[None, :], in_j[:, None] & in_p[None, :], 0.0)
        state = tl.load(states + n[:, None] * P + p[None, :], in_n[:, None] & in_p[None, :], 0.0)
        own_sums = tl.load(total + i)
        exponents = tl.minimum(own_sums[None, :] - tl.load(total + j)[:, None], 0.0)
        steps = tl.load(step + j)[:, None]
        weights = tl.exp2(exponents) * dot(xs, tl.trans(dys))
        pairs = weights * BC
        dBC += weights * steps
        through_state = dot(state, tl.trans(dys)) * tl.where(carries, tl.exp2(own_sums), 0.0)[None, :]
        dCs += through_state
        tl.store(source + j, tl.sum(pairs, 1))
        tl.store(target + i, tl.sum(pairs * steps, 0) + tl.sum(through_state * tl.trans(own_C).to(tl.float32), 0))
        x += P
        dy += P
        states += N * P
        step += per_head
        total += per_head
        target += per_head
        source += per_head * (CHUNK // ROWS)
    dCs += dot(tl.trans(all_B), tl.where(reached, dBC, 0.0).to(all_B.dtype))
    out = dC + i[None, :] * dC_token + n[:, None]
    tl.store(out, dCs.to(dC.dtype.element_ty), in_i[None, :] & in_n[:, None])


@triton.jit
def _sources(
    x, dy, D, step, total, dstates,
    dx, dB, dD, arriving,
    own_B, all_C, reached, leaves, x_token, dy_token, dx_token, dB_token, left, part, per_head,
    P: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx and dB of ROWS tokens j: what they give to tokens i of the chunk and to the state after it.

    Tiles are (i, j), (state, j) and (channels, j).
    """
    j, i = part * ROWS + tl.arange(0, ROWS), tl.arange(0, CHUNK)
    n, p = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    in_j, in_i, in_n, in_p = j < left, i < left, n < N, p < P
    in_x, in_state = in_j[:, None] & in_p[None, :], in_n[:, None] & in_p[None, :]
    CB = tl.where(reached, dot(all_C, tl.trans(own_B)), 0.0)
    dCB = tl.zeros([CHUNK, ROWS], tl.float32)
    dBs = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for _ in range(GROUP):
        xs = tl.load(x + j[:, None] * x_token + p[None, :], in_x, 0.0)
        dys = tl.load(dy + i[:, None] * dy_token + p[None, :], in_i[:, None] & in_p[None, :], 0.0)
        dstate = tl.load(dstates + n[:, None] * P + p[None, :], in_state, 0.0)
        own_sums, steps, last = tl.load(total + j), tl.load(step + j), tl.load(total + CHUNK - 1)
        weights = tl.exp2(tl.minimum(tl.load(total + i)[:, None] - own_sums[None, :], 0.0))
        to_end = tl.where(leaves, tl.exp2(last - own_sums), 0.0)
        within = dot(tl.trans(dys), (weights * CB).to(dys.dtype))
        after = dot(tl.trans(dstate), tl.trans(own_B))
        # not a sum: Triton would chain the two products in one accumulator, which up to 3.8 it miscompiles on Blackwell
        dxs = tl.fma(after, tl.broadcast_to(to_end[None, :], after.shape), within) * steps[None, :]
        tl.store(arriving + j, tl.sum(after * tl.trans(xs).to(tl.float32), 0) * to_end)
        dCB += weights * dot(dys, tl.trans(xs)) * steps[None, :]
        dBs += dot(dstate, tl.trans(xs)) * (to_end * steps)[None, :]
        dxs = tl.trans(dxs)
        if D is not None:
            dy_j = tl.load(dy + j[:, None] * dy_token + p[None, :], in_x, 0.0).to(tl.float32)
            dxs += tl.load(D + p, in_p, 0.0)[None, :] * dy_j
            tl.store(dD + p, tl.sum(dy_j * xs.to(tl.float32), 0), in_p)
            D += P
            dD += P
        tl.store(dx + j[:, None] * dx_token + p[None, :], dxs.to(dx.dtype.element_ty), in_x)
        x += P
        dy += P
        dx += P
        dstates += N * P
        step += per_head
        total += per_head
        arriving += per_head
    dBs += dot(tl.trans(all_C), tl.where(reached, dCB, 0.0).to(all_C.dtype))
    out = dB + j[None, :] * dB_token + n[:, None]
    tl.store(out, dBs.to(dB.dtype.element_ty), in_j[None, :] & in_n[:, None])


@triton.autotune(
    configs=configs((8, 2), (8, 1), (8, 3)),
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
    role, place = tl.program_id(0) % 2, tl.program_id(0) // 2
    chunk, part = place // (CHUNK // ROWS), place % (CHUNK // ROWS)
    group, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    start, left = (chunk * CHUNK).to(tl.int64), length - chunk * CHUNK
    first = group * GROUP
    own_tokens, all_tokens = part * ROWS + tl.arange(0, ROWS), tl.arange(0, CHUNK)
    n = tl.arange(0, BLOCK_N)
    in_own, in_all, in_n = (own_tokens < left)[:, None], (all_tokens < left)[:, None], (n < N)[None, :]

    x += row * x_batch + start * x_token + first * P
    dy += row * dy_batch + start * dy_token + first * P
    B += row * B_batch + start * B_token + group * N
    C += row * C_batch + start * C_token + group * N
    per_head = CHUNK * chunks
    at_step = (row * HEADS + first) * per_head + start
    at_state = ((row * chunks + chunk) * HEADS + first) * N * P
    if doc is not None:
        doc += row * per_head + start
        before, after = tl.load(doc + tl.where(chunk > 0, -1, 0)), tl.load(doc + CHUNK - 1)
        own_doc = tl.load(doc + own_tokens)
        same = tl.load(doc + all_tokens)[:, None] == own_doc[None, :]
    if role == 0:
        own_C = tl.load(C + own_tokens[:, None] * C_token + n[None, :], in_own & in_n, 0.0)
        all_B = tl.load(B + all_tokens[:, None] * B_token + n[None, :], in_all & in_n, 0.0)
        reached, carries = all_tokens[:, None] <= own_tokens[None, :], own_tokens >= 0
        if doc is not None:
            reached &= same
            carries = own_doc == before
        dC += row * dC_batch + start * dC_token + group * N
        _targets(
            x, dy, step + at_step, total + at_step, states + at_state,
            dC, target + at_step, source + (row * HEADS + first) * per_head * (CHUNK // ROWS) + part * per_head + start,
            all_B, own_C, reached, carries, x_token, dy_token, dC_token, left, part, per_head,
            P, N, GROUP, CHUNK, ROWS, BLOCK_P, BLOCK_N,
        )  # fmt: skip
    else:
        own_B = tl.load(B + own_tokens[:, None] * B_token + n[None, :], in_own & in_n, 0.0)
        all_C = tl.load(C + all_tokens[:, None] * C_token + n[None, :], in_all & in_n, 0.0)
        reached, leaves = all_tokens[:, None] >= own_tokens[None, :], own_tokens >= 0
        if doc is not None:
            reached &= same
            leaves = own_doc == after
        dx += row * dx_batch + start * dx_token + first * P
        dB += row * dB_batch + start * dB_token + group * N
        if D is not None:
            D += first * P
            dD += ((row * chunks * (CHUNK // ROWS) + place) * HEADS + first) * P
        _sources(
            x, dy, D, step + at_step, total + at_step, dstates + at_state,
            dx, dB, dD, arriving + at_step,
            own_B, all_C, reached, leaves, x_token, dy_token, dx_token, dB_token, left, part, per_head,
            P, N, GROUP, CHUNK, ROWS, BLOCK_P, BLOCK_N,
        )  # fmt: skip
