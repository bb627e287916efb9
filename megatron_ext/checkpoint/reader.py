"""Checkpoints tensor by tensor, read whatever layout saved them. Memory holds one tensor; no model is built."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.blocks import ChunkReader, ReusableBuffer, StoredChunk, TensorEntry, as_bytes
from megatron_ext.checkpoint.checksums import Checksums
from megatron_ext.errors import CheckpointError
from megatron_ext.untrusted.pickles import asked_for, refusal

COLUMNS = 2**23  # bytes of a chunk read at a time where it is columns of a tensor
WRAPPING = 2**14  # bytes that torch.save puts around a tensor's values, at most

Offset = tuple[int, ...]


class CheckpointReader:
    """The model weights of one saved step.

    Args:
        path: A step's directory, or one that holds steps; then the newest complete one.

    Raises:
        CheckpointError: There is no complete step.
    """

    def __init__(self, path: str | Path) -> None:
        self.step = layout.find(path)
        self.entries = {key: TensorEntry(*entry) for key, entry in layout.tensors(self.step.path).items()}
        self._stored: dict[str, list[tuple[Offset, _StorageInfo]]] = defaultdict(list)
        self._located: dict[tuple[str, Offset], StoredChunk] = {}
        self._checksums = Checksums.read(self.step.path)
        if self._checksums:
            self._checksums.check(".metadata")
        for index, info in layout.read_metadata(self.step.path).storage_data.items():
            if index.offset is not None:
                self._stored[index.fqn].append((tuple(index.offset), info))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors."""
        return {key: entry.shape for key, entry in self.entries.items()}

    def read(self, key: str, into: ReusableBuffer | None = None, layer: int | None = None) -> Tensor:
        """One whole tensor, on the CPU, in the type it was saved in.

        Args:
            key: Its key.
            into: Where it is to lie; in memory of its own by default.
            layer: Only this entry of its first dimension, which is dropped.

        Raises:
            CheckpointError: There is none of this key, or not all of it, or it is not what was written (`checksums`).
        """
        entry = self._entry(key)
        shape = entry.shape if layer is None else (1, *entry.shape[1:])
        whole = torch.empty(shape, dtype=entry.dtype) if into is None else into.tensor(shape, entry.dtype)
        self.fill(key, whole, None if layer is None else (layer, layer + 1))
        return whole if layer is None else whole[0]

    def fill(self, key: str, place: Tensor, rows: tuple[int, int] | None = None) -> None:
        """Read a tensor, or rows of it (entries of dimension 0), into contiguous memory; see `read`."""
        first = rows[0] if rows else 0
        for offset, chunk in self.chunks(key, rows):
            starts = (offset[0] - first, *offset[1:]) if offset else ()
            part = place[tuple(slice(start, start + size) for start, size in zip(starts, chunk.shape, strict=True))]
            with self._damage(key):
                _load(chunk, part)

    def chunks(self, key: str, rows: tuple[int, int] | None = None) -> list[tuple[Offset, StoredChunk]]:
        """The chunks of a tensor, or of rows of it, with their offsets, which are checked to make it whole."""
        entry = self._entry(key)
        first, stop = rows or (0, entry.shape[0] if entry.shape else 1)
        found: list[tuple[Offset, StoredChunk]] = []
        for offset, info in self._stored[key]:
            chunk = self._located.get((key, offset)) or self._locate(key, info)
            self._located[key, offset] = chunk
            dimensions = len(entry.shape)
            if len(offset) != dimensions or len(chunk.shape) != dimensions or chunk.dtype != entry.dtype:
                raise CheckpointError(f"the checkpoint is damaged: a part of {key!r} does not fit", got=self.step.path)
            ends = [start + size for start, size in zip(offset, chunk.shape, strict=True)]
            if any(end > length for end, length in zip(ends, entry.shape, strict=True)):
                raise CheckpointError(f"the checkpoint is damaged: a part of {key!r} lies outside", got=self.step.path)
            if rows and (ends[0] <= first or offset[0] >= stop):
                continue
            if rows and not first <= offset[0] < ends[0] <= stop:
                raise CheckpointError(f"{key!r} is not saved layer by layer", got=f"a part of {chunk.shape}")
            found.append((offset, chunk))
        wanted = entry.count // (entry.shape[0] if rows else 1) * (stop - first if rows else 1)
        covered = sum(chunk.count for _, chunk in found)
        if covered != wanted:  # parts have distinct offsets and, from one grid, do not overlap
            raise CheckpointError(
                f"the checkpoint is damaged: {key!r} is not whole", got=f"{covered} of {wanted} elements"
            )
        return found

    def _entry(self, key: str) -> TensorEntry:
        if key not in self.entries:
            raise CheckpointError(f"the checkpoint has no tensor {key!r}", got=self.step.path)
        return self.entries[key]

    def _locate(self, key: str, info: _StorageInfo) -> StoredChunk:
        """A chunk without its values, and where in which file these lie."""
        path = self.step.path / info.relative_path
        with path.open("rb") as file, self._damage(key):
            part = cast(BinaryIO, _create_file_view(file, info.offset, info.length))
            with torch.serialization.skip_data():
                tensor = torch.load(part, map_location="cpu", weights_only=True)
            if not isinstance(tensor, Tensor):
                raise TypeError("not a tensor")
            part.seek(0)
            records: Any = torch._C.PyTorchFileReader(part)
            values = [name for name in records.get_all_records() if name.startswith("data/")]
            plain = len(values) == 1 and tensor.is_contiguous() and tensor.storage_offset() == 0
            offset = info.offset + records.get_record_offset(values[0]) if plain else None
        return StoredChunk(
            tuple(tensor.shape), tensor.dtype, path, info.offset, info.length, offset, self._checksums,
            by_torch=plain and info.length <= tensor.nbytes + WRAPPING,
        )  # fmt: skip

    @contextmanager
    def _damage(self, key: str) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:  # the unpickler raises nearly anything on damaged bytes
            if name := asked_for(error):
                raise refusal(name, self.step.path) from error
            what = f"the checkpoint is damaged: {key!r} cannot be read"
            raise CheckpointError(what, got=self.step.path) from error


def _load(chunk: StoredChunk, place: Tensor) -> None:
    """Copy the values of a chunk to where they belong."""
    if chunk.values is None:
        if chunk.checksums:
            chunk.checksums.check(chunk.path.name, chunk.start)
        with chunk.path.open("rb", buffering=0) as file:
            part = cast(BinaryIO, _create_file_view(file, chunk.start, chunk.length))
            place.copy_(torch.load(part, map_location="cpu", weights_only=True))
        return
    with ChunkReader(chunk) as values:
        if place.is_contiguous():
            values.fill(as_bytes(place))
            return
        # The columns of a part: as many rows at a time as fit.
        rows = max(1, COLUMNS // (place[0].numel() * place.element_size()))
        block = torch.empty_like(place[:rows], memory_format=torch.contiguous_format)
        for first in range(0, len(place), rows):
            some = place[first : first + rows]
            values.fill(as_bytes(block[: len(some)]))
            some.copy_(block[: len(some)])
