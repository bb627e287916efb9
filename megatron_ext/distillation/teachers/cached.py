"""What a cache says of a teacher, in its place: no teacher is in memory."""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from megatron.core.models.hybrid.hybrid_model import HybridModel
from torch import Tensor

from megatron_ext.distillation.logit_cache.cache import Cache
from megatron_ext.distillation.logit_cache.shards import CacheReader
from megatron_ext.distillation.model import StepLosses
from megatron_ext.lm_head.divergences import TopK
from megatron_ext.lm_head.objective import Objective
from megatron_ext.platform.context_parallel import zigzag_split


class CachedTeacher:
    """A cache on one stage (see `model.TeacherStage`); only the last one reads it.

    Args:
        cache: Of the teacher.
        student: The chunk of the student.
    """

    def __init__(self, cache: Cache, student: HybridModel) -> None:
        self._reader = CacheReader(cache.path, cache.manifest) if student.post_process else None
        group: Any = student.pg_collection.cp
        self._positions = zigzag_split(torch.arange(cache.manifest.sequence_length), group.rank(), group.size())

    def run(self, arrived: dict[str, Tensor], inputs: tuple[Any, ...]) -> dict[str, Tensor]:
        """Nothing: it has no states."""
        return {}

    def target(
        self, found: dict[str, Tensor], sample_id: Int[Tensor, "b 2"], labels: Int[Tensor, "b s"], k: int
    ) -> TopK:
        """The teacher's likeliest entries.

        Raises:
            DataError: A sequence is not in the cache, or damaged.
        """
        assert self._reader is not None
        return self._reader.read(sample_id, self._positions, k, labels)

    def loss(self, found: dict[str, Tensor], labels: Tensor, mask: Tensor) -> StepLosses | None:
        """None: it is not trained."""
        return None


def as_top_k_objective(objective: Objective, cache: Cache) -> Objective:
    """`forward-kl` as what it is when no entry is left out."""
    return objective if objective.sparse else replace(objective, divergence="top-k-rest", k=cache.manifest.k)
