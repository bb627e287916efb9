"""Student and teacher as one model chunk: one pipeline, of which only the student is Megatron's to train and save."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_ext.data.sample_id import to_hex
from megatron_ext.distillation import intermediate_layers
from megatron_ext.distillation.intermediate_layers import (
    DISTANCES,
    FINAL,
    STUDENT,
    LayerOutput,
    PipelineRouting,
)
from megatron_ext.distillation.projections import Projections
from megatron_ext.distillation.student import StudentWrapper
from megatron_ext.errors import CheckpointError
from megatron_ext.lm_head.divergences import TopK
from megatron_ext.lm_head.hidden_states import head, hidden_states
from megatron_ext.lm_head.losses import LMHead, distillation_losses
from megatron_ext.lm_head.objective import Objective
from megatron_ext.lm_head.vocab_parallel import VocabParallel
from megatron_ext.models.hooks import HiddenStateRecorder

LAST = LayerOutput(FINAL)


@dataclass(frozen=True)
class StepLosses:
    """The losses of a micro-batch on the last stage.

    No tuple: in 16 bits Megatron's `Float16Module` takes those apart, and converts what is in them.

    Attributes:
        total: What is minimised, summed over tokens; the only one with a gradient.
        parts: What to log, by name: each token's value.
    """

    total: Float[Tensor, ""]
    parts: dict[str, Float[Tensor, "s b"]]


class TeacherStage(Protocol):
    """Where the teacher's states come from, on one stage."""

    def run(self, arrived: dict[str, Tensor], inputs: tuple[Any, ...]) -> dict[str, Tensor]:
        """The states that come to be on this stage, by name, from those that have arrived.

        Args:
            arrived: What the stage before handed on.
            inputs: Tokens (b, s), their positions (b, s), and attention mask; None where a stage needs none.
        """
        ...

    def target(
        self, found: dict[str, Tensor], sample_id: Int[Tensor, "b 2"], labels: Int[Tensor, "b s"], k: int
    ) -> LMHead | TopK:
        """On the last stage, what the student's logits are compared with.

        Args:
            found: The states of this stage.
            sample_id: Identities of the sequences.
            labels: Their next tokens, for an error to show.
            k: Of a sparse comparison: how many entries count one by one.
        """
        ...

    def loss(
        self, found: dict[str, Tensor], labels: Int[Tensor, "s b"], mask: Float[Tensor, "s b"]
    ) -> StepLosses | None:
        """The teacher's own loss on the last stage, if it is trained."""
        ...


@dataclass(frozen=True)
class IntermediateLossConfig:
    """How intermediate states are matched.

    Attributes:
        route: Which ones, and where they meet.
        distance: One of `states.DISTANCES`.
        weight: Of their loss, at this moment; None for the one that balances it with the logits' loss.
        projections: From the student's width to the teacher's, on this stage, and the balancing weight.
    """

    route: PipelineRouting
    distance: str
    weight: Callable[[], float | None]
    projections: Projections


