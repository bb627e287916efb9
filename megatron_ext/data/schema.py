"""What a batch is made of: named tensors, read on one tensor-parallel rank and given to the others."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from torch import Tensor

from megatron_ext.errors import DataError


@dataclass(frozen=True)
class Field:
    """One tensor of a batch.

    Attributes:
        shape: Of one sample.
        dtype: Its type.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class BatchSchema:
    """The tensors of a micro-batch by name; each is (b, *shape)."""

    fields: Mapping[str, Field]

    def read(self, data: Iterator[Mapping[str, Tensor]] | None) -> dict[str, Tensor]:
        """The next micro-batch, on this rank's device. A collective of the tensor-parallel ranks.

        Args:
            data: On the first of them; the others read none.

        Raises:
            DataError: A tensor is missing, or of another shape or type.
        """
        size = mpu.get_tensor_model_parallel_world_size()
        first = mpu.get_tensor_model_parallel_rank() == 0
        batch: dict[str, Tensor] = {}
        if first:
            assert data is not None
            sample = next(data)
            batch = {name: self._checked(name, sample.get(name)) for name in self.fields}
        if size == 1:
            return batch
        group: Any = mpu.get_tensor_model_parallel_group()
        source, device = mpu.get_tensor_model_parallel_src_rank(), torch.cuda.current_device()
        count = torch.tensor([len(next(iter(batch.values()))) if first else 0], device=device)
        dist.broadcast(count, source, group)
        for name, field in self.fields.items():
            if not first:
                batch[name] = torch.empty(int(count), *field.shape, dtype=field.dtype, device=device)
            dist.broadcast(batch[name], source, group)
        return batch

    def _checked(self, name: str, value: Tensor | None) -> Tensor:
        field = self.fields[name]
        if value is None or tuple(value.shape[1:]) != field.shape or value.dtype != field.dtype:
            got = "nothing" if value is None else f"{tuple(value.shape[1:])}, {value.dtype}"
            raise DataError(f"a sample's {name!r}", got=got, legal=f"{field.shape}, {field.dtype}")
        return value.to(torch.cuda.current_device(), non_blocking=True).contiguous()
