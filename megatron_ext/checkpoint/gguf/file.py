"""GGUF files as they lie on disk: a header with metadata and the places of tensors, then the tensors, each in blocks.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is read here, because whatever a file of
others says of itself (lengths, counts, places) is compared with the file's size first; what blocks of packed numbers
mean is the `gguf` package's to say.
"""

import importlib
import mmap
import struct
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_ext.checkpoint.blocks import as_bytes, fill
from megatron_ext.errors import CheckpointError, ConfigError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types whose values are stored one by one."""
PACKED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
"""Types whose values share scales in blocks; they are unpacked to 32 bits."""
_BLOCK_VALUES = 2**20  # that are unpacked at once
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIifBQqd", strict=True))
_FLOAT, _BOOL, _STRING, _ARRAY = 6, 7, 8, 9
_DEEPEST = 4  # arrays of arrays


def package() -> Any:
    """The `gguf` package.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ConfigError(
            "GGUF files need the gguf package", got=str(error), legal="pip install 'megatron-ext[gguf]'"
        ) from error


@cache
def _types() -> dict[int, tuple[str, int, int]]:
    """By number the name of each type, the values of a block of it, and their bytes."""
    return {kind.value: (kind.name, *size) for kind, size in package().GGML_QUANT_SIZES.items()}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file.

    Attributes:
        shape: As torch has it: the last dimension is the one whose values lie side by side.
        kind: Its type, by ggml's name.
        path: The file.
        offset: The byte of it where the values begin.
        row_bytes: Bytes of one row, the values of the last dimension.
    """

    shape: tuple[int, ...]
    kind: str
    path: Path
    offset: int
    row_bytes: int

    @property
    def rows(self) -> int:
        """Rows of the last dimension, in all."""
        return prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        """Bytes of it on disk."""
        return self.rows * self.row_bytes

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest type of torch's that holds its values as they are."""
        return PLAIN.get(self.kind, torch.float32)


@dataclass(frozen=True)
class GgufFile:
    """A file's header.

    Attributes:
        path: The file.
        metadata: What it says of the model, by key.
        tensors: Its tensors, by name.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read(path: Path) -> GgufFile:
    """The header of a file.

    Raises:
        CheckpointError: It is none, of another version or byte order, damaged, cut short, or has tensors of a type that
            is not converted.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Header(path, content).read()
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"the GGUF file cannot be read: {error}", got=path) from error


class _Header:
    """A header being read, from front to back."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content, self.place = path, content, 0

    def read(self) -> GgufFile:
        if self._take(4) != MAGIC:
            raise CheckpointError("this is no GGUF file", got=self.path, legal=f"a file that begins with {MAGIC!r}")
        version = self._scalar("I")
        if version not in VERSIONS:
            what = "is big-endian" if version and not version & 0xFFFF else "has a version that is not read"
            legal = f"little-endian, version {' or '.join(map(str, VERSIONS))}"
            raise CheckpointError(f"the GGUF file {what}", got=f"{self.path}: version {version:#x}", legal=legal)
        tensors, entries = self._scalar("Q"), self._scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._string()
            if key in metadata:
                raise self._damaged(f"{key!r} occurs twice")
            metadata[key] = self._value(self._scalar("I"))
        described = [self._described() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment={alignment!r} is no power of two")
        data = -(-self.place // alignment) * alignment
        found: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in described:
            if name in found:
                raise self._damaged(f"the tensor {name!r} occurs twice")
            if offset % alignment:
                raise self._damaged(f"{name!r} does not begin at a multiple of {alignment}")
            found[name] = self._tensor(name, shape, kind, data + offset)
        return GgufFile(self.path, metadata, found)

    def _described(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, number of the type, and place of a tensor."""
        name, dimensions = self._string(), self._scalar("I")
        if not 1 <= dimensions <= 4:
            raise self._damaged(f"{name!r} has {dimensions} dimensions")
        shape = tuple(reversed([self._scalar("Q") for _ in range(dimensions)]))
        return name, shape, self._scalar("I"), self._scalar("Q")

    def _tensor(self, name: str, shape: tuple[int, ...], number: int, offset: int) -> GgufTensor:
        kind, block, block_bytes = _types().get(number, (f"number {number}", 1, 1))
        if kind not in (*PLAIN, *PACKED):
            raise CheckpointError(
                f"{name!r} has a type that is not converted", got=f"{kind} in {self.path}",
                legal=", ".join((*PLAIN, *PACKED)),
            )  # fmt: skip
        if shape[-1] % block:
            raise self._damaged(f"rows of {name!r} have {shape[-1]} values, and blocks of {kind} {block}")
        found = GgufTensor(shape, kind, self.path, offset, shape[-1] // block * block_bytes)
        if offset + found.nbytes > len(self.content):
            raise CheckpointError(
                f"the GGUF file is cut short: {name!r} is not whole", got=f"{self.path}: {len(self.content):,} bytes",
                legal=f"{offset + found.nbytes:,} bytes",
            )  # fmt: skip
        return found

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return _number(kind, self._scalar(_SCALARS[kind]))
        if kind != _ARRAY or depth > _DEEPEST:
            raise self._damaged(f"metadata of an unknown kind, {kind}")
        of, length = self._scalar("I"), self._scalar("Q")
        if of in _SCALARS:
            letter = _SCALARS[of]
            values = struct.unpack(f"<{length}{letter}", self._take(length * struct.calcsize(letter)))
            return [_number(of, value) for value in values]
        if length > len(self.content) - self.place:
            raise self._damaged("an array that is longer than the file")
        return [self._value(of, depth + 1) for _ in range(length)]

    def _string(self) -> str:
        try:
            return str(self._take(self._scalar("Q")), "utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged(f"a text that is none ({error.reason})") from error

    def _scalar(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self._take(struct.calcsize(f"<{letter}")))[0]

    def _take(self, count: int) -> bytes:
        if count > len(self.content) - self.place:
            raise self._damaged("the header is cut short")
        self.place += count
        return self.content[self.place - count : self.place]

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"the GGUF file is damaged: {what}", got=f"{self.path}, byte {self.place:,}")


def _number(kind: int, value: Any) -> Any:
    """A number as its writer saw it: the shortest decimal that is this number in 32 bits, for one."""
    if kind == _BOOL:
        return bool(value)
    return float(str(np.float32(value))) if kind == _FLOAT else value


def unpack(tensor: GgufTensor, place: Tensor, first: int = 0) -> None:
    """Read rows of a tensor into memory.

    Args:
        tensor: The tensor.
        place: Contiguous memory (rows, values), of any floating-point type.
        first: The first of the rows.
    """
    with tensor.path.open("rb", buffering=0) as file:
        file.seek(tensor.offset + first * tensor.row_bytes)
        if tensor.kind in PLAIN and place.dtype == tensor.dtype:
            fill(file, as_bytes(place))
            return
        step = max(1, _BLOCK_VALUES // max(1, place.shape[1]))
        packed = np.empty((min(step, len(place)), tensor.row_bytes), dtype=np.uint8)
        for row in range(0, len(place), step):
            part = place[row : row + step]
            own = packed[: len(part)]
            fill(file, memoryview(own).cast("B"))
            part.copy_(_values(tensor.kind, own))


def _values(kind: str, packed: np.ndarray) -> Tensor:
    """The values (rows, values) of packed rows (rows, bytes)."""
    if kind in PLAIN:
        return torch.from_numpy(packed).view(PLAIN[kind])
    gguf = package()
    return torch.from_numpy(gguf.dequantize(packed, gguf.GGMLQuantizationType[kind]))
