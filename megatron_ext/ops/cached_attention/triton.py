"""Attention of one more token to a cache, as Triton kernels."""

# A launch takes numbers for constants, and num_warps, whatever Triton's annotations say.
# pyright: reportArgumentType=false, reportCallIssue=false

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from megatron_ext.ops.cached_attention import triton_kernels
from megatron_ext.ops.triton_jit import packed
from megatron_ext.ops.triton_tiles import cdiv, next_power_of_two, tile_side

# Tokens of a tile of keys: 16 KB of 128 channels in 16 bits.
BLOCK = 64
# Programs that keep every multiprocessor of a large GPU busy, with some to spare.
PROGRAMS = 512
MOST_PARTS = 128


def attend(
    query: Float[Tensor, "b n d"],
    keys: Float[Tensor, "l b g d"],
    values: Float[Tensor, "l b g d"],
    position: Int[Tensor, "1"],
    scale: float | None = None,
) -> Float[Tensor, "b n d"]:
    """`naive.attend` in two kernels, products in the dtype of the cache, sums in float32: the same arguments.

    Only what the cache holds is read. The launches depend on the sizes of the cache alone.
    """
    (batch, heads, d), (length, _, groups, _) = query.shape, keys.shape
    share = heads // groups
    query, keys, values = packed(query, 2), packed(keys, 1), packed(values, 1)
    parts = min(MOST_PARTS, next_power_of_two(cdiv(PROGRAMS, batch * groups)), next_power_of_two(cdiv(length, BLOCK)))
    floats = {"dtype": torch.float32, "device": query.device}
    largest, total = (torch.empty(batch, groups, parts, share, **floats) for _ in range(2))
    sums = torch.empty(batch, groups, parts, share, d, **floats)
    stages = 3 if tile_side(d) * query.element_size() <= 512 else 1  # what fits into shared memory
    base_two = (d**-0.5 if scale is None else scale) / math.log(2)
    triton_kernels.part_kernel[(parts, groups, batch)](
        query, keys, values, position, largest, total, sums,
        query.stride(0), *keys.stride()[:3], *values.stride()[:3], base_two,
        PARTS=parts, GROUPS=groups, SHARE=share, D=d, BLOCK=BLOCK, BLOCK_H=tile_side(share), BLOCK_D=tile_side(d),
        num_warps=4, num_stages=stages,
    )  # fmt: skip
    y = torch.empty(batch, heads, d, dtype=query.dtype, device=query.device)
    triton_kernels.join_kernel[(heads, batch)](
        largest, total, sums, y,
        PARTS=parts, GROUPS=groups, SHARE=share, D=d, BLOCK_D=tile_side(d), num_warps=4,
    )  # fmt: skip
    return y
