"""What a batch is made of: named tensors, read once and given to the ranks that need them.

Tensor-parallel ranks get the same; context-parallel ranks share the tokens of a sequence; a pipeline stage gets what it
uses. A tensor can be made of the others, such as a sample's identity.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import mpu
from torch import Tensor

from megatron_ext.errors import DataError
from megatron_ext.platform.context_parallel import zigzag_of_documents, zigzag_split

Sample = Mapping[str, Tensor]


@dataclass(frozen=True)
class Field:
    """One tensor of a batch.

    Attributes:
        shape: Of one sample; None is any size, the same for all samples of a micro-batch.
        dtype: Its type.
        sequence: The dimension of a sample that context-parallel ranks split; None if each has it whole.
        stages: Of the pipeline that use it.
        below: What its values are smaller than, such as the rows of a table.
        made: Makes it of a micro-batch's other tensors; by default the data have it.
    """

    shape: tuple[int | None, ...]
    dtype: torch.dtype
    sequence: int | None = None
    stages: Literal["all", "first", "last"] = "all"
    below: int | None = None
    made: Callable[[Sample], Tensor] | None = None


@dataclass(frozen=True)
class BatchSchema:
    """The tensors of a micro-batch by name; each is (b, *shape).

    Attributes:
        fields: Of each name.
        documents: The tensor that says where the documents begin that are packed in a sample, and where the last ends
            (d + 1); context-parallel ranks then split each document for itself. None where a sample is one sequence.
    """

    fields: Mapping[str, Field]
    documents: str | None = None

    def read(self, data: Iterator[Sample] | None, micro_batch: int, vp_stage: int | None = None) -> dict[str, Tensor]:
        """This rank's part of the next micro-batch, on its device. A collective of the tensor-parallel ranks.

        Args:
            data: On the first of them; the others read none.
            micro_batch: Samples in it.
            vp_stage: Of a virtual pipeline, the stage that asks.

        Returns:
            What this pipeline stage uses; nothing is read where it uses nothing.

        Raises:
            DataError: A tensor is missing, or of another shape or type, or has a value that is too large.
        """
        fields = {name: field for name, field in self.fields.items() if _is_used(field, vp_stage)}
        if not fields:
            return {}
        batch: dict[str, Tensor] = {}
        if mpu.get_tensor_model_parallel_rank() == 0:
            assert data is not None
            sample = next(data)
            batch = {name: _checked(name, field, sample, micro_batch) for name, field in fields.items()}
            self._check_split(fields, batch)
            device = torch.cuda.current_device()
            batch = {name: value.to(device, non_blocking=True).contiguous() for name, value in batch.items()}
        if mpu.get_tensor_model_parallel_world_size() > 1:
            batch = _broadcast(fields, batch, micro_batch)
        return self._split(fields, batch)

    def _check_split(self, fields: Mapping[str, Field], batch: Mapping[str, Tensor]) -> None:
        """Check that context-parallel ranks can share the sequences evenly."""
        pieces = 2 * mpu.get_context_parallel_world_size()
        if pieces == 2:
            return
        borders = batch[self.documents] if self.documents is not None else None
        for name, field in fields.items():
            if field.sequence is None:
                continue
            length = batch[name].shape[1 + field.sequence]
            if borders is not None and (borders[:, -1] != length).any():
                ends = sorted(set(borders[:, -1].tolist()))
                raise DataError(f"the documents of {name!r} do not fill a sample", got=f"ends {ends}", legal=length)
            if length % pieces:
                raise DataError(f"the length of {name!r} cannot be split", got=length, legal=f"a multiple of {pieces}")
        if borders is not None and (borders.diff() % pieces).any():
            lengths = sorted(set(borders.diff().flatten().tolist()))
            raise DataError("a document cannot be split", got=f"lengths {lengths}", legal=f"multiples of {pieces}")

    def _split(self, fields: Mapping[str, Field], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tokens of this context-parallel rank."""
        rank, ranks = mpu.get_context_parallel_rank(), mpu.get_context_parallel_world_size()
        if ranks == 1:
            return batch
        for name, field in fields.items():
            if field.sequence is None:
                continue
            value, dim = batch[name], 1 + field.sequence
            if self.documents is None:
                batch[name] = zigzag_split(value, rank, ranks, dim)
            else:
                own = zigzag_of_documents(batch[self.documents], value.shape[dim], rank, ranks)
                own = own.view(len(own), *[1] * (dim - 1), -1, *[1] * (value.dim() - dim - 1))
                batch[name] = torch.take_along_dim(value, own, dim)
        return batch


def _is_used(field: Field, vp_stage: int | None) -> bool:
    """Whether this pipeline stage uses a tensor."""
    if field.stages == "all":
        return True
    is_end = mpu.is_pipeline_first_stage if field.stages == "first" else mpu.is_pipeline_last_stage
    return is_end(ignore_virtual=vp_stage is None, vp_stage=vp_stage)


def _checked(name: str, field: Field, sample: Sample, micro_batch: int) -> Tensor:
    """A tensor of a micro-batch, on the host, where it can be looked at."""
    value = sample.get(name) if field.made is None else field.made(sample)
    shape = (micro_batch, *field.shape)
    if value is None or value.dtype != field.dtype or not _fits(tuple(value.shape), shape):
        got = "nothing" if value is None else f"{tuple(value.shape)}, {value.dtype}"
        raise DataError(f"a micro-batch's {name!r}", got=got, legal=f"{shape}, {field.dtype}")
    # Split over tensor-parallel ranks, an embedding takes any number; on a GPU it ends in an assertion of the device.
    if field.below is not None and (largest := int(value.max())) >= field.below:
        raise DataError(
            f"the data's {name!r} have a number that the model does not", got=largest, legal=f"0 to {field.below - 1:,}"
        )
    return value


def _fits(shape: tuple[int, ...], legal: tuple[int | None, ...]) -> bool:
    return len(shape) == len(legal) and all(size in (own, None) for own, size in zip(shape, legal, strict=True))


def _broadcast(fields: Mapping[str, Field], batch: dict[str, Tensor], micro_batch: int) -> dict[str, Tensor]:
    """The first tensor-parallel rank's tensors on all of them."""
    group: Any = mpu.get_tensor_model_parallel_group()
    source, device = mpu.get_tensor_model_parallel_src_rank(), torch.cuda.current_device()
    shapes = {name: [micro_batch, *field.shape] for name, field in fields.items()}
    unknown = [(name, dim) for name, shape in shapes.items() for dim, size in enumerate(shape) if size is None]
    if unknown:  # a GPU is waited for
        sizes = torch.tensor([batch[name].shape[dim] if batch else 0 for name, dim in unknown], device=device)
        dist.broadcast(sizes, source, group)
        for (name, dim), size in zip(unknown, sizes.tolist(), strict=True):
            shapes[name][dim] = size
    if not batch:
        batch = {name: torch.empty(shapes[name], dtype=field.dtype, device=device) for name, field in fields.items()}
    for value in batch.values():
        dist.broadcast(value, source, group)
    return batch
