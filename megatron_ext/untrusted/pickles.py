"""Pickles of others: read without running what they bring.

A pickle is a program. It may name what a table here holds, pair by pair of module and name, and gets the object of the
table, so that nothing is imported and no attribute of an object is reached.
"""

import argparse
import collections
import io
import pathlib
import pickle
import re
import signal
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import EnumType
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch
from torch.distributed.checkpoint import filesystem, planner
from torch.distributed.checkpoint import metadata as index
from torch.distributed.checkpoint.metadata import Metadata

from megatron_ext.errors import CheckpointError, UntrustedError
from megatron_ext.untrusted.paths import inside


def _layout(name: str) -> torch.layout:
    return {str(known): known for known in (torch.strided, torch.sparse_coo)}[name]


def _member(kind: Any, name: str = "") -> Any:
    """`getattr`, by which Python 3.11 pickles members of an enumeration, and for nothing else."""
    if kind is Unknown:
        return Unknown()
    if not (isinstance(kind, EnumType) and name in kind.__members__):
        raise refusal("builtins.getattr", "a pickle")
    return kind[name]


_OLDER = "torch.distributed._shard.sharded_tensor.metadata"
_INDEX: dict[tuple[str, str], Any] = {
    **{(kind.__module__, kind.__name__): kind for kind in (
        index.Metadata, index.MetadataIndex, index.TensorStorageMetadata, index.BytesStorageMetadata,
        index.ChunkStorageMetadata, index.TensorProperties, index.StorageMeta, index._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo, filesystem._StoragePrefix, planner.SavePlan, planner.WriteItem,
        planner.WriteItemType, planner.TensorWriteData, planner.BytesIOWriteData, collections.OrderedDict,
    )},
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype | torch.layout)},
    # Where torch before 2.3 had them.
    (_OLDER, "TensorProperties"): index.TensorProperties, (_OLDER, "MEM_FORMAT_ENCODING"): index._MEM_FORMAT_ENCODING,
    **{(module, "getattr"): _member for module in ("builtins", "__builtin__")},
    ("torch", "Size"): torch.Size, ("torch", "device"): torch.device, ("torch.serialization", "_get_layout"): _layout,
    **{(module, name): pathlib.PurePosixPath for module in ("pathlib", "pathlib._local")
       for name in ("PosixPath", "PurePosixPath")},
}  # fmt: skip
"""What `torch.distributed.checkpoint` and Megatron write into `.metadata`."""

