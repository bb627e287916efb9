"""Sizes of Triton's tiles: what the kernels are made for, and counting tiles. Triton itself is not needed here."""

import torch

# Beyond these plain torch is the better choice.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_CHANNELS, MAX_STATE, MAX_HEAD_STATE, MAX_TAPS = 128, 256, 128 * 128, 4
MIN_SHARED_MEMORY = 163 * 1024  # of a program: what an A100 has; an H100 has 227 KB


def fits(channels: int, state: int) -> bool:
    """Whether heads of these sizes fit the tiles."""
    return channels <= MAX_HEAD_CHANNELS and state <= MAX_STATE and channels * state <= MAX_HEAD_STATE


def cdiv(size: int, side: int) -> int:
    """Tiles of `side` that cover `size`."""
    return -(-size // side)


def next_power_of_two(size: int) -> int:
    """The smallest power of two that is not less, which is what a vector of a program may have."""
    return 1 << (size - 1).bit_length()


def tile_side(size: int) -> int:
    """The side of a tile that holds `size`: a power of two, and no less than a matrix unit takes."""
    return max(16, next_power_of_two(size))
