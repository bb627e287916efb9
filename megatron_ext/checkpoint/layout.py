"""What is on disk: which steps a checkpoint directory has, which are complete, and what a step says about itself.

A directory holds `iter_0000100/` (training) or `release/` (weights only, Megatron's name for a starting point), and
`latest_checkpointed_iteration.txt`. A step in Megatron's `torch_dist` format holds `.metadata`, `metadata.json` and
`*.distcp`; the arguments are an object among the tensors (`common_state`), in older versions a file `common.pt`.
Nothing here builds a model, needs a process group, or runs code that a checkpoint brings with it.
"""

import functools
import hashlib
import io
import json
import logging
import os
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.errors import CheckpointError, UntrustedError
from megatron_ext.models.architecture import Architecture
from megatron_ext.untrusted.paths import inside

if TYPE_CHECKING:  # torch takes a second to import, and to find a step, or to see that there is none, needs none of it
    import torch
    from torch.distributed.checkpoint.metadata import Metadata

logger = logging.getLogger(__name__)

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
COMMON_STATE = "common_state/shard_0_1"


@dataclass(frozen=True)
class Step:
    """One saved step: its directory, and its iteration, 0 for `release`."""

    path: Path
    iteration: int

    @property
    def is_release(self) -> bool:
        """Whether it holds weights only, to start from rather than to resume."""
        return self.path.name == RELEASE

    @property
    def name(self) -> str:
        """What a tracker file calls it."""
        return RELEASE if self.is_release else str(self.iteration)


def steps(directory: str | Path) -> list[Step]:
    """All steps of a checkpoint directory, complete or not, oldest first, `release` before all others."""
    found = [
        Step(path, 0 if path.name == RELEASE else int(path.name.removeprefix("iter_")))
        for path in Path(directory).glob("*")
        if path.is_dir() and (path.name == RELEASE or path.name.removeprefix("iter_").isdecimal())
    ]
    return sorted(found, key=lambda step: (not step.is_release, step.iteration))


def newest(directory: str | Path) -> Step:
    """The newest complete step of a checkpoint directory; says so when that is not what the tracker file names.

    Raises:
        CheckpointError: There is none; says why for each step there is. Or one of them asks for code.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError("the checkpoint directory does not exist", got=directory)
    reasons = []
    for step in reversed(steps(directory)):
        try:
            verify(step.path)
        except UntrustedError:
            raise  # a directory with such a file is not one to go on from
        except CheckpointError as error:
            reasons.append(f"{step.path.name}: {str(error).splitlines()[0]}")
            continue
        said = tracked(directory)
        if said != step.name:
            state = "is missing" if said is None else f"says {said!r}"
            why = f" ({'; '.join(reasons)})" if reasons else ""
            _tell(f"{directory / TRACKER} {state}; taking {step.path.name}, the newest step that verifies{why}")
        return step
    if (directory / "config.json").is_file() or any(directory.glob("*.safetensors")):
        raise CheckpointError(
            "a Hugging Face directory, not a checkpoint of Megatron's", got=directory,
            legal=f"megatron-ext convert --from hf --to megatron {directory} NEW_DIRECTORY, and that directory",
        )  # fmt: skip
    raise CheckpointError(
        "no complete checkpoint",
        got=f"{directory}: {'; '.join(reasons)}" if reasons else f"{directory} has no steps",
        legal="a directory with iter_* or release in Megatron's torch_dist format (--ckpt-format torch_dist)",
    )


def tracked(directory: Path) -> str | None:
    """The step that a directory's tracker file names, as it stands there; None without such a file."""
    try:
        return (directory / TRACKER).read_text(errors="replace").strip()
    except OSError:
        return None


@functools.cache
def _tell(text: str) -> None:
    """Say something once, and not on every rank."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning(text)


def find(path: str | Path) -> Step:
    """The step at `path`, which is a step's own directory or one that holds steps; then the newest complete one.

    Raises:
        CheckpointError: There is none.
    """
    path = Path(path)
    if not any((path / name).exists() for name in (".metadata", "metadata.json")):
        return newest(path)
    verify(path)
    number = path.name.removeprefix("iter_")
    return Step(path, int(number) if number.isdecimal() else 0)


def verify(step: str | Path) -> "Metadata":
    """Check that a step is complete: in our format, described, and every byte that is described is there.

    Raises:
        CheckpointError: Says what is missing.
    """
    step = Path(step)
    if any(step.glob("mp_rank_*")):
        raise CheckpointError(
            "the checkpoint is in Megatron's legacy format", got=step,
            legal="torch_dist: load it in Megatron and save it with --ckpt-format torch_dist",
        )  # fmt: skip
    marker = inside(step, "metadata.json")
    try:
        form = json.loads(marker.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            "the checkpoint is incomplete: no metadata.json, which is written last", got=step
        ) from None
    except ValueError:
        raise CheckpointError("the checkpoint is damaged: metadata.json is not JSON", got=step) from None
    if not isinstance(form, dict) or form.get("sharded_backend") != FORMAT["sharded_backend"]:
        raise CheckpointError(
            "the checkpoint is in another format, as metadata.json says", got=form, legal="torch_dist"
        )
    metadata = read_metadata(step)
    ends: dict[str, int] = {}
    for info in metadata.storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in ends.items():
        file = step / name
        if not file.is_file():
            raise CheckpointError(f"the checkpoint is incomplete: {name} is missing", got=step)
        if file.stat().st_size < end:
            raise CheckpointError(
                f"the checkpoint is damaged: {name} is cut short",
                got=f"{file.stat().st_size} bytes",
                legal=f"{end} bytes",
            )
    return metadata


def read_metadata(step: str | Path) -> "Metadata":
    """The index of a step: keys, shapes and where each chunk lies.

    Raises:
        CheckpointError: It is missing or damaged, or asks for code or a file elsewhere (`UntrustedError`).
    """
    path = inside(Path(step), ".metadata")
    try:
        return _index(path.read_bytes(), path)
    except FileNotFoundError:
        raise CheckpointError("the checkpoint is incomplete: no .metadata", got=step) from None
    except OSError as error:
        raise CheckpointError(f"the checkpoint is damaged: .metadata cannot be read ({error})", got=step) from error


@functools.lru_cache(maxsize=2)
def _index(content: bytes, path: Path) -> "Metadata":
    """Unpickle it once: a job looks into the same step a dozen times before its first step."""
    from megatron_ext.untrusted.pickles import read_index

    return read_index(io.BytesIO(content), path)


def tensors(step: str | Path) -> "dict[str, tuple[tuple[int, ...], torch.dtype]]":
    """Global shape and type of every model weight of a step; optimizer state is left out."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    return {
        key: (tuple(entry.size), entry.properties.dtype)
        for key, entry in read_metadata(step).state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not key.startswith("optimizer")
    }


