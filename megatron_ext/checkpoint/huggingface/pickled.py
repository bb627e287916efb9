"""`pytorch_model.bin`: what was usual before safetensors, in one file or several, read without running anything."""

import zipfile
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.checkpoint.huggingface.shards import ShardEntry, read_index
from megatron_ext.errors import CheckpointError
from megatron_ext.untrusted import asked_for, inside, refusal

NAME = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"


class Pickled:
    """As `Shards`, of pickled files. They are mapped, not loaded, but for those from before torch 1.6.

    Args:
        directory: The directory.
        name: The one file, or the index of several.

    Raises:
        UntrustedError: A file asks for code.
        CheckpointError: A file is missing or damaged, or holds other things than tensors.
    """

    def __init__(self, directory: Path, name: str = NAME) -> None:
        files = sorted(set(read_index(directory, name).values())) if name == INDEX else [name]
        self._tensors: dict[str, Tensor] = {}
        self.entries: dict[str, ShardEntry] = {}
        for path in (inside(directory, file) for file in files):
            for key, tensor in _read(path).items():
                if key in self.entries:
                    raise CheckpointError(f"{key!r} is in two files", got=f"{self.entries[key].path.name}, {path.name}")
                self._tensors[key] = tensor
                self.entries[key] = ShardEntry(tuple(tensor.shape), tensor.dtype, path, 0)

    def fill(self, key: str, place: Tensor, rows: tuple[int, int] | None = None) -> None:
        """Read a tensor, or whole rows of it; see `Shards.fill`."""
        tensor = self._tensors[key]
        place.copy_((tensor if rows is None else tensor[slice(*rows)]).reshape(place.shape))

    def chunks(self, key: str, rows: tuple[int, int] | None = None) -> None:
        """Nothing: the tensors are torch's to read."""


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path.name} is missing", got=path.parent)
    try:
        # Before torch 1.6 files were no archives, which alone can be mapped.
        held = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
        if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
            raise TypeError("not a dictionary of tensors")
        return {str(name): tensor.detach() for name, tensor in held.items()}
    except Exception as error:  # the unpickler raises nearly anything on damaged bytes
        if name := asked_for(error):
            raise refusal(name, path) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path.name} is damaged, or not a dictionary of tensors ({reason})", got=path) from error
