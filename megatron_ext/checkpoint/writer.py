"""Checkpoints tensor by tensor, written as any layout loads them.

Memory holds one tensor at a time. Processes of one group write a checkpoint together, each its own file of it; without
a group, one process does it all.
"""

import json
import os
import pickle
import uuid
from argparse import Namespace
from collections.abc import Buffer, Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from io import FileIO
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import torch
import xxhash
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
from megatron_ext.checkpoint.atomic import fresh_directory
from megatron_ext.checkpoint.checksums import WHOLE, Checksums, Parts, checksum, whole
from megatron_ext.checkpoint.reader import BLOCK, Stored
from megatron_ext.errors import CheckpointError
from megatron_ext.models import axes
from megatron_ext.models.architecture import Architecture


class DiskFile(FileIO):
    """Written in pieces, because Linux looks for one large page for a large write: five times the time (6.18, ext4).

    The disk begins at once with what was written, and not when memory fills or the file is flushed. What is written
    goes into a checksum on the way, while it is in the processor's cache.
    """

    PIECE = 2**18
    STRETCH = 2**26  # bytes between two requests to the disk
    _begun = _part = 0

    def __init__(self, path: str | Path, mode: Literal["wb"] = "wb") -> None:
        super().__init__(path, mode)
        self.parts: Parts = {}
        self._hasher = xxhash.xxh3_64()

    def write(self, data: Buffer, /) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest:
            done = super().write(rest[: self.PIECE]) or 0
            self._hasher.update(rest[:done])
            rest = rest[done:]
            self.begin()
        return size

    def end_part(self, checksum: str | None = None) -> None:
        """Note the checksum of what was written since the last part: this one, if it was not written by `write`."""
        here, told = self.tell(), checksum or self._hasher.hexdigest()
        self.parts[self._part] = (here - self._part, told)
        self._part = here
        self._hasher.reset()

    def begin(self) -> None:
        """Ask the disk to take what was written since the last time."""
        here = self.tell()
        if here - self._begun >= self.STRETCH and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fileno(), self._begun, here - self._begun, os.POSIX_FADV_DONTNEED)
            self._begun = here


Progress = Callable[[int, int], None]
"""Called with the bytes written, and those to write in all."""


def silent(done: int, total: int) -> None:
    """No progress shown."""


@dataclass(frozen=True)
class Form:
    """How a checkpoint keeps a model.

    Attributes:
        tensors: Its weights by key, with their global shapes.
        states: Modules that ask for an `_extra_state`, and the grid of such objects that each has.
        args: Megatron's arguments.
    """

    tensors: Callable[[Architecture], dict[str, tuple[int, ...]]]
    states: Callable[[Architecture], dict[str, tuple[int, ...]]]
    args: Callable[[Architecture], dict[str, Any]]


PATTERN = Form(
    axes.tensors,
    lambda arch: {module: (count,) for module, count in axes.modules_with_state(arch).items()},
    Architecture.to_args,
)


