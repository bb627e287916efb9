"""Bytes on disk, moved in blocks that stay in a processor's cache while they are read, hashed and written.

Whatever is read is compared with its checksum in the same pass, and whatever is written gets one.
"""

import os
from collections.abc import Buffer, Iterator
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import xxhash
from torch import Tensor

from megatron_ext.checkpoint.checksums import Checksums, Parts

BLOCK = 2**18
"""Bytes; Linux looks for one large page for a larger write: five times the time (6.18, ext4)."""


@dataclass(frozen=True)
class TensorEntry:
    """Shape and type of a tensor on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def count(self) -> int:
        """Its elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class StoredChunk(TensorEntry):
    """A tensor on disk, or a part of one: a record of a file, which holds its values and what a format puts around.

    Attributes:
        path: The file.
        start: The first byte of the record.
        length: Its bytes.
        values: The first byte of the values in the file; None if they are not just a row.
        checksums: Those of the directory, if it has any.
        by_torch: Whether the record is a file of `torch.save` that holds nothing else.
    """

    path: Path
    start: int
    length: int
    values: int | None
    checksums: Checksums | None = None
    by_torch: bool = False


class ChunkReader:
    """The values of a chunk, or all of its record, read once from front to back.

    Where the directory has checksums, all of the record is read, and compared when the block ends.
    """

    def __init__(self, chunk: StoredChunk, *, record: bool = False) -> None:
        assert record or chunk.values is not None
        self._chunk, self._hasher = chunk, xxhash.xxh3_64() if chunk.checksums else None
        self._first = chunk.start if record or chunk.values is None else chunk.values
        self._length = chunk.length if record else chunk.nbytes

    def __enter__(self) -> Self:
        self._file = self._chunk.path.open("rb", buffering=0)
        if self._hasher is None:
            self._file.seek(self._first)
        else:
            self._file.seek(self._chunk.start)
            self._skip(self._first - self._chunk.start)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._file:
            if kind is None and self._hasher is not None and self._chunk.checksums is not None:
                self._skip(self._chunk.start + self._chunk.length - self._file.tell())
                self._chunk.checksums.compare(self._chunk.path.name, self._chunk.start, self._hasher.hexdigest())

    def fill(self, memory: memoryview) -> None:
        """Read as many bytes as this memory takes.

        Raises:
            EOFError: The file ends before.
        """
        fill(self._file, memory, self._hasher)

    def blocks(self) -> Iterator[memoryview]:
        """All of it, in the same memory block by block."""
        memory, rest = memoryview(bytearray(min(BLOCK, self._length))), self._length
        while rest:
            block = memory[: min(BLOCK, rest)]
            self.fill(block)
            yield block
            rest -= len(block)

    def _skip(self, length: int) -> None:
        memory = memoryview(bytearray(min(BLOCK, length)))
        while length > 0:
            self.fill(memory[: min(BLOCK, length)])
            length -= min(BLOCK, length)


def values_of(chunk: StoredChunk) -> Iterator[memoryview]:
    """The values of a chunk, block by block."""
    with ChunkReader(chunk) as values:
        yield from values.blocks()


def fill(file: FileIO, memory: memoryview, hasher: xxhash.xxh3_64 | None = None) -> None:
    """Read as many bytes as this memory takes, and hash them.

    Raises:
        EOFError: The file ends before.
    """
    while memory:
        done = file.readinto(memory[:BLOCK])
        if not done:
            raise EOFError("the file ends too early")
        if hasher is not None:
            hasher.update(memory[:done])
        memory = memory[done:]


class DiskFile(FileIO):
    """A file being written, in parts that each get a checksum; other processes may write other parts of it.

    The disk begins at once with what was written, and not when memory fills or the file is flushed.
    """

    STRETCH = 2**26  # bytes between two requests to the disk

    def __init__(self, path: str | Path, *, shared: bool = False) -> None:
        keeping = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        super().__init__(path, "wb", opener=lambda name, flags: os.open(name, keeping if shared else flags, 0o666))
        self.parts: Parts = {}
        self._begun = self._part = 0
        self._hasher = xxhash.xxh3_64()

    def write(self, data: Buffer, /) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest:
            done = super().write(rest[:BLOCK]) or 0
            self._hasher.update(rest[:done])
            rest = rest[done:]
            here = self.tell()
            if here - self._begun >= self.STRETCH and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self.fileno(), self._begun, here - self._begun, os.POSIX_FADV_DONTNEED)
                self._begun = here
        return size

    def begin_part(self, offset: int) -> None:
        """Go to where the next part begins."""
        if offset != self._part:
            self._begun = self._part = self.seek(offset)

    def end_part(self) -> None:
        """Note the checksum of what was written since the last part."""
        here = self.tell()
        self.parts[self._part] = (here - self._part, self._hasher.hexdigest())
        self._part = here
        self._hasher.reset()


class ReusableBuffer:
    """Memory as large as the largest tensor that it has held: fresh pages cost more than copying into old ones."""

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


def as_bytes(tensor: Tensor) -> memoryview:
    """The values of a contiguous tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())
