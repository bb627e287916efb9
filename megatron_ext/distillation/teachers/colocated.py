"""A teacher that runs beside its student, on the same layout: the same stage of both on each rank."""

from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_ext.distillation.intermediate_layers import TEACHER, LayerOutput, names
from megatron_ext.distillation.model import StepLosses, named
from megatron_ext.distillation.teachers.identity import check_alike
from megatron_ext.distillation.teachers.teacher import Teacher
from megatron_ext.lm_head.hidden_states import head, hidden_states
from megatron_ext.lm_head.losses import LMHead, cross_entropy
from megatron_ext.lm_head.vocab_parallel import VocabParallel
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.builder import model_config
from megatron_ext.models.hooks import HiddenStateRecorder
from megatron_ext.models.module_builder import build_beside, read_weights
from megatron_ext.training.extra_models import ExtraModel


class ColocatedTeacher:
    """One chunk of a frozen teacher (see `model.TeacherStage`).

    Args:
        chunk: The chunk, with its weights.
        points: The states that come to be on it and are wanted.
    """

    def __init__(self, chunk: HybridModel, points: Sequence[LayerOutput]) -> None:
        self.chunk = chunk
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


def extra_model(teacher: Teacher, architecture: Architecture) -> ExtraModel:
    """A frozen teacher beside its student, with the weights of its checkpoint.

    Args:
        teacher: The teacher.
        architecture: The student's.
    """
    own = teacher.with_student_vocab(architecture)
    return ExtraModel(TEACHER, partial(build, own), partial(read, teacher))


def build(architecture: Architecture, students: list[Any], args: Namespace) -> list[Any]:
    """A teacher's chunks on its student's layout, without their weights."""
    config = model_config(args, architecture)
    config.transformer.perform_initialization = False  # every weight is read
    return build_beside(config, students)


def read(teacher: Teacher, chunks: list[Any]) -> None:
    """Read a teacher's weights into its chunks.

    Raises:
        CheckpointError: The teacher's directory has gained a step while the ranks started.
    """
    check_alike(teacher)
    read_weights(chunks, teacher.step)
