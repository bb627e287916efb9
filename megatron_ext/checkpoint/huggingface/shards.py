"""Safetensors as they lie on disk: rows of tensors read into given memory, shards written one tensor after another.

A shard is eight bytes with the length of a header, the header (JSON: name to type, shape and place), and the values.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from megatron_ext.checkpoint import ranks
from megatron_ext.checkpoint.blocks import DiskFile, StoredChunk, TensorEntry, as_bytes, fill, values_of
from megatron_ext.checkpoint.checksums import Checksums, Parts
from megatron_ext.errors import CheckpointError
from megatron_ext.untrusted.paths import inside

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 10**9
HEADER_BYTES = 10**8  # safetensors' own limit
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _TYPES.items()}


@dataclass(frozen=True)
class ShardEntry(TensorEntry):
    """One tensor: its shape and type, its file, and the byte of it where the values begin."""

    path: Path
    offset: int


class Shards:
    """The tensors of a directory, as safetensors.

    Args:
        directory: The directory.
        name: The one file, or the index of several; by default what transformers reads: `SINGLE`, or else `INDEX`.

    Raises:
        CheckpointError: There are none, a shard is missing or damaged, or does not hold what the index says.
    """

    def __init__(self, directory: str | Path, name: str | None = None) -> None:
        directory = Path(directory)
        if not directory.is_dir():
            raise CheckpointError("the Hugging Face directory does not exist", got=directory)
        name = name or (INDEX if not (directory / SINGLE).is_file() and (directory / INDEX).is_file() else SINGLE)
        promised = read_index(directory, name) if name.endswith(".index.json") else {}
        self.entries: dict[str, ShardEntry] = {}
        self._checksums = Checksums.read(directory) or Checksums(directory, {})
        self._hashed: dict[str, tuple[int, xxhash.xxh3_64]] = {}
        files = sorted(set(promised.values())) or [name]
        for file in files:
            for key, entry in _header(directory, file).items():
                if key in self.entries:
                    raise CheckpointError(f"{key!r} is in two shards", got=f"{self.entries[key].path.name}, {file}")
                self.entries[key] = entry
        for key, file in promised.items():
            if key not in self.entries or self.entries[key].path != directory / file:
                raise CheckpointError(f"{key!r} is not in the shard that the index names", got=directory / file)
        for file in self._checksums.files.keys() & set(files):
            self._checksums.check(file)

    def fill(self, key: str, place: Tensor, rows: tuple[int, int] | None = None) -> None:
        """Read a tensor, or whole rows of it (entries of dimension 0).

        It is compared with its checksum once all of it was read, if that is done in order, and otherwise at once.

        Args:
            key: The tensor.
            place: Contiguous memory, of the tensor's type, for as many rows.
            rows: The first of them, and the end.

        Raises:
            CheckpointError: The tensor is not what was written (`checksums`).
        """
        entry = self.entries[key]
        first = 0 if rows is None else rows[0] * (entry.nbytes // max(1, entry.shape[0]))
        memory = as_bytes(place)
        with entry.path.open("rb", buffering=0) as file:
            file.seek(entry.offset + first)
            hasher = self._hasher(key, first)
            fill(file, memory, hasher)
        if hasher is None:
            return
        self._hashed[key] = first + len(memory), hasher
        if first + len(memory) == entry.nbytes:
            self._checksums.compare(entry.path.name, entry.offset, self._hashed.pop(key)[1].hexdigest())

    def _hasher(self, key: str, first: int) -> xxhash.xxh3_64 | None:
        """What hashes the tensor from this byte on; None if there is no checksum, or if it was compared now."""
        entry = self.entries[key]
        if entry.path.name not in self._checksums.files or not entry.nbytes:
            return None
        done, hasher = self._hashed.get(key, (0, xxhash.xxh3_64()))
        if first == done:
            return hasher
        if first == 0:
            return xxhash.xxh3_64()
        self._checksums.check(entry.path.name, entry.offset)
        return None

    def chunks(self, key: str, rows: tuple[int, int] | None = None) -> list[tuple[tuple[int, ...], StoredChunk]] | None:
        """All of a tensor as the one chunk that it is; None for some rows."""
        entry = self.entries[key]
        if rows not in (None, (0, entry.shape[0] if entry.shape else 0)):
            return None
        sums = self._checksums if entry.path.name in self._checksums.files else None
        chunk = StoredChunk(entry.shape, entry.dtype, entry.path, entry.offset, entry.nbytes, entry.offset, sums)
        return [((0,) * len(entry.shape), chunk)]


def read_index(directory: Path, name: str) -> dict[str, str]:
    """The file of each tensor, from the index of this name.

    Raises:
        CheckpointError: It is damaged.
    """
    path = inside(directory, name)
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not files or not all(isinstance(file, str) for file in files.values()):
            raise TypeError("weight_map is no table of files")
        return dict(files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"the index of the shards is damaged ({error!r})", got=path) from error


def _header(directory: Path, name: str) -> dict[str, ShardEntry]:
    """What a shard says it holds, checked against its size."""
    path = inside(directory, name)
    if not path.is_file():
        raise CheckpointError(f"the shard {name} is missing", got=directory)
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, HEADER_BYTES):
                raise ValueError("the header is cut short, or too long")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {}
        for name, described in header.items():
            if described["dtype"] not in _TYPES:
                raise CheckpointError(
                    f"{name!r} has a type that is not converted", got=described["dtype"], legal=", ".join(_TYPES)
                )
            dtype, shape = _TYPES[described["dtype"]], tuple(described["shape"])
            start, stop = described["data_offsets"]
            if any(type(number) is not int or number < 0 for number in (*shape, start, stop)):
                raise ValueError(f"{name} has a shape or a place that is none")
            if stop - start != prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} has another size than its shape")
            if 8 + length + stop > size:
                raise CheckpointError(
                    f"the shard {path.name} is cut short: {name!r} is not whole", got=f"{size} bytes",
                    legal=f"{8 + length + stop} bytes",
                )  # fmt: skip
            entries[name] = ShardEntry(shape, dtype, path, 8 + length + start)
        return entries
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"the shard {path.name} is damaged ({error})", got=path.parent) from error


@contextmanager
def writing_shards(
    directory: Path, tensors: Mapping[str, TensorEntry], shard_bytes: int = SHARD_BYTES
) -> Iterator["ShardWriter"]:
    """Write these tensors, in this order, into a directory: one file, or shards of at most `shard_bytes` and an index.

    A tensor larger than that is a shard of its own. In a process group all processes enter the block, and each writes
    tensors of its own.
    """
    writer = ShardWriter(directory, tensors, shard_bytes)
    with ranks.all_or_none():
        try:
            yield writer
        finally:
            writer.close()
    writer.finish()


class ShardWriter:
    """Shards being written. Made by `writing_shards`."""

    def __init__(self, directory: Path, tensors: Mapping[str, TensorEntry], shard_bytes: int) -> None:
        self._directory, self._tensors = directory, tensors
        self._written = set[str]()
        self._file: DiskFile | None = None
        self._open = ""
        self._checksums: dict[str, Parts] = {}
        groups: list[list[str]] = [[]]
        held = 0
        for name, entry in tensors.items():
            if groups[-1] and held + entry.nbytes > shard_bytes:
                groups.append([])
                held = 0
            groups[-1].append(name)
            held += entry.nbytes
        names = [SINGLE] if len(groups) == 1 else [
            f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)
        ]  # fmt: skip
        self._shards = dict(zip(names, groups, strict=True))
        self._headers = {shard: self._header(shard) for shard in names}
        self._places: dict[str, tuple[str, int]] = {}
        for shard, group in self._shards.items():
            offset = len(self._headers[shard])
            for name in group:
                self._places[name] = shard, offset
                offset += tensors[name].nbytes

    def write(self, key: str, tensor: Tensor, layer: tuple[int, int] | None = None) -> None:
        """Write a tensor to its place."""
        entry = self._tensors[key]
        assert layer is None
        assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, entry.dtype)
        self._write(key, [as_bytes(tensor.contiguous())])

    def write_values(
        self, key: str, entry: TensorEntry, chunks: Sequence[StoredChunk], layer: tuple[int, int] | None = None
    ) -> None:
        """As `write`, of values that lie on disk one after the other, which are never in memory."""
        assert layer is None
        assert entry == self._tensors[key]
        self._write(key, (block for chunk in chunks for block in values_of(chunk)))

    def _write(self, key: str, blocks: Iterable[memoryview]) -> None:
        assert key not in self._written
        self._written.add(key)
        shard, offset = self._places[key]
        if shard != self._open or self._file is None:
            self.close()
            self._file, self._open = DiskFile(self._directory / shard, shared=True), shard
        if key == self._shards[shard][0]:
            self._file.begin_part(0)
            self._file.write(self._headers[shard])
            self._file.end_part()
        self._file.begin_part(offset)
        for block in blocks:
            self._file.write(block)
        if self._tensors[key].nbytes:
            self._file.end_part()

    def _header(self, shard: str) -> bytes:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in self._shards[shard]:
            entry = self._tensors[name]
            places = [offset, offset + entry.nbytes]
            header[name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": places}
            offset += entry.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def close(self) -> None:
        """Close the shard that is open."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._checksums.setdefault(self._open, {}).update(self._file.parts)
            self._file.close()
            self._file = None

    def finish(self) -> None:
        """Write the index, if there are several shards, and the checksums."""
        gathered = ranks.gather((self._written, self._checksums))
        assert set().union(*(written for written, _ in gathered)) == set(self._tensors)
        if ranks.rank() > 0:
            return
        if len(self._shards) > 1:
            total = sum(entry.nbytes for entry in self._tensors.values())
            where = {name: shard for name, (shard, _) in self._places.items()}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            (self._directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        sums: dict[str, Parts] = {shard: {} for shard in self._shards}
        for _, checksums in gathered:
            for shard, parts in checksums.items():
                sums[shard] |= parts
        Checksums(self._directory, sums).write()
