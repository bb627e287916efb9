"""`megatron-ext distill --distill-teacher NETWORK`: an image classifier that learns from another one's logits.

The teacher is an extra model: frozen, in evaluation mode, on the student's layout whatever layout saved it, and no part
of the student's checkpoints. Both see the same images, varied and mixed alike.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.checksums import verify_step
from megatron_ext.distillation.options import LogitOptions, check_objective
from megatron_ext.distillation.teachers.identity import check_alike, remember
from megatron_ext.errors import ConfigError
from megatron_ext.lm_head import naive
from megatron_ext.lm_head.objective import Objective
from megatron_ext.models.training_cost import Layout
from megatron_ext.training.job import DryRun, Job, RunConfig
from megatron_ext.training.run_job import run_job
from megatron_ext.vision import job
from megatron_ext.vision.architecture import MambaVision
from megatron_ext.vision.checkpoint import model_of
from megatron_ext.vision.family import FAMILY, build
from megatron_ext.vision.task import classification

if TYPE_CHECKING:
    from megatron_ext.training.extra_models import ExtraModel
    from megatron_ext.training.step import Task

TEACHER = "teacher"


@dataclass(frozen=True)
class ImageTeacher:
    """A teacher's weights on disk.

    Attributes:
        step: The step that they are read from.
        model: The network.
    """

    step: Path
    model: MambaVision

    @classmethod
    def find(cls, path: str) -> "ImageTeacher":
        """The newest complete step at `path`, a checkpoint directory or a step in one.

        Raises:
            CheckpointError: There is none, it is damaged, or it holds no image network.
        """
        step = layout.find(path).path
        model = model_of(step)
        verify_step(step, weights_only=True)
        return cls(step, model)

    def check(self, student: MambaVision, tp: int) -> None:
        """Check that a student can learn from it, on so many tensor-parallel ranks.

        Raises:
            ConfigError: It knows other classes or other images, or does not fit the layout.
        """
        for name in ("classes", "image_channels"):
            own, students = getattr(self.model, name), getattr(student, name)
            if own != students:
                what = f"teacher and student have not the same {name.replace('_', ' ')}"
                flag = f"--mambavision-{name.replace('_', '-')}"
                raise ConfigError(what, got=f"teacher {own}, student {students}", legal=f"{flag} {own}")
        try:
            self.model.check_layout(tp)
        except ConfigError as error:
            raise ConfigError(f"the teacher cannot run beside the student: {error}") from error

    def extra_model(self) -> "ExtraModel":
        """It beside the student."""
        from megatron_ext.models.module_builder import build_beside, read_weights
        from megatron_ext.training.extra_models import ExtraModel

        def beside_students(students: list[Any], args: argparse.Namespace) -> list[Any]:
            config = replace(FAMILY.config(args, self.model), build=build)  # without an average of its weights
            return build_beside(config, students)

        def read(chunks: list[Any]) -> None:
            check_alike(self)
            read_weights(chunks, self.step)

        return ExtraModel(TEACHER, beside_students, read)


class LogitLesson:
    """The loss of a student of logits: `kd_weight * T^2 * divergence + ce_weight * cross entropy with the labels`.

    Args:
        objective: What is compared, at this moment.

    Attributes:
        units: Of `kd_loss`, T^2 times the divergence, and of `total_loss`, what is minimised.
    """

    def __init__(self, objective: Callable[[], Objective]) -> None:
        self._objective = objective
        self.units = {"kd_loss": "nats per image", "total_loss": "nats per image"}

    def logits(self, network: Any, images: Tensor) -> Tensor:
        """The teacher's."""
        from megatron_ext.training.extra_models import beside

        teacher = beside(network)[TEACHER]
        with torch.no_grad():
            return teacher(images.to(next(teacher.parameters()).dtype)).float()

    def losses(self, logits: Tensor, other: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See `task.Lesson`."""
        objective = self._objective()
        kd = naive.divergence(logits, other, objective).sum()
        total = objective.kd_weight * kd + objective.ce_weight * labels
        return total, {"kd_loss": kd, "total_loss": total}


@dataclass(frozen=True)
class Request:
    """A distillation that can begin.

    Attributes:
        images: The number of images by split.
        teacher: Whom the student learns from.
    """

    images: dict[str, int]
    teacher: ImageTeacher


def check(run: RunConfig) -> Request:
    """Find what is wrong with the images, the teacher and the flags.

    Raises:
        ConfigError, DataError, CheckpointError: Says what.
    """
    options: LogitOptions = run.options["distill"]
    student: Any = run.model
    images = job.check(run)
    assert options.teacher is not None  # it has brought us here
    teacher = ImageTeacher.find(options.teacher)
    teacher.check(student, run.args.tensor_model_parallel_size)
    for share in (0.0, 1.0):
        objective = options.weighted(options.compared(_default(student)), share)
        check_objective(objective, student.classes)
        try:
            naive.divergence(torch.zeros(1, student.classes), torch.zeros(1, student.classes), objective)
        except ValueError:
            legal = "one that `megatron_ext.lm_head.naive` has"
            raise ConfigError("no divergence of image networks", got=objective.divergence, legal=legal) from None
    remember(run, teacher)
    return Request(images, teacher)


def show(run: RunConfig, request: Request) -> DryRun:
    """What `--dry-run` adds."""
    own, teacher, layout = job.show(run, request.images), request.teacher.model, Layout.from_args(run.args)
    rows = {"teacher": f"{teacher.num_parameters():,} parameters, pattern {teacher.pattern}", **own.rows}
    memory = FAMILY.memory(run.model, layout) | {"teacher": teacher.num_parameters() / layout.tp * layout.width}
    return DryRun(rows, memory=memory)


def taught(teacher: ImageTeacher, run: RunConfig) -> "Task":
    """The task of images with a teacher beside the student."""
    options, args, model = run.options["distill"], run.args, run.model
    compared = options.compared(_default(model))

    def objective() -> Objective:
        done = getattr(args, "curr_iteration", None) or getattr(args, "iteration", 0)
        return options.weighted(compared, done / max(1, (args.train_iters or 1) - 1))

    return replace(classification(run, LogitLesson(objective)), extra_models=(teacher.extra_model(),))


def run_checked(run: RunConfig, request: Request) -> None:
    """Train the student, or measure it with `--skip-train`."""
    if run.args.rank == 0:
        print(f"learning from {run.args.distill_source['flag']}", flush=True)
    job.run_checked(replace(run, job=replace(run.job, task=partial(taught, request.teacher))), request.images)


def _default(student: Any) -> Objective:
    """With as many of the likeliest entries as there are, if that is less than usual."""
    return Objective(k=min(Objective.k, student.classes))


JOB = Job(
    "distill", FAMILY, options={**job.JOB.options, "distill": LogitOptions}, defaults=job.JOB.defaults, measures=1,
    check=check, dry_run=show, run=run_checked,
)  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Run the job on `args.words`."""
    run_job(JOB, args.words)