_OBJECTS: tuple[Any, ...] = (
    argparse.Namespace, types.SimpleNamespace, pathlib.PosixPath, signal.Signals, (_member, "builtins.getattr"),
    io.BytesIO, numpy.ndarray, numpy.dtype, (numpy.array(0).__reduce__()[0], "numpy.core.multiarray._reconstruct"),
    (numpy.array(0).__reduce__()[0], "numpy._core.multiarray._reconstruct"),
    (numpy.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    (numpy.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
)  # fmt: skip
"""What Megatron's arguments, learning rate schedules and random states are made of, beside plain values and tensors."""

_FOREIGN = ("megatron", "transformer_engine", "nvidia_resiliency_ext", "megatron_ext")
"""Packages whose classes are in Megatron's arguments: an object of an unknown one is replaced, not made."""


class Unknown:
    """Stands for an object whose class is not loaded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __setstate__(self, state: Any) -> None: ...


def is_foreign(value: object) -> bool:
    """Whether a value is of a class of Megatron's, loaded or not."""
    return isinstance(value, Unknown) or type(value).__module__.split(".")[0] in _FOREIGN


def read_index(file: BinaryIO, path: str | Path) -> Metadata:
    """The index of a checkpoint's step, checked to be one.

    Args:
        file: `.metadata`, open.
        path: Its path, for messages.

    Raises:
        UntrustedError: It names something that no index holds, or a file outside its directory.
        CheckpointError: It is damaged.
    """
    with _unaltered(value for value in _INDEX.values() if isinstance(value, type)), _damage(path, ".metadata"):
        metadata = _IndexUnpickler(file, path).load()
    if not isinstance(metadata, Metadata) or not _is_complete(metadata):
        raise CheckpointError("the checkpoint is damaged: .metadata is not an index of tensors", got=path)
    for name in {info.relative_path for info in metadata.storage_data.values()}:
        inside(Path(path).parent, name)
    return metadata


def _is_complete(metadata: Metadata) -> bool:
    """Whether an unpickled index has the fields that it must have, of the right types."""
    entries, places = getattr(metadata, "state_dict_metadata", None), getattr(metadata, "storage_data", None)
    if not isinstance(entries, dict) or not isinstance(places, dict):
        return False
    kinds = index.TensorStorageMetadata | index.BytesStorageMetadata
    return all(isinstance(key, str) and isinstance(entry, kinds) for key, entry in entries.items()) and all(
        isinstance(key, index.MetadataIndex)
        and isinstance(info, filesystem._StorageInfo)
        and isinstance(info.relative_path, str)
        and isinstance(info.offset, int)
        and isinstance(info.length, int)
        and min(info.offset, info.length) >= 0
        for key, info in places.items()
    )


class _IndexUnpickler(pickle.Unpickler):
    """Unpickles an index and nothing else."""

    def __init__(self, file: BinaryIO, path: str | Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _INDEX:
            raise refusal(f"{module}.{name}", self._path)
        return _INDEX[module, name]


def read_objects(file: BinaryIO, path: str | Path, what: str = "the file") -> Any:
    """What `torch.save` wrote: plain values, tensors, namespaces; an `Unknown` for an object of Megatron's own classes.

    In a process that has imported Megatron, those of its classes that it declares safe are loaded.

    Args:
        file: The file, or a part of one.
        path: Its path, for messages.
        what: What it is, for messages.

    Raises:
        UntrustedError: It names anything else.
        CheckpointError: It is damaged.
    """
    content = io.BytesIO(file.read())
    with _damage(path, what):
        allowed = [entry for entry in _OBJECTS if entry not in torch.serialization.get_safe_globals()]
        with torch.serialization.safe_globals(allowed):
            unknown = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(content))
        for name in unknown:
            if name.split(".")[0] not in _FOREIGN:
                raise refusal(name, path)
        content.seek(0)
        with torch.serialization.safe_globals([*allowed, *((Unknown, name) for name in unknown)]):
            return torch.load(content, map_location="cpu", weights_only=True)


def asked_for(error: Exception) -> str | None:
    """The name that `torch.load(weights_only=True)` has refused, as its error says; None if it has not."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return found[1] if found else None


def refusal(name: str, path: str | Path) -> UntrustedError:
    """The error about a file that names something that it has no need of."""
    return UntrustedError(
        f"the file asks for {name}, which a checkpoint has no need of; it was not loaded", got=path,
        legal="checkpoints that Megatron wrote, from somebody you trust",
    )  # fmt: skip


@contextmanager
def _damage(path: str | Path, what: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # unpickling raises nearly anything on damaged bytes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"the checkpoint is damaged: {what} cannot be read ({reason})", got=path) from error


@contextmanager
def _unaltered(kinds: Iterator[type]) -> Iterator[None]:
    """Put back what a pickle has set in a class; it can, in those it may name.

    Raises:
        UntrustedError: It has.
    """
    before: dict[type, Mapping[str, Any]] = {kind: dict(vars(kind)) for kind in kinds}
    try:
        yield
    finally:
        altered = [kind for kind, held in before.items() if not _same(vars(kind), held)]
        for kind in altered:
            for name in set(vars(kind)) - set(before[kind]):
                type.__delattr__(kind, name)
            for name, value in before[kind].items():
                if vars(kind)[name] is not value:
                    type.__setattr__(kind, name, value)
        if altered:
            raise UntrustedError(f"the file alters the class {altered[0].__name__}; this was undone")


def _same(now: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    return now.keys() == before.keys() and all(now[name] is value for name, value in before.items())
