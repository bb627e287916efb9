"""Attention of one more token in two kernels: parts of the cache side by side, then their sums together.

A cache's keys and values are read once for all heads of a group, by as many programs as keep a GPU busy; each walks an
equal part of what is held, however long the cache is, because the end is read from memory. The softmax is to base two.
"""

import triton
import triton.language as tl

from megatron_ext.ops.triton_jit import dot, times

NONE: tl.constexpr = tl.constexpr(float("-inf"))


@triton.jit
def part_kernel(
    q, keys, values, position, largest, total, out,
    q_row, key_token, key_row, key_group, value_token, value_row, value_group, scale,
    PARTS: tl.constexpr, GROUPS: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The heads of a group and a part of the tokens: largest score, sum of weights, weighted sum of values."""
    part, group, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(position).to(tl.int32) + 1
    size = tl.cdiv(tl.cdiv(length, PARTS), BLOCK) * BLOCK
    start = part * size
    stop = tl.minimum(start + size, length)
    head, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    in_head, in_d = head < SHARE, d < D
    at_q = row * q_row + (group * SHARE + head[:, None]) * D + d[None, :]
    asked = tl.load(q + at_q, in_head[:, None] & in_d[None, :], 0.0)
    keys += row * key_row + group * key_group
    values += row * value_row + group * value_group
    top = tl.full([BLOCK_H], NONE, tl.float32)
    weight = tl.zeros([BLOCK_H], tl.float32)
    weighted = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for block in range(times(tl.cdiv(tl.maximum(stop - start, 0), BLOCK))):
        t = start + block * BLOCK + tl.arange(0, BLOCK)
        inside = t < stop
        # 64 bits: tokens of a long cache of many rows lie far apart.
        token = tl.where(inside, t, 0).to(tl.int64)
        key = tl.load(keys + token[:, None] * key_token + d[None, :], inside[:, None] & in_d[None, :], 0.0)
        scores = tl.where(inside[None, :], dot(asked, tl.trans(key)) * scale, NONE)
        new_top = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(new_top == NONE, 0.0, new_top)
        probabilities = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(top - shift)
        value = tl.load(values + token[:, None] * value_token + d[None, :], inside[:, None] & in_d[None, :], 0.0)
        weight = weight * fade + tl.sum(probabilities, 1)
        weighted = weighted * fade[:, None] + dot(probabilities.to(value.dtype), value)
        top = new_top
    at = ((row * GROUPS + group) * PARTS + part) * SHARE + head
    tl.store(largest + at, top, in_head)
    tl.store(total + at, weight, in_head)
    tl.store(out + at[:, None] * D + d[None, :], weighted, in_head[:, None] & in_d[None, :])


@triton.jit
def join_kernel(
    largest, total, parts, y,
    PARTS: tl.constexpr, GROUPS: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The output of one head from all parts."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    part, d = tl.arange(0, PARTS), tl.arange(0, BLOCK_D)
    in_d = d < D
    at = ((row * GROUPS + head // SHARE) * PARTS + part) * SHARE + head % SHARE
    top = tl.load(largest + at)
    factor = tl.exp2(top - tl.max(top, 0))
    values = tl.load(parts + at[:, None] * D + d[None, :], in_d[None, :], 0.0)
    joined = tl.sum(values * factor[:, None], 0) / tl.sum(tl.load(total + at) * factor, 0)
    tl.store(y + (row * GROUPS * SHARE + head) * D + d, joined.to(y.dtype.element_ty), in_d)
