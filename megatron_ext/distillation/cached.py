"""A student that learns from what a cache says of its teacher, with no teacher in memory."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from megatron_ext.distillation.cache import Cache, Reader
from megatron_ext.distillation.losses import Losses, distillation_losses
from megatron_ext.distillation.model import head, hidden_states
from megatron_ext.distillation.objective import Objective
from megatron_ext.distillation.student import StudentWrapper
from megatron_ext.distillation.vocabulary import Vocabulary
from megatron_ext.errors import DataError


class CachedDistillation(StudentWrapper):
    """One pipeline stage of a student; on the last one the losses, with targets from a cache.

    Args:
        student: A chunk of the student.
        cache: Of the teacher.
        objective: What is compared, at this moment; see `Cache.check`.
    """

    def __init__(self, student: HybridModel, cache: Cache, objective: Callable[[], Objective]) -> None:
        super().__init__(student)
        self._cache, self._objective = cache, objective
        self._reader = Reader(cache.path) if student.post_process else None
        self._positions = positions(cache.manifest.sequence_length, student.pg_collection.cp)

    def forward(
        self,
        tokens: Int[Tensor, "b s"] | None,
        position_ids: Int[Tensor, "b s"] | None,
        attention_mask: Tensor | None,
        labels: Int[Tensor, "b s"] | None = None,
        loss_mask: Float[Tensor, "b s"] | None = None,
        sample_id: Int[Tensor, "b 2"] | None = None,
    ) -> Losses | Float[Tensor, "s b h"]:
        """The losses on the last stage, the student's hidden states before it.

        Raises:
            DataError: A sample is not in the cache, or damaged.
        """
        student = hidden_states(self.module, tokens, position_ids, attention_mask)
        if self._reader is None:
            return student
        assert labels is not None
        assert loss_mask is not None
        assert sample_id is not None
        objective, own = self._over_entries(self._objective()), head(self.module, student)
        target = self._reader.read(sample_id, self._positions, objective.k, labels)
        vocabulary = Vocabulary(own.weight.shape[0], self._cache.manifest.vocabulary, self.pg_collection.tp)
        mask = loss_mask.T.contiguous()
        losses = distillation_losses(own, target, labels.T.contiguous(), mask, objective, vocabulary)
        if not losses.finite.all():
            raise DataError("a sample in the cache is damaged: its values are not finite", got=self._cache.path)
        return losses

    def _over_entries(self, objective: Objective) -> Objective:
        """`forward-kl` as what it is when no entry is left out."""
        if objective.sparse:
            return objective
        return replace(objective, divergence="top-k-rest", k=self._cache.manifest.k)


def positions(sequence_length: int, group: Any) -> Int[Tensor, " s"]:
    """Which tokens of a sequence this context-parallel rank has, in its order."""
    whole = {"tokens": torch.arange(sequence_length).view(1, -1)}
    if group.size() == 1:
        return whole["tokens"][0]
    return get_batch_on_this_cp_rank(whole, is_hybrid_cp=False, cp_group=group)["tokens"][0]


def with_cache(
    students: list[HybridModel], cache: Cache, objective: Callable[[], Objective]
) -> list[CachedDistillation]:
    """Pair the student's chunks with a cache (a `pre_wrap_hook`).

    Args:
        students: The student's chunks on this rank, one per virtual stage.
        cache: Of the teacher.
        objective: What is compared, at this moment.
    """
    return [CachedDistillation(student, cache, objective) for student in students]
