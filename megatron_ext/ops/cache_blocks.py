"""Work in pieces: small enough to stay in a core's cache on a CPU, large enough to fill a GPU."""

from collections.abc import Iterator

import torch

# Elements of one temporary of a piece: a megabyte of float32 on a CPU.
BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}


def blocks(count: int, elements: int, device: torch.device) -> Iterator[slice]:
    """Slices that cover `count` things in order, of `elements` array elements each."""
    size = max(1, BLOCK_ELEMENTS.get(device.type, BLOCK_ELEMENTS["cuda"]) // elements)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def rows_per_block(rows: int, device: torch.device) -> int:
    """Rows of a batch that a piece takes: one on a CPU, all on a GPU."""
    return 1 if device.type == "cpu" else rows
