"""Student and teacher as one model chunk: one pipeline, in which only the student is trained and saved."""

from argparse import Namespace
from typing import Any

import torch
from jaxtyping import Float, Int
from megatron.core import dist_checkpointing
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_ext.distillation.losses import Losses, distillation_losses
from megatron_ext.distillation.teacher import Teacher
from megatron_ext.models.builder import PatternModelBuilder, model_config
from megatron_ext.models.config import Architecture


class DistillationModel(MegatronModule):
    """One pipeline stage of a student with the same stage of its teacher beside it.

    To Megatron it is another of its wrappers: the student is `module`, and whatever is asked of the state is answered
    by the student without a prefix, so that its checkpoint is a `HybridModel`'s. The teacher is not registered: it is
    in no checkpoint, no optimizer and no gradient buffer, and always in evaluation mode.

    Between stages travels `[student | teacher]`, concatenated over the hidden dimension.

    Args:
        student: A chunk of the student.
        teacher: The same chunk of the teacher, with its weights.
        **loss: Keywords of `distillation_losses`.
    """

    module: HybridModel
    teacher: HybridModel

    def __init__(self, student: HybridModel, teacher: HybridModel, **loss: Any) -> None:
        super().__init__(student.config)
        self.module = student
        self.vp_stage, self.pg_collection = student.vp_stage, student.pg_collection
        self.__dict__["teacher"] = teacher.requires_grad_(False).eval()  # past nn.Module's registration
        self._loss = loss
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
    ) -> Losses | Float[Tensor, "s b h"]:
        """The losses on the last stage, `[student | teacher]` before it. Megatron applies the loss mask later."""
        with torch.no_grad():
            teacher = self.teacher(tokens, position_ids, attention_mask)
        student = self.module(tokens, position_ids, attention_mask)
        if not self.module.post_process:
            return torch.cat([student, teacher], dim=-1)
        assert labels is not None
        return distillation_losses(student, teacher, labels, group=self.pg_collection.tp, **self._loss)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The student's."""
        return self.module.state_dict(*args, **kwargs)

    def state_dict_for_save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """The student's."""
        return self.module.state_dict_for_save_checkpoint(*args, **kwargs)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The student's."""
        return self.module.sharded_state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Into the student."""
        return self.module.load_state_dict(*args, **kwargs)


def with_teacher(
    students: list[HybridModel], teacher: Teacher, args: Namespace, architecture: Architecture, **loss: Any
) -> list[DistillationModel]:
    """Build the teacher's chunks beside the student's, load their weights, and pair them (a `pre_wrap_hook`).

    Args:
        students: The student's chunks on this rank, one per virtual stage.
        teacher: The teacher.
        args: Megatron's validated namespace.
        architecture: The student's.
        **loss: Keywords of `distillation_losses`.
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
    return [DistillationModel(s, t, **loss) for s, t in zip(students, chunks, strict=True)]


def load(chunks: list[HybridModel], teacher: Teacher) -> None:
    """Read the teacher's weights into its chunks, whatever layout saved them."""
    metadata = dist_checkpointing.load_content_metadata(str(teacher.step)) or {}
    wanted = {str(i): chunk.sharded_state_dict(metadata=dict(metadata)) for i, chunk in enumerate(chunks)}
    found: Any = dist_checkpointing.load(wanted, str(teacher.step))
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(found[str(i)])
