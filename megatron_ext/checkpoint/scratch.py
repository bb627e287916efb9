"""Memory for one tensor after another: fresh pages cost the kernel more time than copying into old ones."""

from math import prod

import torch
from torch import Tensor


class Scratch:
    """Memory as large as the largest tensor that it has held."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, good until the next call; nothing but it is in its storage."""
        size = prod(shape) * dtype.itemsize
        if size > self._memory.numel():
            self._memory = torch.empty(0, dtype=torch.uint8)  # never both
            self._memory = torch.empty(size, dtype=torch.uint8)
        if not size:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._memory.numpy(), dtype=dtype, count=prod(shape)).view(shape)
