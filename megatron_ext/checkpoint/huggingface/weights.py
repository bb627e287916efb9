"""The weights of a directory: which files hold them, and whether they are those of a model.

`pytorch_model.bin` is what was usual before safetensors, in one file or several; it is read without running anything.
"""

import logging
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.checkpoint.blocks import ReusableBuffer
from megatron_ext.checkpoint.huggingface import hf_assets, quantized, shards
from megatron_ext.checkpoint.huggingface.family import Config, Family
from megatron_ext.checkpoint.huggingface.mappings import BoundMapping, hf_shapes
from megatron_ext.checkpoint.huggingface.quantized import BlockScaled
from megatron_ext.checkpoint.huggingface.shards import ShardEntry, Shards, read_index
from megatron_ext.checkpoint.stream import Source
from megatron_ext.errors import CheckpointError
from megatron_ext.models.architecture import Architecture
from megatron_ext.untrusted.paths import inside
from megatron_ext.untrusted.pickles import asked_for, refusal

PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ORDER = (shards.SINGLE, shards.INDEX, PICKLED, PICKLED_INDEX)
"""Those that transformers reads, in its order (`modeling_utils.py`)."""
NAMED = "transformers_weights"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HFModel:
    """A model as Hugging Face describes it, wherever its tensors lie.

    Attributes:
        folder: `config.json`, tokenizer and whatever else lies beside the weights.
        config: What `config.json` says.
        weights: The tensors, by Hugging Face's names.
    """

    folder: Path
    config: Config
    weights: Source


class Pickled:
    """As `Shards`, of pickled files. They are mapped, not loaded, but for those from before torch 1.6.

    Args:
        directory: The directory.
        name: The one file, or the index of several.

    Raises:
        UntrustedError: A file asks for code.
        CheckpointError: A file is missing or damaged, or holds other things than tensors.
    """

    def __init__(self, directory: Path, name: str = PICKLED) -> None:
        files = sorted(set(read_index(directory, name).values())) if name == PICKLED_INDEX else [name]
        self._tensors: dict[str, Tensor] = {}
        self.entries: dict[str, ShardEntry] = {}
        for path in (inside(directory, file) for file in files):
            for key, tensor in _read(path).items():
                if key in self.entries:
                    raise CheckpointError(f"{key!r} is in two files", got=f"{self.entries[key].path.name}, {path.name}")
                self._tensors[key] = tensor
                self.entries[key] = ShardEntry(tuple(tensor.shape), tensor.dtype, path, 0)

    def fill(self, key: str, place: Tensor, rows: tuple[int, int] | None = None) -> None:
        """Read a tensor, or whole rows of it; see `Shards.fill`."""
        tensor = self._tensors[key]
        place.copy_((tensor if rows is None else tensor[slice(*rows)]).reshape(place.shape))

    def chunks(self, key: str, rows: tuple[int, int] | None = None) -> None:
        """Nothing: the tensors are torch's to read."""


def weights_of(directory: Path, config: Config) -> Shards | Pickled | BlockScaled:
    """The weights of a directory; says so where there are others beside them.

    Raises:
        CheckpointError: There are none, or they are missing, damaged or quantized in a way that is not read.
    """
    blocks = quantized.block_size(config)
    named = config.get(NAMED)
    if named is not None and not str(named).endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(f"config.json: {NAMED!r} names no safetensors", got=named)
    beside = sorted(path.name for ending in ("*.safetensors", "*.bin") for path in directory.glob(ending))
    taken = str(named) if named is not None else next((name for name in ORDER if (directory / name).is_file()), None)
    if taken is None:
        raise CheckpointError(
            "no weights under a name that transformers reads", got=", ".join(beside) or directory,
            legal=", ".join(ORDER),
        )  # fmt: skip
    found = Pickled(directory, taken) if taken in (PICKLED, PICKLED_INDEX) else Shards(directory, taken)
    read = {entry.path.name for entry in found.entries.values()} | {taken, "training_args.bin"}
    if others := [name for name in (*beside, *ORDER) if name not in read and (directory / name).is_file()]:
        get = ", ".join(dict.fromkeys(others[:3])) + (" and more" if len(others) > 3 else "")
        logger.warning(f"{directory}: reading {taken}, as transformers does, and not {get}")
    return found if blocks is None or isinstance(found, Pickled) else BlockScaled(found, blocks)


def of_directory(directory: Path) -> HFModel:
    """The model of a directory.

    Raises:
        CheckpointError: Something of it is missing or damaged, or not what was written.
    """
    hf_assets.check(directory)
    config = hf_assets.read_config(directory)
    return HFModel(directory, config, weights_of(directory, config))


def check_tensors(family: Family, arch: Architecture, mappings: list[BoundMapping], weights: Source) -> None:
    """Check that a model has exactly the tensors of a model, and parts of one weight in one type.

    Raises:
        CheckpointError: Names the first few that are missing, too many, or of another shape or type.
    """
    expected, held = hf_shapes(arch, mappings), weights.entries
    spare = [name for name in held if name not in expected and not name.endswith(family.ignored_suffixes)]
    tied = not arch.untie_embeddings_and_output_weights
    if tied and spare == ["lm_head.weight"]:  # written by some, read by none
        spare = (
            [] if _same_values(weights, "lm_head.weight", mappings[0].hf) else ["lm_head.weight (embeddings are tied)"]
        )
    wrong = [f"{name} is missing" for name in expected if name not in held]
    wrong += [f"{name} is not part of the model" for name in spare]
    wrong += [
        f"{name} is {held[name].shape} instead of {shape}"
        for name, shape in expected.items()
        if name in held and held[name].shape != shape
    ]
    types: dict[str, torch.dtype] = {}
    for mapping in mappings:
        if mapping.hf in held and types.setdefault(mapping.megatron, held[mapping.hf].dtype) != held[mapping.hf].dtype:
            wrong.append(f"{mapping.hf} is {held[mapping.hf].dtype}, the rest of its layer's {types[mapping.megatron]}")
    wrong += [
        f"{name} is {held[name].dtype}" for name in expected if name in held and not held[name].dtype.is_floating_point
    ]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"the tensors are not those of the {family.name} that config.json describes",
            got="; ".join(wrong[:3]) + more,
        )


def _same_values(weights: Source, left: str, right: str) -> bool:
    a, b = weights.entries[left], weights.entries.get(right)
    if b is None or (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    rows = max(1, 2**24 // (a.shape[1] * a.dtype.itemsize))
    mine, other = ReusableBuffer(), ReusableBuffer()
    for first in range(0, a.shape[0], rows):
        shape = (min(rows, a.shape[0] - first), *a.shape[1:])
        one, two = mine.tensor(shape, a.dtype), other.tensor(shape, a.dtype)
        weights.fill(left, one, (first, first + shape[0]))
        weights.fill(right, two, (first, first + shape[0]))
        if not torch.equal(one.view(torch.uint8), two.view(torch.uint8)):
            return False
    return True


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path.name} is missing", got=path.parent)
    try:
        # Before torch 1.6 files were no archives, which alone can be mapped.
        held = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
        if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
            raise TypeError("not a dictionary of tensors")
        return {str(name): tensor.detach() for name, tensor in held.items()}
    except Exception as error:  # the unpickler raises nearly anything on damaged bytes
        if name := asked_for(error):
            raise refusal(name, path) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path.name} is damaged, or not a dictionary of tensors ({reason})", got=path) from error
