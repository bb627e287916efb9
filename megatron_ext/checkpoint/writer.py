"""Checkpoints tensor by tensor, written as any layout loads them.

Memory holds one tensor at a time. Processes of one group write a checkpoint together, each its own file of it; without
a group, one process does it all.
"""

import json
import os
import pickle
import uuid
from argparse import Namespace
from collections.abc import Buffer, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_ext.checkpoint import layout, ranks
from megatron_ext.checkpoint.atomic import shared_directory
from megatron_ext.checkpoint.blocks import ChunkReader, DiskFile, StoredChunk, TensorEntry, values_of
from megatron_ext.checkpoint.checksums import WHOLE, Checksums, Parts, whole
from megatron_ext.errors import CheckpointError
from megatron_ext.models import axes
from megatron_ext.models.architecture import Architecture


@dataclass(frozen=True)
class CheckpointSchema:
    """How a checkpoint keeps a model of some family.

    Attributes:
        tensors: Its weights by key, with their global shapes.
        states: Modules that ask for an `_extra_state`, and the grid of such objects that each has.
        args: Megatron's arguments.
    """

    tensors: Callable[[Any], dict[str, tuple[int, ...]]]
    states: Callable[[Any], dict[str, tuple[int, ...]]]
    args: Callable[[Any], dict[str, Any]]


PATTERN = CheckpointSchema(
    axes.tensors,
    lambda arch: {module: (count,) for module, count in axes.modules_with_state(arch).items()},
    Architecture.to_args,
)