class Writer:
    """The weights of one step, being written. Made by `writing`."""

    def __init__(self, step: Path, file: DiskFile) -> None:
        self._step = step
        self._file = file
        self._name = Path(str(file.name)).name
        self._metadata: dict[str, Any] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}

    def write(self, key: str, tensor: Tensor) -> None:
        """Append one whole tensor."""
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # torch.save would write all of the storage that a view looks at
        origin = torch.Size([0] * tensor.dim())
        chunk = ChunkStorageMetadata(offsets=origin, sizes=tensor.shape)
        properties = TensorProperties(dtype=tensor.dtype)
        entry = TensorStorageMetadata(properties=properties, size=tensor.shape, chunks=[chunk])
        self._append(MetadataIndex(key, origin), entry, tensor)

    def copy(self, key: str, entry: TensorStorageMetadata, parts: Sequence[tuple[tuple[int, ...], Stored]]) -> None:
        """Append one whole tensor in the parts that it has on disk."""
        if key in self._metadata:
            raise CheckpointError(f"{key!r} is written twice")
        chunks = []
        for offset, stored in parts:
            start = self._file.tell()
            self._copy(stored)
            chunks.append(ChunkStorageMetadata(torch.Size(offset), stored.tensor.shape))
            index = MetadataIndex(key, torch.Size(offset))
            self._storage[index] = _StorageInfo(self._name, start, self._file.tell() - start)
        properties = TensorProperties(dtype=entry.properties.dtype)
        self._metadata[key] = TensorStorageMetadata(properties=properties, size=entry.size, chunks=chunks)

    def _copy(self, stored: Stored) -> None:
        with stored.path.open("rb", buffering=0) as source:
            source.seek(stored.info.offset)
            rest = stored.info.length
            while rest:
                done = os.sendfile(self._file.fileno(), source.fileno(), None, min(rest, BLOCK))
                if not done:
                    raise CheckpointError("the checkpoint is damaged: a file ends too early", got=stored.path)
                rest -= done
                self._file.begin()
        self._file.end_part(stored.checksum or checksum(stored.path, stored.info.offset, stored.info.length))

    def write_layer(self, key: str, tensor: Tensor, layer: int, layers: int) -> None:
        """Append one layer's part of a tensor (layers, ...) whose other parts are written likewise."""
        tensor = tensor.detach().cpu().contiguous()[None]
        size = torch.Size((layers, *tensor.shape[1:]))
        offset = torch.Size((layer, *[0] * (tensor.dim() - 1)))
        entry = TensorStorageMetadata(properties=TensorProperties(dtype=tensor.dtype), size=size, chunks=[])
        entry = self._metadata.get(key, entry)
        if entry.size != size or MetadataIndex(key, offset) in self._storage:
            raise CheckpointError(f"layer {layer} of {key!r} is written twice, or is of another shape")
        self._metadata.pop(key, None)
        entry.chunks.append(ChunkStorageMetadata(offsets=offset, sizes=tensor.shape))
        self._append(MetadataIndex(key, offset), entry, tensor)

    def write_object(self, key: str, value: Any, grid: tuple[int, ...] = (1,)) -> None:
        """Append one object, as a Megatron `ShardedObject` whose shards, a grid of so many, are all alike."""
        size = ".".join(map(str, grid))
        for place in product(*map(range, grid)):
            name = f"{key}/shard_{'.'.join(map(str, place))}_{size}"
            self._append(MetadataIndex(name), BytesStorageMetadata(), [value])

    def attach(self, name: str, save: Callable[[Path], object]) -> None:
        """Let `save` write a file of this name beside the step, such as the plan that made it."""
        save(self._step.parent / name)

    def _append(self, index: MetadataIndex, entry: TensorStorageMetadata | BytesStorageMetadata, value: Any) -> None:
        if index.fqn in self._metadata:
            raise CheckpointError(f"{index.fqn!r} is written twice")
        offset = self._file.tell()
        with _without_checksums():
            torch.save(value, cast(BinaryIO, self._file))
        self._file.end_part()
        self._metadata[index.fqn] = entry
        self._storage[index] = _StorageInfo(self._name, offset, self._file.tell() - offset)

    def part(self) -> tuple[dict[str, Any], dict[MetadataIndex, _StorageInfo]]:
        """What was written so far: entries of the index, and where they lie."""
        return self._metadata, self._storage

    def add(self, metadata: dict[str, Any], storage: dict[MetadataIndex, _StorageInfo]) -> None:
        """Take what another process wrote into the index.

        Raises:
            CheckpointError: It was written by both.
        """
        if twice := sorted(metadata.keys() & self._metadata.keys()):
            raise CheckpointError(f"{twice[0]!r} is written twice")
        self._metadata |= metadata
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
    path: str | Path, arch: Architecture, args: Namespace | None = None, form: Form = PATTERN
) -> Iterator[Writer]:
    """Write a checkpoint of `arch` that Megatron loads in any layout; the block writes its tensors.

    It becomes a `release`: weights only, from iteration 0, with a fresh optimizer. All of it appears when the block
    ends well, and nothing otherwise; a process that is killed leaves a hidden directory `.NAME.*` beside `path`. In a
    process group all processes enter the block, each writes tensors of its own, and what is attached is the first's.

    Args:
        path: A new directory, the same one for all processes.
        arch: The model; the block must write exactly its tensors (`form.tensors`).
        args: Megatron's arguments of the model that this one comes from; sizes and counters are set anew.
        form: What the tensors are called.

    Raises:
        CheckpointError: `path` exists already, or the tensors written are not those of `arch`, or another process
            failed.
    """
    with _shared_directory(path) as directory:
        step = directory / layout.RELEASE
        step.mkdir(exist_ok=True)
        with DiskFile(step / f"__{ranks.rank()}_0.distcp", "wb") as file:
            writer = Writer(step, file)
            with _together():
                yield writer
                os.fsync(file.fileno())
            parts = ranks.gather((writer.part(), writer.checksums()))
            if ranks.rank() == 0:
                others: dict[str, Parts] = {}
                for part, checksums in parts[1:]:
                    writer.add(*part)
                    others |= checksums
                check_tensors(form.tensors(arch), writer.shapes)
                for module, grid in form.states(arch).items():
                    writer.write_object(f"{module}._extra_state", None, grid)
                writer.finish(_common_state(form.args(arch), args), others)
                (directory / layout.TRACKER).write_text(layout.RELEASE, encoding="utf-8")


@contextmanager
def _shared_directory(path: str | Path) -> Iterator[Path]:
    """`fresh_directory` of the first process, for all of them."""
    with _together(), fresh_directory(path) if ranks.rank() == 0 else nullcontext() as own:
        yield Path(str(ranks.gather(own)[0]))


@contextmanager
def _together() -> Iterator[None]:
    """End the block on all processes, or raise on all of them, so that none waits for one that failed."""
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    others = [told for told in ranks.gather(None if problem is None else str(problem)) if told is not None]
    if problem is not None:
        raise problem
    if others:
        raise CheckpointError(f"another process could not write its part: {others[0]}")


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
