"""Tensors from one checkpoint into another, whatever their formats: a table of moves, and what carries it out.

Pruning, conversion from and to Hugging Face and conversion of GPTModels each compile a table, one row per tensor that
is written. What is only renamed or put one behind the other goes from file to file in blocks and is never decoded;
anything else passes through memory, one tensor and its source at a time. The processes of a group share the table.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_ext.checkpoint import ranks
from megatron_ext.checkpoint.blocks import ReusableBuffer, StoredChunk, TensorEntry
from megatron_ext.errors import CheckpointError

SMALL = 2**16
"""Bytes of a tensor that goes through memory in any case."""
View = Callable[[Tensor], Tensor]
Progress = Callable[[int, int], None]
"""Called with the bytes written, and those to write in all."""


def silent(done: int, total: int) -> None:
    """No progress shown."""


@dataclass(frozen=True)
class Part:
    """What one source contributes to a target.

    Attributes:
        source: The tensor's name in the source.
        rows: The first and the end of the rows (entries of dimension 0) that are read; all by default.
        view: What of the rows is taken.
        place: Where in the target it goes; entries keep their order, whatever the shapes.
    """

    source: str
    rows: tuple[int, int] | None = None
    view: View | None = None
    place: View | None = None


@dataclass(frozen=True)
class Move:
    """One tensor to write, and how it comes about.

    Attributes:
        target: Its name in the target.
        entry: Its shape and type.
        parts: Where its values come from; they are cast if need be.
        padding: Rows of zeros at its end, which no part covers.
        function: Applied to the only part first.
        gather: For each dimension of the only part the positions that are taken, `None` for all (`take`).
        layer: If the target stacks this tensor with others in a new first dimension: which it is, and of how many.
    """

    target: str
    entry: TensorEntry
    parts: tuple[Part, ...]
    padding: int = 0
    function: View | None = None
    gather: tuple[Tensor | None, ...] = ()
    layer: tuple[int, int] | None = None

    @property
    def cuts(self) -> bool:
        """Whether the only part is changed."""
        return self.function is not None or any(index is not None for index in self.gather)


class Source(Protocol):
    """A checkpoint that is read: `CheckpointReader`, `Shards`, `Pickled`."""

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Its tensors."""
        ...

    def fill(self, key: str, place: Tensor, rows: tuple[int, int] | None = None) -> None:
        """Read rows of a tensor into contiguous memory of its type."""
        ...

    def chunks(
        self, key: str, rows: tuple[int, int] | None = None
    ) -> Sequence[tuple[tuple[int, ...], StoredChunk]] | None:
        """The chunks of rows of a tensor, with their offsets; None if they cannot be read as bytes."""
        ...