class CheckpointWriter:
    """The weights of one step, being written. Made by `writing`."""

    def __init__(self, step: Path, file: DiskFile) -> None:
        self._step = step
        self._file = file
        self._name = Path(str(file.name)).name
        self._metadata: dict[str, Any] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}

    def write(self, key: str, tensor: Tensor, layer: tuple[int, int] | None = None) -> None:
        """Append one whole tensor, or an entry of the first dimension of one whose other entries are written likewise.

        Args:
            key: Its key.
            tensor: The tensor, or the entry.
            layer: Which entry it is, and of how many.
        """
        tensor = tensor.detach().cpu().contiguous()
        tensor = tensor if layer is None else tensor[None]
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # torch.save would write all of the storage that a view looks at
        self._append_chunk(key, tensor, layer)

    def write_values(
        self, key: str, entry: TensorEntry, chunks: Sequence[StoredChunk], layer: tuple[int, int] | None = None
    ) -> None:
        """As `write`, of values that lie on disk one after the other, which are never in memory."""
        shape = entry.shape if layer is None else (1, *entry.shape)
        blocks = (block for chunk in chunks for block in values_of(chunk))
        self._append_chunk(key, torch.empty(shape, dtype=entry.dtype), layer, blocks)

    def copy(self, key: str, entry: TensorEntry, chunks: Sequence[tuple[tuple[int, ...], StoredChunk]]) -> None:
        """Append one whole tensor as it lies on disk, in the chunks that it has there, with their offsets."""
        for offset, chunk in chunks:
            start = self._file.tell()
            with ChunkReader(chunk, record=True) as record:
                for block in record.blocks():
                    self._file.write(block)
            self._file.end_part()
            self._enter(key, entry, torch.Size(offset), torch.Size(chunk.shape), start)

    def _append_chunk(
        self, key: str, tensor: Tensor, layer: tuple[int, int] | None, values: Iterable[Buffer] | None = None
    ) -> None:
        first, count = layer or (0, tensor.shape[0] if tensor.dim() else 1)
        shape = (count, *tensor.shape[1:]) if tensor.dim() else ()
        offset = torch.Size((first, *[0] * (tensor.dim() - 1)) if tensor.dim() else ())
        start = self._file.tell()
        self._append(tensor, values)
        self._enter(key, TensorEntry(shape, tensor.dtype), offset, tensor.shape, start)

    def _enter(self, key: str, entry: TensorEntry, offset: torch.Size, sizes: torch.Size, start: int) -> None:
        """Note in the index where a chunk lies, which was just written."""
        index, properties = MetadataIndex(key, offset), TensorProperties(dtype=entry.dtype)
        chunk = ChunkStorageMetadata(offsets=offset, sizes=sizes)
        metadata = TensorStorageMetadata(properties=properties, size=torch.Size(entry.shape), chunks=[chunk])
        self.add({key: metadata}, {index: _StorageInfo(self._name, start, self._file.tell() - start)})

    def write_object(self, key: str, value: Any, grid: tuple[int, ...] = (1,)) -> None:
        """Append one object, as a Megatron `ShardedObject` whose shards, a grid of so many, are all alike."""
        size = ".".join(map(str, grid))
        for place in product(*map(range, grid)):
            name = f"{key}/shard_{'.'.join(map(str, place))}_{size}"
            start = self._file.tell()
            self._append([value])
            place = _StorageInfo(self._name, start, self._file.tell() - start)
            self.add({name: BytesStorageMetadata()}, {MetadataIndex(name): place})

    def attach(self, name: str, save: Callable[[Path], object]) -> None:
        """Let `save` write a file of this name beside the step, such as the plan that made it."""
        if ranks.rank() == 0:
            save(self._step.parent / name)

    def _append(self, value: Any, values: Iterable[Buffer] | None = None) -> None:
        """Write a record; the values of its only tensor are these blocks, if they are given."""
        record = _Record(self._file, 0 if values is None else value.nbytes, values or ())
        with _without_checksums():
            try:
                torch.save(value, cast(BinaryIO, record))
            except RuntimeError:  # all that torch says of what failed while it was writing
                if record.problem is not None:
                    raise record.problem from None
                raise
        self._file.end_part()

    def part(self) -> tuple[dict[str, Any], dict[MetadataIndex, _StorageInfo]]:
        """What was written so far: entries of the index, and where they lie."""
        return self._metadata, self._storage

    def add(self, metadata: dict[str, Any], storage: dict[MetadataIndex, _StorageInfo]) -> None:
        """Take entries into the index, of another process for example; a tensor may be in parts.

        Raises:
            CheckpointError: Something is written twice, or a tensor in parts of several shapes.
        """
        if twice := [index.fqn for index in storage if index in self._storage]:
            raise CheckpointError(f"{twice[0]!r} is written twice")
        for key, entry in metadata.items():
            known = self._metadata.setdefault(key, entry)
            if known is entry:
                continue
            if (known.size, known.properties.dtype) != (entry.size, entry.properties.dtype):
                raise CheckpointError(f"{key!r} is written twice, or in parts of several shapes")
            known.chunks.extend(entry.chunks)
        self._storage |= storage

    def checksums(self) -> dict[str, Parts]:
        """Of this process's file, as far as it is written."""
        return {self._name: self._file.parts}

    def finish(self, common: dict[str, Any], others: dict[str, Parts] | None = None) -> None:
        """Write what is not a tensor, the index, the file that says that the step is complete, and the checksums.

        Args:
            common: What is not a tensor.
            others: Checksums of the other processes' files.
        """
        self.write_object("common_state", common)
        meta = StorageMeta(save_id=str(uuid.uuid4()))
        metadata = Metadata(self._metadata, storage_data=self._storage, storage_meta=meta, version="1.0.0")
        (self._step / ".metadata").write_bytes(pickle.dumps(metadata))
        (self._step / "metadata.json").write_text(json.dumps(layout.FORMAT), encoding="utf-8")
        Checksums(self._step, (others or {}) | self.checksums() | whole(self._step, WHOLE)).write()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors written so far."""
        return {k: tuple(e.size) for k, e in self._metadata.items() if isinstance(e, TensorStorageMetadata)}


class _Record:
    """A record that torch writes in some forty pieces, which become few; its values may be blocks from elsewhere.

    Args:
        file: Where it goes.
        size: Bytes of the tensor whose values are replaced, and whose memory is never touched; 0 for none.
        blocks: What they are replaced by.
    """

    LARGE = 2**14

    def __init__(self, file: DiskFile, size: int, blocks: Iterable[Buffer]) -> None:
        self._file, self._size, self._blocks, self._pieces = file, size, blocks, bytearray()
        self.problem: Exception | None = None

    def write(self, data: Buffer, /) -> int:
        size = memoryview(data).nbytes
        if size < self.LARGE:
            self._pieces += data
            return size
        self.flush()
        try:
            written = sum(map(self._file.write, self._blocks if size == self._size else (data,)))
        except Exception as error:
            self.problem = error
            raise
        assert written == size
        return size

    def flush(self) -> None:
        self._file.write(self._pieces)
        self._pieces = bytearray()


@contextmanager
def _without_checksums() -> Iterator[None]:
    """torch.load does not look at the checksums that torch.save spends a third of its time on."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


