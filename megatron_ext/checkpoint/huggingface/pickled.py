"""`pytorch_model.bin`: the one file that was usual before safetensors, read without running what it brings."""

from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.checkpoint.huggingface.shards import Entry
from megatron_ext.errors import CheckpointError

NAME = "pytorch_model.bin"


class Pickled:
    """As `Shards`, of a pickled file. It is mapped, not loaded.

    Raises:
        CheckpointError: It is damaged, or holds other things than tensors.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / NAME
        try:
            held = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            self._tensors: dict[str, Tensor] = {str(name): tensor.detach() for name, tensor in held.items()}
        except Exception as error:  # the unpickler raises nearly anything on damaged bytes
            raise CheckpointError(f"{NAME} is damaged, or not a dictionary of tensors ({error})", got=path) from error
        self.entries = {
            name: Entry(tuple(tensor.shape), tensor.dtype, path, 0) for name, tensor in self._tensors.items()
        }

    def read(self, name: str, place: Tensor, first: int = 0) -> None:
        """Read whole rows of a tensor; see `Shards.read`."""
        rows = self._tensors[name][first:]
        count = place.numel() // max(1, rows[:1].numel())
        place.copy_(rows[:count].reshape(place.shape))
