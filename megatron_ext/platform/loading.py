"""What torch and Megatron unpickle when they load a checkpoint: the same restricted reading that we look at it with.

`torch.distributed.checkpoint` reads `.metadata` by `pickle.load` and objects by `torch.load(weights_only=False)`, and
Megatron's own restricted unpickler knows a function of torch's that is unrestricted. Whatever directory Megatron is
told to load, and whatever lies there at that moment, runs nothing.
"""

import io
import pickle
from collections.abc import Callable
from typing import Any

from torch.distributed import checkpoint
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_ext.errors import MegatronExtError
from megatron_ext.platform.replacements import replace
from megatron_ext.untrusted.pickles import asked_for, read_index, read_objects, refusal

REASON = "what a checkpoint brings is not run (everywhere)"


def install() -> None:
    """Replace the three places that unpickle, and let what they raise through."""
    from megatron.core.safe_globals import SafeUnpickler

    replace(FileSystemReader, "read_metadata", _read_metadata, REASON)
    replace(DefaultLoadPlanner, "load_bytes", _load_bytes, REASON)
    replace(checkpoint, "load", _in_words(load), REASON)
    replace(SafeUnpickler, "find_class", _find_class, REASON)


def _in_words(original: Callable[..., None]) -> Callable[..., None]:
    """`torch.distributed.checkpoint.load`, which raises our own errors as they are.

    They come among those of all ranks; and one about `.metadata` not at all, because torch then looks for another.
    """

    def loading(*args: Any, **kwargs: Any) -> None:
        try:
            original(*args, **kwargs)
        except CheckpointException as error:
            for cause, _ in error.failures.values():
                if isinstance(cause, MegatronExtError):
                    raise cause from None
                if isinstance(cause, pickle.UnpicklingError) and (name := asked_for(cause)) is not None:
                    raise refusal(name, kwargs.get("checkpoint_id") or "a tensor of the checkpoint") from None
            for reader in (*args, *kwargs.values()):
                if isinstance(reader, FileSystemReader):
                    reader.read_metadata()
            raise

    return loading


def _read_metadata(self: FileSystemReader, *args: Any, **kwargs: Any) -> Metadata:
    path = self._get_metadata_path(kwargs.get("rank"))
    with self.fs.create_stream(path, "rb") as file:
        metadata = read_index(file, path)  # type: ignore[arg-type] - a stream serves
    about = getattr(metadata, "storage_meta", None) or StorageMeta()
    about.load_id = self.load_id
    metadata.storage_meta = about
    return metadata


def _load_bytes(self: DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
    key = read_item.dest_index.fqn
    loaded = read_objects(value, key, f"the object {key!r}")
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[key], loaded)
    else:
        self.state_dict[key] = loaded


def _find_class(self: Any, module: str, name: str) -> Any:
    from megatron.core.safe_globals import safe_load_from_bytes

    if (module, name) == ("torch.storage", "_load_from_bytes"):
        return safe_load_from_bytes
    if (module, name) not in self._SAFE_CLASSES:
        raise pickle.UnpicklingError(f"{module}.{name} is not loaded")
    return pickle.Unpickler.find_class(self, module, name)
