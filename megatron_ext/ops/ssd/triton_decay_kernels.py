"""Step sizes and decays of a scan: two small kernels before and after it, on (tokens, heads) arrays alone.

Exponents are to base two. Sums start anew in each chunk, so that a float32 difference of two of them is good to 1e-7 of
a chunk's sum, and what a token forgets is bounded: 2**-128 of a state is nothing in float32.
"""

import triton
import triton.language as tl

from megatron_ext.ops.triton_jit import sigmoid

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
FORGOTTEN: tl.constexpr = tl.constexpr(-128.0)


@triton.jit
def step_sizes(raw, bias, low, high, SOFTPLUS: tl.constexpr):
    """clamp(softplus(raw + bias)), and the derivative with respect to raw."""
    raw += bias
    step = raw
    slope = tl.full(raw.shape, 1.0, tl.float32)
    if SOFTPLUS:
        e = tl.exp(-tl.abs(raw))
        one_more = 1.0 + e  # log1p(e) without losing a small e
        log1p = tl.where(one_more == 1.0, e, tl.log(one_more) * (e / tl.where(one_more == 1.0, 1.0, one_more - 1.0)))
        step = tl.maximum(raw, 0.0) + log1p
        slope = sigmoid(raw)
    inside = (step >= low) & (step <= high)
    return tl.minimum(tl.maximum(step, low), high), tl.where(inside, slope, 0.0)


@triton.jit
def decay_kernel(
    raw, bias, A, step, total,
    raw_batch, raw_token, low, high, length, padded,
    HEADS: tl.constexpr, SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(b, l, h) to step sizes and, summed from the chunk's start, exponents, both (b, h, padded length) float32."""
    chunk, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    heads = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tokens = tl.arange(0, CHUNK)
    exists = heads < HEADS
    inside = exists[None, :] & (tokens[:, None] < length - chunk * CHUNK)
    raw += row * raw_batch + (chunk * CHUNK).to(tl.int64) * raw_token
    raw_steps = tl.load(raw + tokens[:, None] * raw_token + heads[None, :], inside, 0.0).to(tl.float32)
    shift = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        shift = tl.load(bias + heads, exists, 0.0).to(tl.float32)
    steps, _ = step_sizes(raw_steps, shift[None, :], low, high, SOFTPLUS)
    steps = tl.where(inside, steps, 0.0)
    rate = tl.load(A + heads, exists, 0.0).to(tl.float32) * LOG2E
    sums = tl.cumsum(tl.maximum(steps * rate[None, :], FORGOTTEN), 0)
    out = (row * HEADS + heads[:, None]) * padded + chunk * CHUNK + tokens[None, :]
    tl.store(step + out, tl.trans(steps), exists[:, None])
    tl.store(total + out, tl.trans(sums), exists[:, None])


@triton.jit
def decay_backward_kernel(
    raw, bias, A, step, target, source, arriving, carried,
    draw, dA, dbias,
    raw_batch, raw_token, draw_batch, draw_token, low, high, length, padded,
    HEADS: tl.constexpr, SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    SOURCES: tl.constexpr, CARRIERS: tl.constexpr,
):  # fmt: skip
    """The gradient of the raw step sizes, and per chunk the sums that make those of A and the bias.

    The log-decay of token t weighs what tokens j < t give to tokens i >= t. Within a chunk that is the sum of `target`
    from t on, what these tokens get, less `step * source`, what they give to each other. `target` holds as well what
    the state before the chunk gives to them; to the state after it `step * arriving` is given by the tokens before t,
    and `carried` by the state before it. No term is a difference of the large sums over a whole sequence. `source`
    comes in SOURCES parts, by blocks of tokens that are given to, which are not earlier ones; `carried` in CARRIERS.
    """
    chunk, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    heads = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tokens = tl.arange(0, CHUNK)
    exists = heads < HEADS
    at = (row * HEADS + heads[:, None]) * padded + chunk * CHUNK + tokens[None, :]
    steps = tl.load(step + at, exists[:, None], 0.0)
    from_chunk = tl.zeros([BLOCK, CHUNK], tl.float32)
    for part in range(SOURCES):
        at_part = ((row * HEADS + heads[:, None]) * SOURCES + part) * padded + chunk * CHUNK + tokens[None, :]
        written = exists[:, None] & (tokens[None, :] < (part + 1) * (CHUNK // SOURCES))
        from_chunk += tl.load(source + at_part, written, 0.0)
    from_end = tl.load(arriving + at, exists[:, None], 0.0)
    within = tl.load(target + at, exists[:, None], 0.0) - steps * from_chunk
    leaving = steps * from_end
    chunks = padded // CHUNK
    whole = tl.zeros([BLOCK], tl.float32)
    for part in range(CARRIERS):
        whole += tl.load(carried + ((row * HEADS + heads) * CARRIERS + part) * chunks + chunk, exists, 0.0)
    before_and_at = tl.cumsum(within, 1)
    from_here = tl.sum(within, 1)[:, None] - before_and_at + within
    dlog = from_here + (tl.cumsum(leaving, 1) - leaving) + whole[:, None]
    rate = tl.load(A + heads, exists, 0.0).to(tl.float32)
    dstep = from_chunk + from_end + rate[:, None] * dlog
    out = (row * chunks + chunk) * HEADS + heads
    tl.store(dA + out, tl.sum(dlog * steps, 1), exists)

    inside = exists[:, None] & (tokens[None, :] < length - chunk * CHUNK)
    start = (chunk * CHUNK).to(tl.int64)
    raw_steps = tl.load(
        raw + row * raw_batch + start * raw_token + tokens[None, :] * raw_token + heads[:, None], inside, 0.0
    ).to(tl.float32)
    shift = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        shift = tl.load(bias + heads, exists, 0.0).to(tl.float32)
    _, slope = step_sizes(raw_steps, shift[:, None], low, high, SOFTPLUS)
    gradient = tl.where(inside, dstep * slope, 0.0)
    tl.store(
        draw + row * draw_batch + start * draw_token + tokens[None, :] * draw_token + heads[:, None],
        gradient.to(draw.dtype.element_ty),
        inside,
    )
    if bias is not None:
        tl.store(dbias + out, tl.sum(gradient, 1), exists)
