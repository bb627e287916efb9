"""What distillation adds to Megatron's loop: the teacher, and what is trained and saved beside the student."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training.training import get_optimizer_param_scheduler

from megatron_ext.checkpoint.atomic import atomic_write
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
from megatron_ext.distillation.projections import AGAIN, LossBalancer, Projections
from megatron_ext.distillation.teachers import colocated
from megatron_ext.distillation.teachers.cached import CachedTeacher, as_top_k_objective
from megatron_ext.distillation.teachers.colocated import ColocatedTeacher, TrainedColocatedTeacher
from megatron_ext.distillation.teachers.correction import CorrectedTeacher
from megatron_ext.distillation.teachers.exchange import ParallelSizes
from megatron_ext.distillation.teachers.identity import check_alike
from megatron_ext.distillation.teachers.rank_split import RankSplit
from megatron_ext.distillation.teachers.remote import RemoteForward, RemoteTeacher
from megatron_ext.distillation.teachers.teacher import Teacher
from megatron_ext.errors import CheckpointError
from megatron_ext.lm_head.objective import Objective
from megatron_ext.models.hooks import pattern_of
from megatron_ext.training.job import RunConfig

FOLDER, STATE = "distillation", "state.json"


class Setup:
    """Pairs each of Megatron's chunks with its teacher, and goes on with what is trained beside them.

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
        self._balance, self._samples = LossBalancer(), 0
        self._projections: Projections | None = None
        self._correction: CorrectedTeacher | None = None
        self._elsewhere: RemoteForward | None = None
        self._groups: Any = None
        self._route: PipelineRouting | None = None
        self._stages: list[int] = []
        self._models: list[DistillationModel] = []

    def hook(self, students: list[HybridModel]) -> list[DistillationModel]:
        """A `pre_wrap_hook`: the student's chunks, each with its teacher.

        Raises:
            CheckpointError: The run that goes on has lost what was trained beside the student, or the teacher's
                directory has gained a step while the ranks started.
        """
        run, options = self._run, self._options
        check_alike(self._source)
        self._groups = students[0].pg_collection
        step = run.resumed or None
        if isinstance(self._source, Cache):
            route, sides = self._from_cache(students, self._source)
        elif (grid := teacher_sizes(run, options)) is not None:
            route, sides = self._from_elsewhere(students, self._source, grid)
        else:
            route, sides = self._from_beside(students, self._source, step)
        args, self._route = run.args, route
        self._stages = [stage_number(student) for student in students]
        self._projections = Projections(route, self._stages, args.seed, args.clip_grad, get_optimizer_param_scheduler)
        if route.pairs and step is not None:
            self._resume(step)
        students[0].config.finalize_model_grads_func = self._finalize
        matching = IntermediateLossConfig(
            route,
            options.states_loss,
            lambda: states_weight_at(options, self._done()),
            self._projections,
            self._balance,
        )
        self._models = [
            DistillationModel(student, side, matching, self._objective, self._run.vocab_size)
            for student, side in zip(students, sides, strict=True)
        ]
        return self._models

    def _from_cache(self, students: list[HybridModel], cache: Cache) -> tuple[PipelineRouting, Sequence[TeacherStage]]:
        width = students[0].config.hidden_size
        route = PipelineRouting((), (width, width), stage_sizes(students[0]), None)
        return route, [CachedTeacher(cache, student) for student in students]

    def _from_elsewhere(
        self, students: list[HybridModel], teacher: Teacher, grid: ParallelSizes
    ) -> tuple[PipelineRouting, Sequence[TeacherStage]]:
        run, wanted = self._run, pairs(self._run, self._options, teacher)
        widths = (students[0].config.hidden_size, teacher.architecture.hidden_size)
        points = sorted({pair.teacher for pair in wanted})
        bridge = self._apart.bridge(run.args) if self._apart else None
        self._elsewhere = RemoteForward(teacher, grid, run.args, points, run.architecture, self._groups, bridge)
        sides = [RemoteTeacher(self._elsewhere, student) for student in students]
        return PipelineRouting(wanted, widths, stage_sizes(students[0]), None), sides

    def _from_beside(
        self, students: list[HybridModel], teacher: Teacher, step: int | None
    ) -> tuple[PipelineRouting, Sequence[TeacherStage]]:
        run, trained = self._run, self._options.correct_teacher == "together"
        if trained:
            self._correction = CorrectedTeacher(run, teacher, step)
            chunks = self._correction.chunks
        else:
            chunks = colocated.build(students, teacher, run.args, run.architecture)
        wanted = pairs(run, self._options, teacher)
        widths = (students[0].config.hidden_size, chunks[0].config.hidden_size)
        route = PipelineRouting(wanted, widths, stage_sizes(students[0]), stage_sizes(chunks[0]), trained)
        sides: list[TeacherStage] = []
        for student, chunk in zip(students, chunks, strict=True):
            points = route.points(stage_number(student), TEACHER)
            side = (
                TrainedColocatedTeacher(chunk, points, self._run.vocab_size)
                if trained
                else ColocatedTeacher(chunk, points)
            )
            sides.append(side)
        return route, sides

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

    def save(self, iteration: int) -> None:
        """Write what belongs to a checkpoint of the student and is not in it, on every rank, before it is written."""
        if self._correction is not None:
            self._correction.save(iteration)
        if self._projections is None or not self._options.states:
            return
        folder = _folder(self._run.args.save, iteration)
        if self._groups.dp_cp.rank() == 0 and self._groups.tp.rank() == 0:
            self._projections.save(folder)
            if self._groups.pp.rank() == self._groups.pp.size() - 1:
                with atomic_write(folder / STATE) as temporary:
                    temporary.write_text(json.dumps({"alpha": self._balance.alpha, "samples": self._samples}) + "\n")
        dist.barrier()

    def _resume(self, step: int) -> None:
        folder = _folder(self._run.args.load, step)
        try:
            state = json.loads((folder / STATE).read_text())
            self._balance.alpha, self._samples = float(state["alpha"]), int(state["samples"])
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                "what was trained beside the student is not there", got=folder / STATE, legal=AGAIN
            ) from error
        assert self._projections is not None
        self._projections.load(folder, self._samples)

    def _finalize(self, model: list[Any], num_tokens: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> None:
        """Megatron's `finalize_model_grads_func`: the end of a step's backward passes."""
        self.check()
        own = None if num_tokens is None else num_tokens.clone()  # Megatron sums it in place
        finalize_model_grads(model, num_tokens, *args, **kwargs)
        flags = self._run.args
        samples = get_num_microbatches() * flags.micro_batch_size * flags.data_parallel_size
        divisor = self._groups.dp_cp.size() if num_tokens is None else num_tokens.clamp(min=1)
        assert self._projections is not None
        self._projections.step(self._groups, flags.sequence_parallel, divisor, samples)
        self._balance.step(self._groups)
        self._samples += samples
        if self._correction is not None:
            self._correction.step(own, samples)

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


def _folder(run: str, iteration: int) -> Path:
    return Path(run) / FOLDER / f"iter_{iteration:07d}"
