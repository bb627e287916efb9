"""What a cache says of a teacher, in its place: no teacher is in memory."""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from megatron_ext.distillation.logit_cache.cache import Cache
from megatron_ext.distillation.logit_cache.shards import CacheReader
from megatron_ext.distillation.model import StepLosses
from megatron_ext.lm_head.divergences import TopK
from megatron_ext.lm_head.objective import Objective


class CachedTeacher:
    """A cache on one stage (see `model.TeacherStage`); only the last one reads it.

    Args:
        cache: Of the teacher.
        student: The chunk of the student.
    """

    def __init__(self, cache: Cache, student: HybridModel) -> None:
        self._reader = CacheReader(cache.path, cache.manifest) if student.post_process else None
        self._positions = positions(cache.manifest.sequence_length, student.pg_collection.cp)

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


def positions(sequence_length: int, group: Any) -> Int[Tensor, " s"]:
    """Which tokens of a sequence this context-parallel rank has, in its order."""
    whole = {"tokens": torch.arange(sequence_length).view(1, -1)}
    if group.size() == 1:
        return whole["tokens"][0]
    return get_batch_on_this_cp_rank(whole, is_hybrid_cp=False, cp_group=group)["tokens"][0]
