"""What distillation adds to Megatron's loop: whom the student learns from, and what is trained beside it."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.utils import unwrap_model

from megatron_ext.distillation.intermediate_layers import TEACHER, PipelineRouting
from megatron_ext.distillation.logit_cache.cache import Cache
from megatron_ext.distillation.model import DistillationModel, IntermediateLossConfig, TeacherStage
from megatron_ext.distillation.options import (
    DistillOptions,
    objective_at,
    pairs,
    states_weight_at,
    teacher_sizes,
)
from megatron_ext.distillation.projections import Projections
from megatron_ext.distillation.teachers import colocated, correction
from megatron_ext.distillation.teachers.cached import CachedTeacher, as_top_k_objective
from megatron_ext.distillation.teachers.colocated import ColocatedTeacher, TrainedColocatedTeacher
from megatron_ext.distillation.teachers.identity import check_alike
from megatron_ext.distillation.teachers.rank_split import RankSplit
from megatron_ext.distillation.teachers.remote import RemoteForward, RemoteTeacher
from megatron_ext.distillation.teachers.teacher import Teacher
from megatron_ext.lm_head.objective import Objective
from megatron_ext.models.hooks import pattern_of
from megatron_ext.training.extra_models import ExtraModel, beside
from megatron_ext.training.extra_optimizers import ReplicatedOptimizer
from megatron_ext.training.job import RunConfig

PROJECTIONS = "distillation"  # the folder of what is trained to match intermediate states


class Setup:
    """Pairs each of Megatron's chunks with its teacher.

    Args:
        run: The validated command line.
        source: Whom the student learns from.
        options: The distillation's flags.
        apart: This rank among all, if the teacher has ranks of its own.
    """

    def __init__(
        self, run: RunConfig, source: Teacher | Cache, options: DistillOptions, apart: RankSplit | None = None
    ) -> None:
        self._run, self._source, self._options, self._apart = run, source, options, apart
        self._pairs = () if isinstance(source, Cache) else pairs(run, options, source)
        self._grid = None if isinstance(source, Cache) else teacher_sizes(run, options)
        self._corrects = options.correct_teacher == "together"
        self._elsewhere: RemoteForward | None = None
        self._finalize_grads: Any = None
        self._route: PipelineRouting | None = None
        self._stages: list[int] = []
        self._models: list[DistillationModel] = []

    def extra_models(self) -> list[ExtraModel]:
        """A teacher on the student's layout, corrected or not, and the projections to its states."""
        found = []
        if isinstance(self._source, Teacher) and self._grid is None:
            if self._corrects:
                found.append(correction.extra_model(self._run, self._source))
            else:
                found.append(colocated.extra_model(self._source, self._run.architecture))
        if self._pairs:
            found.append(ExtraModel(PROJECTIONS, self._projections, optimizer=ReplicatedOptimizer))
        return found

    def hook(self, students: list[HybridModel]) -> list[DistillationModel]:
        """A `pre_wrap_hook`: the student's chunks, each with its teacher.

        Raises:
            CheckpointError: The teacher's directory has gained a step while the ranks started.
        """
        options, config = self._options, students[0].config
        check_alike(self._source)
        self._stages = [stage_number(student) for student in students]
        self._route = self._routing(students)
        self._finalize_grads = config.finalize_model_grads_func or finalize_model_grads
        config.finalize_model_grads_func = self._finalize
        maps = [beside(student)[PROJECTIONS] for student in students] if self._pairs else self._projections(students)
        for student, side, own in zip(students, self._sides(students), maps, strict=True):
            matching = IntermediateLossConfig(
                self._route, options.states_loss, lambda: states_weight_at(options, self._done()), own
            )
            self._models.append(DistillationModel(student, side, matching, self._objective, self._run.vocab_size))
        return self._models

    def _routing(self, students: list[HybridModel]) -> PipelineRouting:
        """What is handed from stage to stage."""
        width, sizes = students[0].config.hidden_size, stage_sizes(students[0])
        if isinstance(self._source, Cache):
            return PipelineRouting((), (width, width), sizes, None)
        widths = (width, self._source.architecture.hidden_size)
        if self._grid is not None:
            return PipelineRouting(self._pairs, widths, sizes, None)
        (teacher,) = unwrap_model([beside(students[0])[TEACHER]])
        return PipelineRouting(self._pairs, widths, sizes, stage_sizes(teacher), self._corrects)

    def _projections(self, students: list[HybridModel], *_: Any) -> list[Projections]:
        route, seed = self._routing(students), self._run.args.seed
        return [Projections(route, stage_number(student), seed) for student in students]

    def _sides(self, students: list[HybridModel]) -> Sequence[TeacherStage]:
        """The teacher on each stage, or what stands for it."""
        if isinstance(self._source, Cache):
            return [CachedTeacher(self._source, student) for student in students]
        assert self._route is not None
        if self._grid is not None:
            points = sorted({pair.teacher for pair in self._pairs})
            args, groups = self._run.args, students[0].pg_collection
            bridge = self._apart.bridge(args) if self._apart else None
            self._elsewhere = RemoteForward(
                self._source, self._grid, args, points, self._run.architecture, groups, bridge
            )
            return [RemoteTeacher(self._elsewhere, student) for student in students]
        sides: list[TeacherStage] = []
        for student, chunk in zip(students, unwrap_model([beside(s)[TEACHER] for s in students]), strict=True):
            points = self._route.points(stage_number(student), TEACHER)
            if self._corrects:
                sides.append(TrainedColocatedTeacher(chunk, points, self._run.vocab_size))
            else:
                sides.append(ColocatedTeacher(chunk, points))
        return sides

    def widths(self) -> tuple[int, int] | None:
        """Channels that arrive at this rank's pipeline stage and that leave it; None if there is nothing to be told."""
        if self._route is None or self._route.stages == 1 or len(self._stages) > 1:
            return None
        (stage,), dtype = self._stages, self._run.args.params_dtype
        return self._route.width(stage - 1, dtype) if stage else 0, self._route.width(stage, dtype)

    def before_schedule(self, data: Any, micro_batches: int, micro_batch_size: int) -> Any:
        """Let a teacher on another layout run ahead (see `platform.megatron_patches.before_schedule`)."""
        assert self._elsewhere is not None
        return self._elsewhere.before_schedule(data, micro_batches, micro_batch_size)

    def check(self) -> None:
        """Check that the teacher's logits were finite, before anything is made of the step.

        Raises:
            CheckpointError: They were not.
        """
        for model in self._models:
            model.check()

    def close(self) -> None:
        """Let a teacher on ranks of its own end."""
        if self._elsewhere is not None:
            self._elsewhere.close()

    def _finalize(self, model: list[Any], num_tokens: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> None:
        """Megatron's `finalize_model_grads_func`: the end of a step's backward passes."""
        self.check()
        self._finalize_grads(model, num_tokens, *args, **kwargs)
        for own in self._models:
            own.end_step()

    def _done(self) -> float:
        """The share of the training that is done."""
        args = self._run.args
        done = getattr(args, "curr_iteration", None) or args.iteration
        return done / max(1, (args.train_iters or 1) - 1)

    def _objective(self) -> Objective:
        objective = objective_at(self._options, self._source, self._done())
        return as_top_k_objective(objective, self._source) if isinstance(self._source, Cache) else objective


def stage_number(chunk: HybridModel) -> int:
    """The number of a chunk's pipeline stage, virtual ones counted."""
    return chunk.pg_collection.pp.rank() + chunk.pg_collection.pp.size() * (chunk.vp_stage or 0)


def stage_sizes(model: HybridModel) -> tuple[int, ...]:
    """Sub-layers on each stage of a model's pipeline."""
    return tuple(len(stage) for stage in pattern_of(model).stages)