class WithTensors:
    """A checkpoint that is read, with some tensors beside its own; a `Source`.

    Args:
        source: The checkpoint.
        tensors: The others, by names of their own.
    """

    def __init__(self, source: Source, tensors: Mapping[str, Tensor]) -> None:
        self._source, self._tensors = source, tensors
        own = {name: TensorEntry(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        self.entries: Mapping[str, TensorEntry] = {**source.entries, **own}

    def fill(self, key: str, place: Tensor, rows: tuple[int, int] | None = None) -> None:
        """See `Source`."""
        if key not in self._tensors:
            self._source.fill(key, place, rows)
        else:
            tensor = self._tensors[key]
            place.copy_(tensor if rows is None else tensor[slice(*rows)])

    def chunks(
        self, key: str, rows: tuple[int, int] | None = None
    ) -> Sequence[tuple[tuple[int, ...], StoredChunk]] | None:
        """See `Source`; none of those that lie in memory."""
        return None if key in self._tensors else self._source.chunks(key, rows)


class Target(Protocol):
    """A checkpoint that is written: `CheckpointWriter`, `ShardWriter`."""

    def write(self, key: str, tensor: Tensor, layer: tuple[int, int] | None = None) -> None:
        """Write a tensor."""
        ...

    def write_values(
        self, key: str, entry: TensorEntry, chunks: Sequence[StoredChunk], layer: tuple[int, int] | None = None
    ) -> None:
        """Write a tensor whose values lie on disk one after the other."""
        ...


class RecordTarget(Target, Protocol):
    """One that can take a tensor over as another checkpoint of the same format has it."""

    def copy(self, key: str, entry: TensorEntry, chunks: Sequence[tuple[tuple[int, ...], StoredChunk]]) -> None:
        """Write a tensor in the chunks that it has on disk."""
        ...


def run(moves: Sequence[Move], source: Source, target: Target | RecordTarget, progress: Progress = silent) -> None:
    """Carry out this process's share of a table, the same one on all processes.

    Raises:
        CheckpointError: The source is damaged, or a value does not fit into the type it is cast to.
    """
    own, assembly = own_share(moves), Assembly(source)
    total, share, done = sum(move.entry.nbytes for move in moves), sum(move.entry.nbytes for move in own), 0
    for move in own:
        if not _copy(move, source, target):
            target.write(move.target, assembly.make(move), move.layer)
        done += move.entry.nbytes
        progress(total * done // share if share else total, total)


def own_share(moves: Sequence[Move]) -> list[Move]:
    """The moves of this process, in their order; those one after the other that share a source stay together."""
    groups: list[list[Move]] = []
    latest: set[str] = set()
    for move in moves:
        sources = {part.source for part in move.parts}
        if latest.isdisjoint(sources):
            groups.append([])
        groups[-1].append(move)
        latest = sources
    owners = ranks.balance_by_size([sum(move.entry.count for move in group) for group in groups])
    return [move for group, owner in zip(groups, owners, strict=True) if owner == ranks.rank() for move in group]


def tensors(moves: Sequence[Move], source: Source) -> Iterator[tuple[str, Tensor]]:
    """What a table makes, in memory; each tensor may take the place of the one before."""
    assembly = Assembly(source)
    for move in moves:
        yield move.target, assembly.make(move)


def _copy(move: Move, source: Source, target: Target | RecordTarget) -> bool:
    """Write the target from file to file, if it is whole sources one after the other; whether it is."""
    if move.cuts or move.padding or move.entry.nbytes < SMALL:
        return False
    whole = torch.empty(move.entry.shape, dtype=move.entry.dtype, device="meta")
    end, stored = 0, list[tuple[Part, Sequence[tuple[tuple[int, ...], StoredChunk]]]]()
    for part in move.parts:
        place = whole if part.place is None else part.place(whole)
        entry = source.entries[part.source]
        if part.view is not None or entry.dtype != whole.dtype or not _follows(place, end):
            return False
        if (chunks := source.chunks(part.source, part.rows)) is None:
            return False
        stored.append((part, chunks))
        end += place.numel()
    if end != whole.numel():
        return False
    copy = getattr(target, "copy", None)
    if copy is not None and move.layer is None and len(stored) == 1 and stored[0][0].rows is None:
        (_, chunks) = stored[0]
        if all(chunk.by_torch for _, chunk in chunks):
            copy(move.target, move.entry, chunks)
            return True
    ordered = []
    for part, chunks in stored:
        if (values := _in_order(source.entries[part.source], part.rows, chunks)) is None:
            return False
        ordered += values
    target.write_values(move.target, move.entry, ordered, move.layer)
    return True


def _in_order(
    entry: TensorEntry, rows: tuple[int, int] | None, chunks: Sequence[tuple[tuple[int, ...], StoredChunk]]
) -> list[StoredChunk] | None:
    """The chunks whose values, one after the other, are those of the rows; None if they lie in another order."""
    whole = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
    whole = whole if rows is None else whole[slice(*rows)]
    end, found = int(whole.storage_offset()), list[StoredChunk]()
    for offset, chunk in sorted(chunks, key=lambda each: each[0]):
        first = (offset[0] - rows[0], *offset[1:]) if rows else offset
        place = whole[tuple(slice(start, start + size) for start, size in zip(first, chunk.shape, strict=True))]
        if chunk.values is None or not _follows(place, end):
            return None
        end += place.numel()
        found.append(chunk)
    return found


def _follows(place: Tensor, end: int) -> bool:
    return place.is_contiguous() and place.storage_offset() == end


class Assembly:
    """Tensors made in memory, which holds one, and the source that was read last.

    Args:
        source: Where their parts come from.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._whole, self._read, self._spare = ReusableBuffer(), ReusableBuffer(), ReusableBuffer()
        self._key: tuple[str, tuple[int, int] | None] | None = None
        self._latest = torch.empty(0)

    def make(self, move: Move) -> Tensor:
        """The tensor of a move, good until the next one."""
        if move.cuts:
            return self._cut(move)
        if len(move.parts) == 1 and (part := move.parts[0]).view is not None:
            seen = part.view(self._rows(part))
            if seen.is_contiguous() and seen.dtype == move.entry.dtype and seen.numel() == move.entry.count:
                return seen.view(move.entry.shape)
        tensor = self._whole.tensor(move.entry.shape, move.entry.dtype)
        if move.padding:
            tensor[len(tensor) - move.padding :] = 0
        for part in move.parts:
            self._put(move, part, tensor if part.place is None else part.place(tensor))
        return tensor

    def _put(self, move: Move, part: Part, place: Tensor) -> None:
        """Read what a part takes to where it goes."""
        entry = self._source.entries[part.source]
        if part.view is None and place.is_contiguous() and entry.dtype == place.dtype:
            self._source.fill(part.source, place.view(_shape(entry, part.rows)), part.rows)
            return
        rows = self._rows(part)
        seen = rows if part.view is None else part.view(rows)
        if seen.is_contiguous():
            seen = seen.view(place.shape)
        else:
            place = place.view(seen.shape)
        place.copy_(seen)
        if place.dtype == torch.float16 != seen.dtype and not bool(place.isfinite().all()):
            raise CheckpointError(
                f"{move.target} does not fit into float16", legal="--dtype bfloat16 or float32",
                got=f"values of {part.source} up to {float(seen.abs().max()):.3g}",
            )  # fmt: skip

    def _rows(self, part: Part) -> Tensor:
        """Rows of a source, and the same ones again without the disk: query, key and value are one weight of ours."""
        if self._key != (part.source, part.rows):
            entry = self._source.entries[part.source]
            self._key = None
            self._latest = self._read.tensor(_shape(entry, part.rows), entry.dtype)
            self._source.fill(part.source, self._latest, part.rows)
            self._key = (part.source, part.rows)
        return self._latest

    def _cut(self, move: Move) -> Tensor:
        """The only part through the function, and then from one memory to the other and back, cut in each dimension."""
        (part,) = move.parts
        tensor, self._key = self._rows(part), None  # it is overwritten
        if move.function is not None:
            tensor = move.function(tensor)
        free, used = self._spare, self._read
        for dimension, index in enumerate(move.gather):
            if index is not None:
                out = free.tensor(taken_shape(tensor, dimension, index), tensor.dtype)
                tensor = take(tensor, dimension, index, out)
                free, used = used, free
        return tensor


def take(tensor: Tensor, dimension: int, index: Tensor, out: Tensor | None = None) -> Tensor:
    """The positions `index` of one dimension of a weight on the CPU, once the dimensions before are cut.

    Args:
        tensor: The weight.
        dimension: The dimension.
        index: From `axes.indices`; for each entry of dimension 0 its own positions if it has two dimensions.
        out: Where to put them; a new tensor by default.
    """
    if out is None:
        out = torch.empty(taken_shape(tensor, dimension, index), dtype=tensor.dtype)
    if index.dim() == 2:
        for entry, own in enumerate(index):
            take(tensor[entry], dimension - 1, own, out[entry])
        return out
    # numpy knows no bfloat16, and takes 16-bit columns three times as fast as torch.
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    values = tensor.detach().view(bits).numpy()
    np.take(values, index.numpy(), axis=dimension, out=out.view(bits).numpy(), mode="clip")  # in range, as plans are
    return out


def taken_shape(tensor: Tensor, dimension: int, index: Tensor) -> tuple[int, ...]:
    """What `take` makes."""
    return (*tensor.shape[:dimension], index.shape[-1], *tensor.shape[dimension + 1 :])


def _shape(entry: TensorEntry, rows: tuple[int, int] | None) -> tuple[int, ...]:
    return entry.shape if rows is None else (rows[1] - rows[0], *entry.shape[1:])
