"""Student and teacher as one model chunk: one pipeline, in which only the student is trained and saved."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from megatron.core import dist_checkpointing
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_ext.distillation.identity import name
from megatron_ext.distillation.losses import Head, Losses, distillation_losses
from megatron_ext.distillation.objective import Objective
from megatron_ext.distillation.student import StudentWrapper
from megatron_ext.distillation.teacher import Teacher
from megatron_ext.distillation.vocabulary import Vocabulary
from megatron_ext.errors import CheckpointError
from megatron_ext.models.builder import PatternModelBuilder, model_config
from megatron_ext.models.config import Architecture


class DistillationModel(StudentWrapper):
    """One pipeline stage of a student with the same stage of its teacher beside it.

    The teacher is not registered: it is in no checkpoint, no optimizer and no gradient buffer, and always in evaluation
    mode.

    Between stages travels `[student | teacher]`, concatenated over the hidden dimension.

    Args:
        student: A chunk of the student.
        teacher: The same chunk of the teacher, with its weights.
        objective: What is compared, or a function that says so at this moment, for weights that change.
        tokens: Entries of the vocabulary, without padding.
    """

    teacher: HybridModel

    def __init__(
        self, student: HybridModel, teacher: HybridModel, objective: Callable[[], Objective], tokens: int
    ) -> None:
        super().__init__(student)
        self.__dict__["teacher"] = teacher.requires_grad_(False).eval()  # past nn.Module's registration
        self._objective, self._tokens = objective, tokens
        if student.pg_collection.pp.size() > 1:
            # The stages tell each other the shapes, instead of taking the student's for granted.
            self.config.variable_seq_lengths = True

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take `[student | teacher]` from the previous stage, (s, b, h_student + h_teacher); None on the first."""
        (both,) = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        student: Any = None
        teacher: Any = None
        if both is not None:
            student, teacher = both.split([self.config.hidden_size, self.teacher.config.hidden_size], dim=-1)
            student, teacher = student.contiguous(), teacher.detach().contiguous()
        self.module.set_input_tensor(student)
        self.teacher.set_input_tensor(teacher)

    def forward(
        self,
        tokens: Int[Tensor, "b s"] | None,
        position_ids: Int[Tensor, "b s"] | None,
        attention_mask: Tensor | None,
        labels: Int[Tensor, "b s"] | None = None,
        loss_mask: Float[Tensor, "b s"] | None = None,
        sample_id: Int[Tensor, "b 2"] | None = None,
    ) -> Losses | Float[Tensor, "s b h"]:
        """The losses on the last stage, `[student | teacher]` before it.

        Args:
            tokens: What the models read; on the first stage.
            position_ids: Their positions.
            attention_mask: Megatron's.
            labels: The next tokens; on the last stage, like the others.
            loss_mask: 1 where a token counts.
            sample_id: Identities of the sequences (`identity.identify`).

        Raises:
            CheckpointError: The teacher's logits are not finite.
        """
        with torch.no_grad():
            teacher = hidden_states(self.teacher, tokens, position_ids, attention_mask)
        student = hidden_states(self.module, tokens, position_ids, attention_mask)
        if not self.module.post_process:
            return torch.cat([student, teacher], dim=-1)
        assert labels is not None
        assert loss_mask is not None
        own, other = head(self.module, student), head(self.teacher, teacher)
        vocabulary = Vocabulary(own.weight.shape[0], self._tokens, self.pg_collection.tp)
        mask = loss_mask.T.contiguous()
        losses = distillation_losses(own, other, labels.T.contiguous(), mask, self._objective(), vocabulary)
        if not losses.finite.all():
            wrong = (~losses.finite).any(0)
            names = ", ".join(name(each) for each in sample_id[wrong]) if sample_id is not None else "sequences"
            raise CheckpointError(
                f"the teacher's logits are not finite on {wrong.sum()} of {len(labels)} sequences of a micro-batch",
                got=f"{names} whose labels begin with {labels[wrong][:, :8].tolist()}",
                legal="a teacher whose weights and activations are finite on this data",
            )
        return losses


def hidden_states(model: HybridModel, *inputs: Any) -> Float[Tensor, "s b h"]:
    """What a chunk hands on: on the last stage the states after the final norm, instead of logits."""
    last = model.post_process
    model.post_process = False  # Megatron's only door past the output layer
    try:
        return model(*inputs)
    finally:
        model.post_process = last


def head(model: HybridModel, hidden: Float[Tensor, "s b h"]) -> Head:
    """The end of a model: its states, whole in the sequence, and this rank's rows of the output layer."""
    shared = model.share_embeddings_and_output_weights
    weight: Any = model.shared_embedding_or_output_weight() if shared else model.output_layer.weight
    group = model.pg_collection.tp
    # Each rank makes its part of the gradient of `hidden`: on the way back the parts are summed.
    if model.config.sequence_parallel:
        return Head(gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group), weight)
    return Head(copy_to_tensor_model_parallel_region(hidden, group=group), weight)


def with_teacher(
    students: list[HybridModel],
    teacher: Teacher,
    args: Namespace,
    architecture: Architecture,
    objective: Callable[[], Objective],
    tokens: int,
) -> list[DistillationModel]:
    """Build the teacher's chunks beside the student's, load their weights, and pair them (a `pre_wrap_hook`).

    Args:
        students: The student's chunks on this rank, one per virtual stage.
        teacher: The teacher.
        args: Megatron's validated namespace.
        architecture: The student's.
        objective: What is compared, at this moment.
        tokens: Entries of the vocabulary, without padding.
    """
    config = model_config(args, teacher.beside(architecture))
    config.transformer.perform_initialization = False  # every weight is read
    builder = PatternModelBuilder(config)
    chunks = []
    for student in students:
        chunk = builder.build_model(
            student.pg_collection,
            pre_process=student.pre_process,
            post_process=student.post_process,
            vp_stage=student.vp_stage,
        )
        chunks.append(chunk.to(device=torch.cuda.current_device(), dtype=config.transformer.params_dtype))
    load(chunks, teacher)
    return [DistillationModel(s, t, objective, tokens) for s, t in zip(students, chunks, strict=True)]


def load(chunks: list[HybridModel], teacher: Teacher) -> None:
    """Read the teacher's weights into its chunks, whatever layout saved them."""
    metadata = dist_checkpointing.load_content_metadata(str(teacher.step)) or {}
    wanted = {str(i): chunk.sharded_state_dict(metadata=dict(metadata)) for i, chunk in enumerate(chunks)}
    found: Any = dist_checkpointing.load(wanted, str(teacher.step))
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(found[str(i)])
