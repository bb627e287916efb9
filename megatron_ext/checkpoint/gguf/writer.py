"""A GGUF file being written: its header, and each tensor at its place."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_ext.checkpoint import ranks
from megatron_ext.checkpoint.blocks import DiskFile, StoredChunk, TensorEntry, as_bytes, values_of
from megatron_ext.checkpoint.checksums import Checksums, Parts
from megatron_ext.checkpoint.gguf.file import ALIGNMENT, PLAIN, package
from megatron_ext.errors import CheckpointError

WRITTEN = ("F32", "F16", "BF16", "Q8_0")
_VALUES = 2**20  # that are packed at once


@dataclass(frozen=True)
class GgufTarget:
    """A tensor to write: GGUF's name, type, shape, and how it comes about from Hugging Face's form."""

    name: str
    kind: str
    shape: tuple[int, ...]
    form: Any

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        gguf = package()
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.kind]]
        return prod(self.shape) // block * size


@contextmanager
def writing(
    path: Path, architecture: str, metadata: Mapping[str, Any], targets: Mapping[str, GgufTarget]
) -> Iterator["GgufWriter"]:
    """Write a file with these tensors, by their names in the table of moves.

    In a process group all processes enter the block, and each writes tensors of its own.
    """
    writer = GgufWriter(path, _header(architecture, metadata, list(targets.values())), targets)
    with ranks.all_or_none():
        try:
            yield writer
        finally:
            writer.close()
    writer.finish()


class GgufWriter:
    """Made by `writing`; a target of `stream.run`."""

    def __init__(self, path: Path, header: bytes, targets: Mapping[str, GgufTarget]) -> None:
        self._path, self._targets = path, targets
        self._file = DiskFile(path, shared=True)
        self._places: dict[str, int] = {}
        self._written = set[str]()
        place = len(header)
        for key, target in targets.items():
            self._places[key] = place
            place += _padded(target.nbytes)
        if ranks.rank() == 0:
            self._file.begin_part(0)
            self._file.write(header)
            self._file.end_part()

    def write(self, key: str, tensor: Tensor, layer: tuple[int, int] | None = None) -> None:
        """Write a tensor, in Hugging Face's form, to its place."""
        assert layer is None
        assert key not in self._written
        self._written.add(key)
        target = self._targets[key]
        values = target.form(tensor)
        assert tuple(values.shape) == target.shape
        self._file.begin_part(self._places[key])
        for block in _packed(values.reshape(-1, target.shape[-1]), target):
            self._file.write(block)
        self._file.write(bytes(_padded(target.nbytes) - target.nbytes))
        self._file.end_part()

    def write_values(
        self, key: str, entry: TensorEntry, chunks: Sequence[StoredChunk], layer: tuple[int, int] | None = None
    ) -> None:
        """As `write`, of values that lie on disk one after the other."""
        raw = bytearray()
        for chunk in chunks:
            for block in values_of(chunk):
                raw += block
        self.write(key, torch.frombuffer(raw, dtype=entry.dtype).view(entry.shape), layer)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def finish(self) -> None:
        """Write the checksums."""
        gathered = ranks.gather((self._written, self._file.parts))
        assert set().union(*(written for written, _ in gathered)) == set(self._targets)
        if ranks.rank() == 0:
            parts: Parts = {}
            for _, own in gathered:
                parts |= own
            Checksums(self._path.parent, {self._path.name: parts}).write()


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _packed(values: Tensor, target: GgufTarget) -> Iterator[memoryview]:
    """The values (rows, values) in the type of the file, some rows at a time."""
    gguf = package()
    step = max(1, _VALUES // max(1, values.shape[1]))
    for first in range(0, len(values), step):
        rows = values[first : first + step]
        if target.kind in PLAIN:
            own = rows.to(PLAIN[target.kind])
        else:
            quantized = gguf.quantize(rows.float().numpy(), gguf.GGMLQuantizationType[target.kind])
            own = torch.from_numpy(np.ascontiguousarray(quantized))
        if target.kind in ("F16", "Q8_0") and not _finite(own, target.kind):
            raise CheckpointError(
                f"{target.name} does not fit into {target.kind}", got=f"values up to {float(rows.abs().max()):.3g}",
                legal="--dtype bfloat16 or float32",
            )  # fmt: skip
        yield as_bytes(own.contiguous())


def _finite(packed: Tensor, kind: str) -> bool:
    """Whether no value, or no scale of a block of Q8_0, is beyond 16 bits."""
    if kind == "Q8_0":
        size = 34  # two bytes of scale, 32 of values
        packed = packed.reshape(-1, size)[:, :2].contiguous().view(torch.float16)
    return bool(packed.isfinite().all())


def _header(architecture: str, metadata: Mapping[str, Any], targets: Sequence[GgufTarget]) -> bytes:
    """The file up to the first value, as the `gguf` package writes it."""
    gguf = package()
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "header.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        for key, value in metadata.items():
            _add(writer, key, value)
        for target in targets:
            kind = gguf.GGMLQuantizationType[target.kind]
            block, size = gguf.GGML_QUANT_SIZES[kind]
            stored = (*target.shape[:-1], target.shape[-1] // block * size)  # of packed types the shape in bytes
            packed = target.kind not in ("F32", "F16")
            writer.add_tensor_info(
                target.name, stored if packed else target.shape, np.dtype(np.uint8 if packed else np.float32),
                target.nbytes, raw_dtype=kind,
            )  # fmt: skip
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = path.read_bytes()
    return header + bytes(_padded(len(header)) - len(header))


def _add(writer: Any, key: str, value: Any) -> None:
    """Add an entry, in the type that llama.cpp reads it in."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
