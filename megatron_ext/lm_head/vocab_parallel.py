"""A vocabulary that may be split over tensor-parallel ranks, and padded at its end."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class VocabParallel:
    """This rank's columns of the logits.

    Attributes:
        columns: How many columns this rank holds, padding included; the same on every rank.
        vocab_size: Entries of the whole vocabulary, without padding, which comes last.
        group: The tensor-parallel group; None when the vocabulary is whole.
    """

    columns: int
    vocab_size: int
    group: dist.ProcessGroup | None = None

    @cached_property
    def ranks(self) -> int:
        """Over how many ranks the vocabulary is split."""
        return dist.get_world_size(self.group) if self.group is not None else 1

    @cached_property
    def first(self) -> int:
        """The number of this rank's first column in the whole vocabulary."""
        return self.columns * (dist.get_rank(self.group) if self.group is not None else 0)

    @cached_property
    def unpadded_columns(self) -> int:
        """How many of this rank's columns are no padding; they come first."""
        return min(max(self.vocab_size - self.first, 0), self.columns)

    @property
    def padded(self) -> bool:
        """Whether any rank holds padding."""
        return self.vocab_size < self.columns * self.ranks

    def max(self, *values: Float[Tensor, " n"]) -> Float[Tensor, "q n"]:
        """The largest over all ranks of each of the q quantities, in one reduction."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def sum(self, *values: Float[Tensor, " n"]) -> Float[Tensor, "q n"]:
        """The sum over all ranks of each of the q quantities, in one reduction."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def gather(self, x: Tensor) -> Tensor:
        """What every rank has, side by side in the last dimension."""
        if self.ranks == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.ranks)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)

    def local(self, index: Int[Tensor, "*n"]) -> tuple[Int[Tensor, "*n"], Tensor]:
        """Numbers in the whole vocabulary as numbers of this rank's columns, and whether they are this rank's."""
        index = index - self.first
        return index.clamp(0, self.columns - 1), (index >= 0) & (index < self.columns)

    def _reduce(self, values: tuple[Tensor, ...], operation: Any) -> Tensor:
        stacked = torch.stack(values)
        if self.ranks > 1:
            dist.all_reduce(stacked, operation, group=self.group)
        return stacked


def row_max(logits: Float[Tensor, "n v"]) -> Float[Tensor, " n"]:
    """The largest of each row; minus infinity where a rank holds nothing but padding."""
    if logits.shape[-1] == 0:
        return logits.new_full(logits.shape[:1], -torch.inf)
    return logits.amax(-1)
