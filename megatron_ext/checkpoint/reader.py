"""Checkpoints tensor by tensor, read whatever layout saved them. Memory holds one tensor; no model is built."""

import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.checksums import Checksums
from megatron_ext.checkpoint.scratch import Scratch
from megatron_ext.errors import CheckpointError
from megatron_ext.untrusted import asked_for, refusal

if TYPE_CHECKING:
    from megatron_ext.checkpoint.writer import Writer

BLOCK = 8 * 2**20  # bytes
WRAPPING = 2**14  # bytes that torch.save puts around a tensor's values, at most


@dataclass(frozen=True)
class Stored:
    """A chunk on disk: its shape and type, and the place of its values in the file, None if they are not just a row.

    Its checksum has been compared; None if there is none.
    """

    path: Path
    info: _StorageInfo
    tensor: Tensor
    offset: int | None
    checksum: str | None = None


class Reader:
    """The model weights of one saved step.

    Args:
        path: A step's directory, or one that holds steps; then the newest complete one.

    Raises:
        CheckpointError: There is no complete step.
    """

    def __init__(self, path: str | Path) -> None:
        self.step = layout.find(path)
        self.shapes = {key: shape for key, (shape, _) in layout.tensors(self.step.path).items()}
        self._chunks: dict[str, list[tuple[tuple[int, ...], _StorageInfo]]] = defaultdict(list)
        metadata = layout.read_metadata(self.step.path)
        self._entries = metadata.state_dict_metadata
        self._checksums = Checksums.read(self.step.path)
        if self._checksums:
            self._checksums.check(".metadata")
        for index, info in metadata.storage_data.items():
            if index.offset is not None:
                self._chunks[index.fqn].append((tuple(index.offset), info))

    def read(self, key: str, into: Scratch | None = None, layer: int | None = None) -> Tensor:
        """One whole tensor, on the CPU, in the type it was saved in.

        Args:
            key: Its key.
            into: Where it is to lie; in memory of its own by default.
            layer: Only this entry of its first dimension, which is dropped.

        Raises:
            CheckpointError: There is none of this key, or not all of it, or it is not what was written (`checksums`).
        """
        entry = self._entry(key)
        shape, dtype = tuple(entry.size), entry.properties.dtype
        if layer is not None:
            shape = (1, *shape[1:])
        whole = torch.empty(shape, dtype=dtype) if into is None else into.tensor(shape, dtype)
        for offset, stored in self._parts(key, entry, layer):
            sizes, first = stored.tensor.shape, 0 if layer is None else layer
            if layer is not None and sizes[0] != 1:
                raise CheckpointError(f"{key!r} is not saved layer by layer", got=f"a part of {tuple(sizes)}")
            starts = (offset[0] - first, *offset[1:]) if offset else ()
            place = whole[tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))]
            self._load(key, stored, place)
        return whole if layer is None else whole[0]

    def copy(self, key: str, writer: "Writer", new_key: str) -> bool:
        """Let the kernel copy a tensor as it lies on disk, part by part, if nothing else lies there with it.

        Args:
            key: Its key.
            writer: Where it goes.
            new_key: What it is called there.

        Returns:
            Whether it was copied; otherwise it must be read and written.

        Raises:
            CheckpointError: As `read`.
        """
        entry = self._entry(key)
        parts = list(self._parts(key, entry))
        if sys.platform != "linux":  # elsewhere sendfile takes sockets only
            return False
        if any(stored.offset is None or stored.info.length > stored.tensor.nbytes + WRAPPING for _, stored in parts):
            return False
        writer.copy(new_key, entry, parts)
        return True

    def _entry(self, key: str) -> TensorStorageMetadata:
        entry = self._entries.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"the checkpoint has no tensor {key!r}", got=self.step.path)
        return entry

    def _parts(
        self, key: str, entry: TensorStorageMetadata, layer: int | None = None
    ) -> Iterator[tuple[tuple[int, ...], Stored]]:
        """The chunks of a tensor, or of a layer of it, with their offsets, which are checked to make it whole."""
        whole = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        wanted = whole.numel() if layer is None else whole[layer].numel()
        covered = 0
        for offset, info in self._chunks[key]:
            if layer is not None and offset[0] != layer:
                continue
            stored = self._locate(key, info)
            chunk = stored.tensor
            if len(offset) != whole.dim() or chunk.dim() != whole.dim() or chunk.dtype != whole.dtype:
                raise CheckpointError(f"the checkpoint is damaged: a part of {key!r} does not fit", got=self.step.path)
            if any(start + size > length for start, size, length in zip(offset, chunk.shape, whole.shape, strict=True)):
                raise CheckpointError(f"the checkpoint is damaged: a part of {key!r} lies outside", got=self.step.path)
            yield offset, stored
            covered += chunk.numel()
        if covered != wanted:  # parts have distinct offsets and, from one grid, do not overlap
            raise CheckpointError(
                f"the checkpoint is damaged: {key!r} is not whole", got=f"{covered} of {wanted} elements"
            )  # fmt: skip

    def _locate(self, key: str, info: _StorageInfo) -> Stored:
        """A chunk without its values, and where in which file these lie."""
        path = self.step.path / info.relative_path
        told = self._checksums.check(info.relative_path, info.offset) if self._checksums else None
        with path.open("rb") as file, self._damage(key):
            part = cast(BinaryIO, _create_file_view(file, info.offset, info.length))
            with torch.serialization.skip_data():
                chunk = torch.load(part, map_location="cpu", weights_only=True)
            if not isinstance(chunk, Tensor):
                raise TypeError("not a tensor")
            part.seek(0)
            records: Any = torch._C.PyTorchFileReader(part)
            values = [name for name in records.get_all_records() if name.startswith("data/")]
            plain = len(values) == 1 and chunk.is_contiguous() and chunk.storage_offset() == 0
            offset = records.get_record_offset(values[0]) if plain else None
        return Stored(path, info, chunk, None if offset is None else info.offset + offset, told)

    def _load(self, key: str, stored: Stored, place: Tensor) -> None:
        """Copy the values of a chunk to where they belong."""
        with stored.path.open("rb", buffering=0) as file, self._damage(key):
            if stored.offset is None:
                part = cast(BinaryIO, _create_file_view(file, stored.info.offset, stored.info.length))
                place.copy_(torch.load(part, map_location="cpu", weights_only=True))
                return
            file.seek(stored.offset)
            if place.is_contiguous():
                fill(file, place)
                return
            # The columns of a part: as many rows at a time as fit.
            rows = max(1, BLOCK // (place[0].numel() * place.element_size()))
            block = torch.empty_like(place[:rows], memory_format=torch.contiguous_format)
            for first in range(0, len(place), rows):
                some = place[first : first + rows]
                fill(file, block[: len(some)])
                some.copy_(block[: len(some)])

    @contextmanager
    def _damage(self, key: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the unpickler raises nearly anything on damaged bytes
            if name := asked_for(error):
                raise refusal(name, self.step.path) from error
            what = f"the checkpoint is damaged: {key!r} cannot be read"
            raise CheckpointError(what, got=self.step.path) from error


def fill(file: FileIO, tensor: Tensor) -> None:
    """Fill a contiguous tensor; a kernel reads 2 GB at most at once."""
    rest = memoryview(tensor.view(-1).view(torch.uint8).numpy())
    while rest:
        done = file.readinto(rest)
        if not done:
            raise EOFError("the file ends too early")
        rest = rest[done:]
