"""A teacher that runs beside its student, on the same layout: the same stage of both on each rank."""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from megatron.core import dist_checkpointing
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_ext.distillation.intermediate_layers import TEACHER, LayerOutput, names
from megatron_ext.distillation.model import StepLosses, named
from megatron_ext.distillation.teachers.teacher import Teacher
from megatron_ext.lm_head.hidden_states import head, hidden_states
from megatron_ext.lm_head.losses import LMHead, cross_entropy
from megatron_ext.lm_head.vocab_parallel import VocabParallel
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.builder import PatternModelBuilder, model_config
from megatron_ext.models.hooks import HiddenStateRecorder


class ColocatedTeacher:
    """One chunk of a frozen teacher (see `model.TeacherStage`).

    Args:
        chunk: The chunk, with its weights.
        points: The states that come to be on it and are wanted.
    """

    def __init__(self, chunk: HybridModel, points: Sequence[LayerOutput]) -> None:
        self.chunk = chunk.requires_grad_(False).eval()
        self._names, self._taps = names(TEACHER, points), HiddenStateRecorder(chunk, points)

    def run(self, arrived: dict[str, Tensor], inputs: tuple[Any, ...]) -> dict[str, Tensor]:
        """The teacher's states after this stage, without a graph."""
        with torch.no_grad():
            return self._run(arrived, inputs)

    def _run(self, arrived: dict[str, Tensor], inputs: tuple[Any, ...]) -> dict[str, Tensor]:
        self.chunk.set_input_tensor(arrived.get(TEACHER))  # type: ignore[arg-type] - None on the first stage
        output = hidden_states(self.chunk, *inputs)
        return {TEACHER: output, **named(self._names, self._taps.take(), output)}

    def target(self, found: dict[str, Tensor], sample_id: Tensor, labels: Tensor, k: int) -> LMHead:
        """What its logits are made of."""
        return head(self.chunk, found[TEACHER].detach())

    def loss(self, found: dict[str, Tensor], labels: Tensor, mask: Tensor) -> StepLosses | None:
        """None: it is not trained."""
        return None


class TrainedColocatedTeacher(ColocatedTeacher):
    """One chunk of a teacher that is corrected while it teaches: it minimises its own cross entropy with the data.

    Minitron in practice (arXiv 2408.11796, section 2.1). The student's loss does not reach it.
    """

    def __init__(self, chunk: HybridModel, points: Sequence[LayerOutput], vocab_size: int) -> None:
        self.chunk = chunk
        self._names, self._taps = names(TEACHER, points), HiddenStateRecorder(chunk, points)
        self._vocab_size = vocab_size
        for module in chunk.modules():
            if isinstance(module, TopKRouter):
                module.layer_number = None  # Megatron logs the balance of one model's experts: the student's

    def run(self, arrived: dict[str, Tensor], inputs: tuple[Any, ...]) -> dict[str, Tensor]:
        """The teacher's states after this stage, with their graph; its experts are balanced as those of any model."""
        self.chunk.train(torch.is_grad_enabled())
        return self._run(arrived, inputs)

    def loss(self, found: dict[str, Tensor], labels: Int[Tensor, "s b"], mask: Float[Tensor, "s b"]) -> StepLosses:
        """Its cross entropy with the data."""
        own = head(self.chunk, found[TEACHER])
        vocabulary = VocabParallel(own.weight.shape[0], self._vocab_size, self.chunk.pg_collection.tp)
        losses = cross_entropy(own, labels, mask, vocabulary)
        return StepLosses(losses.total, {"teacher loss": losses.ce})


def build(
    students: list[HybridModel], teacher: Teacher, args: Namespace, architecture: Architecture
) -> list[HybridModel]:
    """The teacher's chunks on the student's layout, with their weights.

    Args:
        students: The student's chunks on this rank, one per virtual stage.
        teacher: The teacher.
        args: Megatron's validated namespace.
        architecture: The student's.
    """
    config = model_config(args, teacher.with_student_vocab(architecture))
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
    return chunks


def load(chunks: list[HybridModel], teacher: Teacher) -> None:
    """Read the teacher's weights into its chunks, whatever layout saved them."""
    metadata = dist_checkpointing.load_content_metadata(str(teacher.step)) or {}
    wanted = {str(i): chunk.sharded_state_dict(metadata=dict(metadata)) for i, chunk in enumerate(chunks)}
    found: Any = dist_checkpointing.load(wanted, str(teacher.step))
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(found[str(i)])