class DistillationModel(StudentWrapper):
    """One pipeline stage of a student, with whatever it learns from.

    Between stages travels what `PipelineRouting.leaving` lists, side by side in the last dimension.

    Args:
        student: A chunk of the student.
        teacher: The teacher on this stage, or what stands for it.
        matching: Intermediate states.
        objective: What is compared, at this moment.
        vocab_size: Entries of the tokenizer, without padding.
    """

    teacher: TeacherStage

    def __init__(
        self,
        student: HybridModel,
        teacher: TeacherStage,
        matching: IntermediateLossConfig,
        objective: Callable[[], Objective],
        vocab_size: int,
    ) -> None:
        super().__init__(student)
        self.teacher = teacher
        self._matching, self._objective, self._vocab_size = matching, objective, vocab_size
        self.stage = student.pg_collection.pp.rank() + student.pg_collection.pp.size() * (student.vp_stage or 0)
        self._names = intermediate_layers.names(STUDENT, matching.route.points(self.stage, STUDENT))
        self._taps = HiddenStateRecorder(student, list(self._names))
        self._arrived: dict[str, Tensor] = {}
        self._unchecked: list[tuple[Tensor, Tensor, Tensor]] = []  # of each micro-batch: finite, labels, sample_id
        # Megatron's schedule of virtual stages takes all of them to be as wide as the student. Where they are not, they
        # tell each other the shapes, for which a GPU has to wait at each transfer; others are told (`Setup.widths`).
        before_last, dtype = range(matching.route.stages - 1), self.config.pipeline_dtype
        wider = any(matching.route.width(stage, dtype) != self.config.hidden_size for stage in before_last)
        self.config.variable_seq_lengths = wider and student.vp_stage is not None

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take what the stage before handed on, (s, b, width of all parts); None on the first."""
        (packed,) = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        self._arrived = {}
        if packed is not None:
            self._arrived = intermediate_layers.unpack(
                self._matching.route.plan(self.stage, packed.dtype).incoming, packed
            )
        self.module.set_input_tensor(self._arrived.get(STUDENT))  # type: ignore[arg-type] - None on the first stage

    def forward(
        self,
        tokens: Int[Tensor, "b s"] | None,
        position_ids: Int[Tensor, "b s"] | None,
        attention_mask: Tensor | None,
        labels: Int[Tensor, "b s"] | None = None,
        loss_mask: Float[Tensor, "b s"] | None = None,
        sample_id: Int[Tensor, "b 2"] | None = None,
    ) -> StepLosses | Float[Tensor, "s b w"]:
        """The losses on the last stage, what travels on before it.

        Args:
            tokens: What the models read; on the first stage.
            position_ids: Their positions.
            attention_mask: Megatron's.
            labels: The next tokens; on the last stage, like the others.
            loss_mask: 1 where a token counts.
            sample_id: Identities of the sequences (`sample_id.hash_samples`).

        Raises:
            CheckpointError: The teacher's logits are not finite; in training `check` says so, at the end of a step.
            DataError: A sequence is not in the cache, or damaged.
        """
        inputs = (tokens, position_ids, attention_mask)
        found, self._arrived = self._arrived, {}
        found |= self.teacher.run(found, inputs)
        found[STUDENT] = hidden_states(self.module, *inputs)
        found |= named(self._names, self._taps.take(), found[STUDENT])
        plan, dtype = self._matching.route.plan(self.stage, found[STUDENT].dtype), found[STUDENT].dtype
        for loss in plan.losses:
            own = self._matching.projections(loss.pair, found[loss.student])
            value = DISTANCES[self._matching.distance](own, found[loss.teacher].detach())
            found[loss.value] = intermediate_layers.split_bf16(value, dtype)
        if not self.module.post_process:
            return intermediate_layers.pack(plan.outgoing, found)
        assert labels is not None
        assert loss_mask is not None
        assert sample_id is not None
        return self._losses(found, labels, loss_mask, sample_id)

    def _losses(
        self,
        found: dict[str, Tensor],
        labels: Int[Tensor, "b s"],
        loss_mask: Float[Tensor, "b s"],
        sample_id: Int[Tensor, "b 2"],
    ) -> StepLosses:
        own, objective = head(self.module, found[STUDENT]), self._objective()
        vocabulary = VocabParallel(own.weight.shape[0], self._vocab_size, self.pg_collection.tp)
        mask, transposed = loss_mask.T.contiguous(), labels.T.contiguous()
        target = self.teacher.target(found, sample_id, labels, objective.k)
        losses = distillation_losses(own, target, transposed, mask, objective, vocabulary)
        self._unchecked.append((losses.finite.all(0), labels[:, :8], sample_id))
        if not torch.is_grad_enabled():
            self.check()
        total, parts = losses.total, {"lm loss": losses.ce, "kd loss": losses.kd}
        if self._matching.route.pairs:
            matched = self._matched(found)
            together = torch.stack(list(matched.values())).sum(0)
            parts["states loss"] = together.detach()
            if len(matched) > 1:
                parts |= {f"states {pair} loss": value.detach() for pair, value in matched.items()}
            share, weight = (mask * together).sum(), self._matching.weight()
            if weight is None:
                weight = self._matching.projections.balance.alpha
                if torch.is_grad_enabled():
                    self._matching.projections.balance.add((mask * losses.kd).sum() * objective.kd_weight, share)
            parts["states weight"] = torch.full_like(losses.kd, weight)
            total = total + weight * share
        teachers = self.teacher.loss(found, transposed, mask)
        if teachers is not None:
            total, parts = total + teachers.total, parts | teachers.parts
        return StepLosses(total, parts)

    def check(self) -> None:
        """Check that the teacher's logits were finite since the last call, once a step: a GPU is waited for.

        Raises:
            CheckpointError: They were not.
        """
        unchecked, self._unchecked = self._unchecked, []
        if unchecked and not torch.cat([finite for finite, *_ in unchecked]).all():
            _refuse(*next(each for each in unchecked if not each[0].all()))

    def end_step(self) -> None:
        """Balance the losses by those of the step that ends."""
        self._matching.projections.balance.step(self.pg_collection)

    def _matched(self, found: dict[str, Tensor]) -> dict[str, Float[Tensor, "s b"]]:
        """The distance of every pair, whole in the sequence."""
        values = {}
        for i, pair in enumerate(self._matching.route.pairs):
            value = intermediate_layers.join_bf16(found[intermediate_layers.distance(i)])
            if self.config.sequence_parallel:
                # Every tensor rank makes the whole loss of it, and so the whole gradient.
                value = gather_from_sequence_parallel_region(
                    value, tensor_parallel_output_grad=False, group=self.pg_collection.tp
                )
            values[str(pair)] = value
        return values


def named(names: dict[LayerOutput, str], taken: dict[LayerOutput, Tensor], output: Tensor) -> dict[str, Tensor]:
    """States by the names under which they travel; what a chunk gives out is `final`."""
    return {names[point]: value for point, value in taken.items()} | {names[LAST]: output}


def _refuse(finite: Tensor, labels: Int[Tensor, "b s"], sample_id: Int[Tensor, "b 2"]) -> None:
    wrong = ~finite
    names = ", ".join(to_hex(each) for each in sample_id[wrong])
    raise CheckpointError(
        f"the teacher's logits are not finite on {wrong.sum()} of {len(labels)} sequences of a micro-batch",
        got=f"{names} whose labels begin with {labels[wrong].tolist()}",
        legal="a teacher whose weights and activations are finite on this data",
    )
