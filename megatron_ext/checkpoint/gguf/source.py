"""A GGUF file, or several that are one model, read as a Hugging Face model: configuration, tokenizer, named tensors."""

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.checkpoint import file_checksums
from megatron_ext.checkpoint.blocks import ReusableBuffer, StoredChunk, TensorEntry
from megatron_ext.checkpoint.gguf import architectures, file, layer_sizes
from megatron_ext.checkpoint.gguf.architectures import GgufArchitecture
from megatron_ext.checkpoint.gguf.entries import ROPE_FREQUENCIES, Described
from megatron_ext.checkpoint.gguf.file import PLAIN, GgufFile, GgufTensor, unpack
from megatron_ext.checkpoint.gguf.forms import ALWAYS_FP32
from megatron_ext.checkpoint.gguf.tokenizer import write_tokenizer
from megatron_ext.checkpoint.huggingface import families, hf_assets
from megatron_ext.checkpoint.huggingface.mappings import hf_shapes
from megatron_ext.checkpoint.huggingface.weights import ORDER, HFModel
from megatron_ext.errors import CheckpointError
from megatron_ext.models.architecture import Architecture
from megatron_ext.untrusted.paths import inside

_PART = re.compile(r"^(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
_NOT_WEIGHTS = (ROPE_FREQUENCIES,)


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, or a directory whose weights are in such files alone."""
    if not path.is_dir():
        return path.is_file() and path.suffix == ".gguf"
    return bool(list(path.glob("*.gguf"))) and not any((path / name).exists() for name in ORDER)


def find(path: Path) -> Path:
    """A GGUF file, by its path or that of the directory that holds it, and no other such model.

    Raises:
        CheckpointError: There is none, or several.
        UntrustedError: It is a link that leads out of the directory.
    """
    if not path.is_dir():
        if not path.is_file():
            raise CheckpointError("the GGUF file does not exist", got=path)
        return path
    names = sorted(each.name for each in path.glob("*.gguf"))
    first = [name for name in names if (part := _PART.match(name)) is None or int(part["number"]) == 1]
    if len(first) != 1:
        what = "several GGUF files" if first else "no GGUF file"
        raise CheckpointError(f"the directory holds {what}", got=", ".join(first[:8]) or path, legal="--from gguf FILE")
    return inside(path, first[0])


def read_by_transformers(path: Path) -> bool:
    """Whether transformers reads this file, as the class that it is here."""
    given = file.read(path)
    one = given.metadata.get("split.count", 1) == 1
    return one and architectures.of_file(Described(path, given.metadata)).read_by_transformers


@contextmanager
def opened(path: Path, tokenizer: Path | None = None) -> Iterator[HFModel]:
    """The model of a file, or of the one in a directory; its configuration and tokenizer last as long as the block.

    Args:
        path: The file, or the first of several.
        tokenizer: The directory of a tokenizer, in place of the file's own.

    Raises:
        CheckpointError: It is damaged, incomplete, or of a kind that is not converted.
        ConfigError: The `gguf` package is missing, or the file's tokenizer cannot be expressed and none is given.
    """
    path = find(path)
    given = _described(path)
    architecture = architectures.of_file(given)
    if architecture.name == layer_sizes.DECI:
        given = layer_sizes.without_zeros(given)
    config = architecture.config(given)
    family = families.of_config(config)
    arch = family.read(config)
    shapes = hf_shapes(arch, family.bind(arch))
    names = architecture.names(list(shapes), given.whole("block_count"))
    weights = GgufWeights(architecture, arch, names, given.tensors)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if tokenizer is None:
            write_tokenizer(given, folder)
        else:
            hf_assets.check_tokenizer(tokenizer)
            hf_assets.copy(hf_assets.tokenizer_files(tokenizer), folder)
        special = hf_assets.special_tokens(folder) if (folder / hf_assets.TOKENIZER).is_file() else {}
        config |= special | {"dtype": str(weights.dtype).removeprefix("torch.")}
        (folder / hf_assets.CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _write_generation(given, folder, special)
        yield HFModel(folder, config, weights)


def _described(path: Path) -> Described:
    """What a file says, with the tensors of all that belong to it."""
    first = _read(path)
    count = first.metadata.get("split.count", 1)
    tensors = dict(first.tensors)
    if count != 1:
        part = _PART.match(path.name)
        if part is None or int(part["number"]) != 1 or int(part["count"]) != count:
            raise CheckpointError(
                "a part of a model", got=f"{path}, of {count}", legal="the first: NAME-00001-of-NNNNN.gguf"
            )
        for number in range(2, count + 1):
            other = inside(path.parent, f"{part['name']}-{number:05d}-of-{count:05d}.gguf")
            if not other.is_file():
                raise CheckpointError("a part of the model is missing", got=other)
            for name, tensor in _read(other).tensors.items():
                if name in tensors:
                    raise CheckpointError(f"{name!r} is in two files", got=f"{tensors[name].path.name}, {other.name}")
                tensors[name] = tensor
    return Described(path, first.metadata, tensors)


def _read(path: Path) -> GgufFile:
    file_checksums.check_file(path)
    return file.read(path)


def _write_generation(given: Described, folder: Path, special: Mapping[str, int | None]) -> None:
    """What ends a text that transformers writes: the end of a turn too, if that is another token."""
    ends = [special.get("eos_token_id"), given.metadata.get("tokenizer.ggml.eot_token_id")]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    entries: dict[str, int | list[int]] = {name: value for name, value in special.items() if value is not None}
    if ends:
        entries["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    if entries:
        (folder / hf_assets.GENERATION).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class GgufEntry(TensorEntry):
    """A tensor as Hugging Face has it, and where the file has it."""

    stored: GgufTensor


class GgufWeights:
    """The tensors of a GGUF model under Hugging Face's names, in one type: see `stream.Source`.

    The type is that of the matrices if all have the same and hold their values one by one, and otherwise fp32, to which
    blocks are unpacked. Vectors, which llama.cpp keeps in fp32, get the type of the matrices where no value changes.

    Args:
        architecture: What llama.cpp calls the model.
        arch: The model.
        names: GGUF's name of each of its tensors.
        tensors: What the file has.
    """

    def __init__(
        self, architecture: GgufArchitecture, arch: Architecture, names: Mapping[str, str],
        tensors: Mapping[str, GgufTensor],
    ) -> None:  # fmt: skip
        self._architecture, self._arch = architecture, arch
        self._buffer = ReusableBuffer()
        self.dtype = _type_of(tensors)
        self.entries: dict[str, GgufEntry] = {}
        for hf, name in names.items():
            if (stored := tensors.get(name)) is not None:
                shape = tuple(self._from_gguf(hf, torch.empty(stored.shape, device="meta")).shape)
                dtype = torch.float32 if architecture.form(hf).exact else self.dtype
                self.entries[hf] = GgufEntry(shape, dtype, stored)
        vectors = [hf for hf, each in self.entries.items() if len(each.shape) == 1 and each.dtype == self.dtype]
        if self.dtype != torch.float32 and not all(self._fits(hf) for hf in vectors):
            for hf in vectors:
                self.entries[hf] = replace(self.entries[hf], dtype=torch.float32)
        for name in tensors.keys() - set(names.values()) - set(_NOT_WEIGHTS):
            self.entries[name] = GgufEntry(tensors[name].shape, self.dtype, tensors[name])

    def fill(self, key: str, place: Tensor, rows: tuple[int, int] | None = None) -> None:
        """Read rows of a tensor; see `Shards.fill`. What is stored in another form is read whole."""
        entry = self.entries[key]
        if not self._architecture.form(key).endings and len(entry.shape) > 1:
            first = 0 if rows is None else rows[0] * prod(entry.shape[1:-1])
            unpack(entry.stored, place.view(-1, entry.shape[-1]), first)
        else:
            whole = self._whole(key)
            place.copy_((whole if rows is None else whole[slice(*rows)]).reshape(place.shape))

    def chunks(self, key: str, rows: tuple[int, int] | None = None) -> list[tuple[tuple[int, ...], StoredChunk]] | None:
        """All of a tensor as the one chunk that it is, if it is stored as it is written."""
        entry = self.entries[key]
        stored = entry.stored
        as_it_is = not self._architecture.form(key).endings and PLAIN.get(stored.kind) == entry.dtype
        if not as_it_is or rows not in (None, (0, entry.shape[0])):
            return None
        chunk = StoredChunk(entry.shape, entry.dtype, stored.path, stored.offset, stored.nbytes, stored.offset)
        return [((0,) * len(entry.shape), chunk)]

    def _whole(self, key: str) -> Tensor:
        """A tensor in fp32, good until the next one."""
        stored = self.entries[key].stored
        values = self._buffer.tensor((stored.rows, stored.shape[-1]), torch.float32)
        unpack(stored, values)
        return self._from_gguf(key, values.view(stored.shape))

    def _from_gguf(self, key: str, tensor: Tensor) -> Tensor:
        return self._architecture.form(key).from_gguf(self._arch, tensor)

    def _fits(self, key: str) -> bool:
        """Whether a vector loses nothing in the type of the matrices."""
        values = self._whole(key)
        return torch.equal(values.to(self.dtype).float(), values)


def _type_of(tensors: Mapping[str, GgufTensor]) -> torch.dtype:
    matrices = {
        tensor.kind for name, tensor in tensors.items() if len(tensor.shape) > 1 and not name.endswith(ALWAYS_FP32)
    }
    return PLAIN.get(matrices.pop(), torch.float32) if len(matrices) == 1 else torch.float32