def common(step: str | Path) -> dict[str, Any]:
    """What is not a tensor: `args`, `iteration`, `checkpoint_version`. Objects of Megatron's classes are left out.

    Raises:
        CheckpointError: It is missing or damaged, or asks for code (`UntrustedError`).
    """
    step = Path(step)
    try:
        if (path := inside(step, "common.pt")).is_file():
            values = _objects(path.read_bytes(), path, path.name)
        else:
            from torch.distributed.checkpoint.metadata import MetadataIndex

            info = read_metadata(step).storage_data[MetadataIndex(COMMON_STATE)]
            with (step / info.relative_path).open("rb") as file:
                file.seek(info.offset)
                values = _objects(file.read(info.length), step / info.relative_path, "common_state")[0]
        if not isinstance(values, dict):
            raise TypeError("not a dictionary")
        return _plain(values)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"the checkpoint's arguments cannot be read ({error!r})", got=step) from error


@functools.lru_cache(maxsize=4)
def _objects(content: bytes, path: Path, what: str) -> Any:
    from megatron_ext.untrusted.pickles import read_objects

    return read_objects(io.BytesIO(content), path, what)


def family(step: str | Path) -> str | None:
    """The family of a step's model, such as `mambavision`; None of a language model.

    Raises:
        CheckpointError: It cannot be read.
    """
    return getattr(common(step).get("args"), "ext_family", None)


def architecture(step: str | Path) -> Architecture:
    """The model that a step holds, from the arguments saved with it.

    Raises:
        CheckpointError: It has no arguments, or not those of a `HybridModel`.
    """
    args = common(step).get("args")
    if (family := getattr(args, "ext_family", None)) is not None:
        raise CheckpointError("the checkpoint holds no language model", got=f"{step}: {family}", legal="one that does")
    if isinstance(args, Namespace) and getattr(args, "num_layers", None) and not pattern_of(args):
        raise CheckpointError(
            "the checkpoint holds a GPTModel", got=step, legal="megatron-ext convert --from gpt --to megatron"
        )
    try:
        if not isinstance(args, Namespace):
            raise AttributeError("no args")
        return Architecture.from_args(args)
    except (AttributeError, TypeError) as error:
        raise CheckpointError(f"the checkpoint does not say which model it holds: {error}", got=step) from error


def described(step: str | Path) -> dict[str, Any]:
    """The model that a step holds, as plain values; a model that is no `Architecture` has its `family` among them.

    Raises:
        CheckpointError: It does not say.
    """
    args = common(step).get("args")
    if (family := getattr(args, "ext_family", None)) is not None:
        return {"family": family, **getattr(args, "ext_model", {})}
    return architecture(step).to_dict()


def pattern_of(args: Namespace) -> str | None:
    """The layer pattern that a checkpoint's arguments name, if any, under its present or its former name."""
    return getattr(args, "hybrid_layer_pattern", None) or getattr(args, "hybrid_override_pattern", None)


def fingerprint(step: str | Path) -> str:
    """A hash that tells one saved step from another: of its index, which each save marks anew. 16 hex digits."""
    path = Path(step) / ".metadata"
    if not path.is_file():
        raise CheckpointError("the checkpoint is incomplete: no .metadata", got=step)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """The value without Megatron's objects: entries and attributes that are one, or a sequence with one."""
    if isinstance(value, Namespace):
        return Namespace(**_plain(vars(value)))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if not _is_left_out(key) and not _is_left_out(item)}
    return value


def _is_left_out(value: Any) -> bool:
    from megatron_ext.untrusted.pickles import is_foreign

    return is_foreign(value) or (isinstance(value, list | tuple | set) and any(map(_is_left_out, value)))
