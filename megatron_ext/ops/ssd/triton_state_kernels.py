"""States on their way through the sequence, and their gradients on the way back.

`states_kernel` walks the chunks in order with the state in registers and leaves behind the state before each chunk; the
published pipeline writes chunk states, reads them to pass them on, and writes them again. `states_backward_kernel`
walks from the last chunk to the first with the gradient of the state; where y is gated it takes the gate off on the
way.

With too few heads and rows for the GPU runs of chunks are walked side by side, in two passes: x and B (or dy and C) are
read again, states are not. At 16 heads and 4,096 tokens 16 programs of 32 chunks become 128 of 4 and 4, at 4 heads and
131,072 tokens 4 of 1,024 chunks 256 of 16 and 16.

Per token of a mixer of width 8192 (128 heads x 64, state 128, 8 groups, bf16, chunk 128): 35 KB to and from memory
forward, 50 KB backward (114 with a gate), and 48 KB and more from the L2 cache, as each head reads B or C of its group.
Compiled for Hopper they take 128 and 170 registers a thread with 8 warps (255 with a gate), and 100 KB of shared memory
(116), so that two programs fit a multiprocessor; with three stages, of which one is on its way while another is worked
on, 150 KB (182).

Where a row of tokens is addressed, the offset of its first token is 64 bits wide; within a chunk 32 bits do.
"""

# Names that exist only where there are documents or runs, which is known when a kernel is compiled.
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false

import triton
import triton.language as tl

from megatron_ext.ops.triton_jit import PRUNE, configs, dot, sigmoid, times


@triton.autotune(
    configs=configs((8, 2), (8, 3), (4, 2), (4, 3)),
    key=["HEADS", "GROUP", "P", "N", "CHUNK", "BLOCK_P", "BLOCK_N", "MEASURE"],
    prune_configs_by=PRUNE,
)
@triton.jit
def states_kernel(
    x, B, step, total, doc, initial,
    states, final, own, kept,
    x_batch, x_token, B_batch, B_token,
    length: "i32", chunks: "i32", run: "i32",
    HEADS: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
    MEASURE: tl.constexpr,
):  # fmt: skip
    """One program for some channels of one head of one row: the state (N, P) before each chunk, and the last one.

    Where there are `own` states every `run` chunks have a program of their own, in two passes. The one that is to
    MEASURE leaves in `own` what its chunks make of nothing (the first run: of the initial state), in `kept` how much of
    a state outlives them. The other one begins with what the runs before it, thus described, come to.
    """
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tokens, n = tl.arange(0, CHUNK), tl.arange(0, BLOCK_N)
    p = tl.program_id(0) % PARTS * BLOCK_P + tl.arange(0, BLOCK_P)
    in_n, in_p = n < N, p < P
    in_state = in_n[:, None] & in_p[None, :]
    x += row * x_batch + head * P
    B += row * B_batch + head // GROUP * N
    at_step = (row * HEADS + head) * CHUNK * chunks
    step += at_step
    total += at_step
    at_state = n[:, None] * P + p[None, :]
    outside = (row * HEADS + head) * N * P + p[None, :] * N + n[:, None]  # (b, h, p, n), as others keep it
    state = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    steps, is_first, is_last = chunks, True, True
    if own is not None:
        place, runs = tl.program_id(0) // PARTS, (chunks + run - 1) // run
        first = place * run
        steps, is_first, is_last = tl.minimum(chunks - first, run), place == 0, place == runs - 1
        start = (first * CHUNK).to(tl.int64)
        x += start * x_token
        B += start * B_token
        step += start
        total += start
        length -= first * CHUNK
        kept += (row * HEADS + head) * runs
        own += (row * HEADS + head) * runs * N * P
    if initial is not None:
        state = tl.load(initial + outside, in_state & is_first, 0.0).to(tl.float32)
    if doc is not None:
        doc += row * CHUNK * chunks
        if own is not None:
            doc += start
        before = tl.load(doc - tl.where(is_first, 0, 1))
    if MEASURE:
        remains = 1.0
    else:
        states += (row * chunks * HEADS + head) * N * P
        if own is not None:
            states += first.to(tl.int64) * HEADS * N * P
            for earlier in range(times(place)):
                state = state * tl.load(kept + earlier) + tl.load(own + earlier * N * P + at_state, in_state, 0.0)
    for _ in range(times(steps)):
        if not MEASURE:
            tl.store(states + at_state, state.to(states.dtype.element_ty), in_state)
        inside = tokens < length
        sums, last = tl.load(total + tokens), tl.load(total + CHUNK - 1)
        weight = tl.load(step + tokens) * tl.exp2(last - sums)
        keep = tl.exp2(last)
        if doc is not None:
            last_doc = tl.load(doc + CHUNK - 1)
            weight = tl.where(tl.load(doc + tokens) == last_doc, weight, 0.0)
            keep = tl.where(before == last_doc, keep, 0.0)
            before = last_doc
            doc += CHUNK
        xs = tl.load(x + tokens[:, None] * x_token + p[None, :], inside[:, None] & in_p[None, :], 0.0)
        Bs = tl.load(B + tokens[:, None] * B_token + n[None, :], inside[:, None] & in_n[None, :], 0.0)
        weighted = (xs * weight[:, None]).to(Bs.dtype)
        state = state * keep + dot(tl.trans(Bs), weighted)
        x += CHUNK * x_token
        B += CHUNK * B_token
        step += CHUNK
        total += CHUNK
        length -= CHUNK
        if MEASURE:
            remains *= keep
        else:
            states += HEADS * N * P
    if MEASURE:
        tl.store(own + place * N * P + at_state, state, in_state)
        tl.store(kept + place, remains)
    else:
        tl.store(final + outside, state, in_state & is_last)


@triton.autotune(
    configs=configs((8, 2), (8, 3), (4, 2), (4, 3)),
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
