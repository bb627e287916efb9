"""Checkpoints tensor by tensor: reading whole tensors whatever layout saved them, writing what any layout loads.

Memory holds one tensor at a time, and a copy of it. No model is built, no process group is needed.
"""

import json
import pickle
import uuid
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.atomic import fresh_directory
from megatron_ext.errors import CheckpointError
from megatron_ext.models import axes
from megatron_ext.models.config import Architecture

DATA_FILE = "__0_0.distcp"


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
        for index, info in metadata.storage_data.items():
            if index.offset is not None:
                self._chunks[index.fqn].append((tuple(index.offset), info))

    def read(self, key: str) -> Tensor:
        """One whole tensor, on the CPU, in the type it was saved in.

        Raises:
            CheckpointError: There is none of this key, or not all of it.
        """
        entry = self._entries.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"the checkpoint has no tensor {key!r}", got=self.step.path)
        whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        covered = 0
        for offset, info in self._chunks[key]:
            chunk = self._load(key, info)
            if len(offset) != whole.dim() or chunk.dim() != whole.dim() or chunk.dtype != whole.dtype:
                raise CheckpointError(f"the checkpoint is damaged: a part of {key!r} does not fit", got=self.step.path)
            if any(start + size > length for start, size, length in zip(offset, chunk.shape, whole.shape, strict=True)):
                raise CheckpointError(f"the checkpoint is damaged: a part of {key!r} lies outside", got=self.step.path)
            whole[tuple(slice(start, start + size) for start, size in zip(offset, chunk.shape, strict=True))] = chunk
            covered += chunk.numel()
            del chunk  # before the next one is read
        if covered != whole.numel():  # parts have distinct offsets and, from one grid, do not overlap
            raise CheckpointError(
                f"the checkpoint is damaged: {key!r} is not whole", got=f"{covered} of {whole.numel()} elements"
            )  # fmt: skip
        return whole

    def _load(self, key: str, info: _StorageInfo) -> Tensor:
        with (self.step.path / info.relative_path).open("rb") as file:
            try:
                part = cast(BinaryIO, _create_file_view(file, info.offset, info.length))
                return torch.load(part, map_location="cpu", weights_only=True)
            except Exception as error:  # the unpickler raises nearly anything on damaged bytes
                what = f"the checkpoint is damaged: {key!r} cannot be read"
                raise CheckpointError(what, got=self.step.path) from error


class Writer:
    """The weights of one step, being written. Made by `writing`."""

    def __init__(self, step: Path, file: BinaryIO) -> None:
        self._step = step
        self._file = file
        self._metadata: dict[str, Any] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}

    def write(self, key: str, tensor: Tensor) -> None:
        """Append one whole tensor."""
        # clone: torch.save would write all of the storage that a view looks at
        tensor = tensor.detach().cpu().contiguous().clone()
        origin = torch.Size([0] * tensor.dim())
        chunk = ChunkStorageMetadata(offsets=origin, sizes=tensor.shape)
        properties = TensorProperties(dtype=tensor.dtype)
        entry = TensorStorageMetadata(properties=properties, size=tensor.shape, chunks=[chunk])
        self._append(MetadataIndex(key, origin), entry, tensor)

    def write_object(self, key: str, value: Any, shards: int = 1) -> None:
        """Append one object, as a Megatron `ShardedObject` whose shards are all alike."""
        for shard in range(shards):
            self._append(MetadataIndex(f"{key}/shard_{shard}_{shards}"), BytesStorageMetadata(), [value])

    def attach(self, name: str, save: Callable[[Path], object]) -> None:
        """Let `save` write a file of this name beside the step, such as the plan that made it."""
        save(self._step.parent / name)

    def _append(self, index: MetadataIndex, entry: TensorStorageMetadata | BytesStorageMetadata, value: Any) -> None:
        if index.fqn in self._metadata:
            raise CheckpointError(f"{index.fqn!r} is written twice")
        offset = self._file.tell()
        torch.save(value, self._file)
        self._metadata[index.fqn] = entry
        self._storage[index] = _StorageInfo(DATA_FILE, offset, self._file.tell() - offset)

    def finish(self, common: dict[str, Any]) -> None:
        """Write what is not a tensor, the index, and last the file that says that the step is complete."""
        self.write_object("common_state", common)
        meta = StorageMeta(save_id=str(uuid.uuid4()))
        metadata = Metadata(self._metadata, storage_data=self._storage, storage_meta=meta, version="1.0.0")
        (self._step / ".metadata").write_bytes(pickle.dumps(metadata))
        (self._step / "metadata.json").write_text(json.dumps(layout.FORMAT), encoding="utf-8")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors written so far."""
        return {k: tuple(e.size) for k, e in self._metadata.items() if isinstance(e, TensorStorageMetadata)}


@contextmanager
def writing(path: str | Path, arch: Architecture, args: Namespace | None = None) -> Iterator[Writer]:
    """Write a checkpoint of `arch` that Megatron loads in any layout; the block writes its tensors.

    It becomes a `release`: weights only, from iteration 0, with a fresh optimizer. All of it appears when the block
    ends well, and nothing otherwise.

    Args:
        path: A new directory.
        arch: The model; the block must write exactly its tensors (`megatron_ext.models.axes.tensors`).
        args: Megatron's arguments of the model that this one comes from; sizes and counters are set anew.

    Raises:
        CheckpointError: `path` exists already, or the tensors written are not those of `arch`.
    """
    with fresh_directory(path) as directory:
        step = directory / layout.RELEASE
        step.mkdir()
        with (step / DATA_FILE).open("wb") as file:
            writer = Writer(step, file)
            yield writer
            check_shapes(arch, writer.shapes)
            for module, count in axes.modules_with_state(arch).items():
                writer.write_object(f"{module}._extra_state", None, count)
            writer.finish(_common_state(arch, args))
        (directory / layout.TRACKER).write_text(layout.RELEASE, encoding="utf-8")


def check_shapes(arch: Architecture, shapes: dict[str, tuple[int, ...]]) -> None:
    """Check that a checkpoint holds exactly the tensors of `arch`.

    Raises:
        CheckpointError: Names the first few that are missing, too many, or of another shape.
    """
    expected = axes.tensors(arch)
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


def _common_state(arch: Architecture, args: Namespace | None) -> dict[str, Any]:
    values = vars(args) if args is not None else {}
    counters = {"iteration": 0, "consumed_train_samples": 0, "consumed_valid_samples": 0, "skipped_train_samples": 0}
    layout_args = {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "no_save_optim": True,
        "no_save_rng": True,
    }
    return {
        "args": Namespace(**(values | arch.to_args() | counters | layout_args)),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
