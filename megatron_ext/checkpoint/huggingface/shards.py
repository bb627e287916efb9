"""Safetensors as they lie on disk: rows of tensors read into given memory, shards written one tensor after another.

A shard is eight bytes with the length of a header, the header (JSON: name to type, shape and place), and the values.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.checkpoint.checksums import Checksums, Parts
from megatron_ext.checkpoint.reader import fill
from megatron_ext.checkpoint.writer import DiskFile
from megatron_ext.errors import CheckpointError
from megatron_ext.untrusted import inside

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 10**9
HEADER_BYTES = 10**8  # safetensors' own limit
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _TYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor: its shape and type, its file, and the byte of it where the values begin."""

    shape: tuple[int, ...]
    dtype: torch.dtype
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
        self.entries: dict[str, Entry] = {}
        self._checksums = Checksums.read(directory) or Checksums(directory, {})
        self._compared = set[str]()
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

    def read(self, name: str, place: Tensor, first: int = 0) -> None:
        """Read whole rows (entries of dimension 0) of a tensor.

        Args:
            name: The tensor.
            place: Contiguous memory, of the tensor's type, for as many rows as it holds.
            first: The first of them.

        Raises:
            CheckpointError: The tensor is not what was written (`checksums`).
        """
        entry = self.entries[name]
        if entry.path.name in self._checksums.files and name not in self._compared:
            self._checksums.check(entry.path.name, entry.offset)
            self._compared.add(name)
        row = prod(entry.shape[1:]) * entry.dtype.itemsize
        with entry.path.open("rb", buffering=0) as file:
            file.seek(entry.offset + first * row)
            if place.numel():
                fill(file, place)


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


def _header(directory: Path, name: str) -> dict[str, Entry]:
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
        for name, told in header.items():
            if told["dtype"] not in _TYPES:
                raise CheckpointError(
                    f"{name!r} has a type that is not converted", got=told["dtype"], legal=", ".join(_TYPES)
                )
            dtype, shape = _TYPES[told["dtype"]], tuple(told["shape"])
            start, stop = told["data_offsets"]
            if any(type(number) is not int or number < 0 for number in (*shape, start, stop)):
                raise ValueError(f"{name} has a shape or a place that is none")
            if stop - start != prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} has another size than its shape")
            if 8 + length + stop > size:
                raise CheckpointError(
                    f"the shard {path.name} is cut short: {name!r} is not whole", got=f"{size} bytes",
                    legal=f"{8 + length + stop} bytes",
                )  # fmt: skip
            entries[name] = Entry(shape, dtype, path, 8 + length + start)
        return entries
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"the shard {path.name} is damaged ({error})", got=path.parent) from error


@contextmanager
def writing_shards(
    directory: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], shard_bytes: int = SHARD_BYTES
) -> Iterator["ShardWriter"]:
    """Write these tensors, in this order, into a directory: one file, or shards of at most `shard_bytes` and an index.

    A tensor larger than that is a shard of its own.
    """
    writer = ShardWriter(directory, tensors, shard_bytes)
    try:
        yield writer
        writer.finish()
    finally:
        writer.close()


class ShardWriter:
    """Shards being written. Made by `writing_shards`."""

    def __init__(
        self, directory: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], shard_bytes: int
    ) -> None:
        self._directory, self._tensors = directory, tensors
        self._rest = list(tensors)
        self._file: DiskFile | None = None
        self._checksums: dict[str, Parts] = {}
        groups: list[list[str]] = [[]]
        held = 0
        for name, (shape, dtype) in tensors.items():
            size = prod(shape) * dtype.itemsize
            if groups[-1] and held + size > shard_bytes:
                groups.append([])
                held = 0
            groups[-1].append(name)
            held += size
        names = [SINGLE] if len(groups) == 1 else [
            f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)
        ]  # fmt: skip
        self._shards = dict(zip(names, groups, strict=True))
        self._starts = {group[0]: name for name, group in self._shards.items() if group}

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor."""
        shape, dtype = self._tensors[name]
        assert self._rest.pop(0) == name
        assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
        if name in self._starts:
            self._open(self._starts[name])
        assert self._file is not None
        self._file.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
        if tensor.numel():
            self._file.end_part()

    def _open(self, shard: str) -> None:
        self.close()
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in self._shards[shard]:
            shape, dtype = self._tensors[name]
            size = prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = DiskFile(self._directory / shard, "wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.end_part()
        self._checksums[shard] = self._file.parts

    def close(self) -> None:
        """Close the shard that is open."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def finish(self) -> None:
        """Write the index, if there are several shards, and the checksums."""
        assert not self._rest
        if len(self._shards) > 1:
            total = sum(prod(shape) * dtype.itemsize for shape, dtype in self._tensors.values())
            where = {name: shard for shard, group in self._shards.items() for name in group}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            (self._directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        Checksums(self._directory, self._checksums).write()