@contextmanager
def writing(
    path: str | Path, arch: Any, args: Namespace | None = None, schema: CheckpointSchema = PATTERN
) -> Iterator[CheckpointWriter]:
    """Write a checkpoint of `arch` that Megatron loads in any layout; the block writes its tensors.

    It becomes a `release`: weights only, from iteration 0, with a fresh optimizer. All of it appears when the block
    ends well, and nothing otherwise; a process that is killed leaves a hidden directory `.NAME.*` beside `path`. In a
    process group all processes enter the block, each writes tensors of its own, and what is attached is the first's.

    Args:
        path: A new directory, the same one for all processes.
        arch: The model, by default an `Architecture`; the block must write exactly its tensors (`schema.tensors`).
        args: Megatron's arguments of the model that this one comes from; sizes and counters are set anew.
        schema: What the tensors are called.

    Raises:
        CheckpointError: `path` exists already, or the tensors written are not those of `arch`, or another process
            failed.
    """
    with shared_directory(path) as directory:
        step = directory / layout.RELEASE
        step.mkdir(exist_ok=True)
        with DiskFile(step / f"__{ranks.rank()}_0.distcp") as file:
            writer = CheckpointWriter(step, file)
            with ranks.all_or_none():
                yield writer
                os.fsync(file.fileno())
            parts = ranks.gather((writer.part(), writer.checksums()))
            if ranks.rank() == 0:
                others: dict[str, Parts] = {}
                for part, checksums in parts[1:]:
                    writer.add(*part)
                    others |= checksums
                check_tensors(schema.tensors(arch), writer.shapes)
                for module, grid in schema.states(arch).items():
                    writer.write_object(f"{module}._extra_state", None, grid)
                writer.finish(_common_state(schema.args(arch), args), others)
                (directory / layout.TRACKER).write_text(layout.RELEASE, encoding="utf-8")


def check_shapes(arch: Architecture, shapes: dict[str, tuple[int, ...]]) -> None:
    """Check that a checkpoint holds exactly the tensors of `arch`, as `check_tensors`."""
    check_tensors(axes.tensors(arch), shapes)


def check_tensors(expected: dict[str, tuple[int, ...]], shapes: dict[str, tuple[int, ...]]) -> None:
    """Check that there are exactly the tensors that are expected.

    Raises:
        CheckpointError: Names the first few that are missing, too many, or of another shape.
    """
    wrong = [f"{key} is missing" for key in expected if key not in shapes]
    wrong += [f"{key} is not part of the model" for key in shapes if key not in expected]
    wrong += [
        f"{key} is {shapes[key]} instead of {shape}"
        for key, shape in expected.items()
        if key in shapes and shapes[key] != shape
    ]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError("the tensors are not those of the model", got="; ".join(wrong[:3]) + more)


def _common_state(model: dict[str, Any], args: Namespace | None) -> dict[str, Any]:
    values = vars(args) if args is not None else {}
    counters = {"iteration": 0, "consumed_train_samples": 0, "consumed_valid_samples": 0, "skipped_train_samples": 0}
    layout_args = {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "no_save_optim": True,
        "no_save_rng": True,
    }
    return {
        "args": Namespace(**(values | model | counters | layout_args)),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
