"""Tensors on the host that say they are on a GPU, also where the platform makes the host look like one."""

import torch
from torch import Tensor


class OnGpu(Tensor):
    """So is whatever is made of one."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Not where it is."""
        return torch.device("cuda", 0)


def fake(*shape: int, device: str = "cuda", dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of zeros that says it is there."""
    tensor = torch.zeros(shape, dtype=dtype, device="cpu")
    return tensor.as_subclass(OnGpu) if device == "cuda" else tensor
