"""The distillation job: a student and its teacher in Megatron's own loop."""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_ext.checkpoint import tokenizer
from megatron_ext.distillation.logit_cache.cache import Cache
from megatron_ext.distillation.logit_cache.check import Writing, check_cache, check_writing, command_line, compared
from megatron_ext.distillation.options import (
    DistillOptions,
    check_weights,
    objective_at,
    pairs,
    source_of,
    teacher_sizes,
)
from megatron_ext.distillation.teachers.identity import remember
from megatron_ext.distillation.teachers.rank_split import RankSplit, serve_teacher, split_ranks
from megatron_ext.distillation.teachers.teacher import Teacher
from megatron_ext.errors import ConfigError
from megatron_ext.models.pattern import MOE
from megatron_ext.models.training_cost import TeacherSetup
from megatron_ext.options.early_flags import read_early
from megatron_ext.training.dry_run import memory_per_gpu
from megatron_ext.training.job import STOPPABLE, DryRun, Job, RunConfig
from megatron_ext.training.run_directory import lock_run_directory
from megatron_ext.training.run_job import run_job

if TYPE_CHECKING:
    from megatron_ext.training.step import Sums


def check(run: RunConfig) -> Teacher | Cache | Writing:
    """Find what is wrong with the options, and with whom the student learns from, before any process group.

    Raises:
        ConfigError: An option is missing or illegal, the vocabularies differ, or the teacher does not fit the layout.
        CheckpointError: There is no usable checkpoint of the teacher, or the run that goes on had another one.
        DataError: There is no usable cache.
    """
    args, options = run.args, run.options["distill"]
    if options.cache_write is not None:
        return check_writing(run, run.vocab_size)
    source = source_of(options)
    check_weights(options, source, run.vocab_size)
    if options.correct_teacher and not args.save:
        raise ConfigError("--distill-correct-teacher needs a directory for the teacher", legal="--save DIR")
    if args.fp16 and (options.states or options.correct_teacher):
        # Their optimizers do not see the loss scale of the student's.
        raise ConfigError("intermediate states and a corrected teacher do not go with --fp16", legal="--bf16")
    if isinstance(source, Cache):
        check_cache(run, source, compared(options, source), run.vocab_size)
        remember(run, source)
        return source
    grid = teacher_sizes(run, options)
    stages = args.pipeline_model_parallel_size * (args.virtual_pipeline_model_parallel_size or 1)
    source.check(
        run.architecture,
        vocab_size=run.vocab_size,
        student_multiple=args.make_vocab_size_divisible_by * args.tensor_model_parallel_size,
        tp=grid.tp if grid else args.tensor_model_parallel_size,
        stages=grid.pp if grid else stages,
        ep=args.expert_model_parallel_size,
        tokenizer_model=tokenizer.given(args),
    )
    source.check_length(args.seq_length)
    if grid and MOE in source.architecture.pattern:
        raise ConfigError("a teacher with experts must have the student's layout", got=f"{grid.tp} x {grid.pp}")
    pairs(run, options, source)
    remember(run, source)
    return source


def teacher_setup(run: RunConfig, source: Teacher | Cache | Writing) -> TeacherSetup | None:
    """What a student learns from, for an estimate; None where a cache is written, which trains nothing."""
    options: DistillOptions = run.options["distill"]
    if not isinstance(source, Teacher):
        return TeacherSetup(None) if isinstance(source, Cache) else None
    together = options.correct_teacher == "together"
    grid = teacher_sizes(run, options)
    own = source.with_student_vocab(run.architecture) if grid is None else source.architecture
    return TeacherSetup(own, None if grid is None else (grid.tp, grid.pp), options.teacher_ranks is not None, together)


def teacher_row(lesson: TeacherSetup) -> str:
    """A teacher and where it runs, in words."""
    if lesson.teacher is None:
        return "a cache"
    words = [f"{lesson.teacher.num_parameters():,} parameters, pattern {lesson.teacher.pattern}"]
    if lesson.layout is not None:
        words.append(f"tensor {lesson.layout[0]} x pipeline {lesson.layout[1]}")
    words += ["on ranks of its own"] * lesson.apart + ["corrected while it teaches"] * lesson.trained
    return ", ".join(words)


def distill(run: RunConfig, source: Teacher | Cache, apart: RankSplit | None = None) -> None:
    """Train the student until `--train-iters`.

    `metrics.jsonl` has `loss` and `val_loss`, the student's cross-entropy as in pre-training, and `kd_loss`; of
    intermediate states `states_loss`, the sum over the pairs, each pair's, and `states_weight`; of a teacher that is
    corrected `teacher_loss`; also `total_loss`, what the student minimises, where that is not one of them.
    """
    from megatron_ext.data import packing
    from megatron_ext.distillation.setup import Setup
    from megatron_ext.distillation.teachers.correction import correct, corrected_first
    from megatron_ext.platform.megatron_patches import before_schedule, pipeline_widths
    from megatron_ext.training import loop
    from megatron_ext.training.step import language_modelling

    options: DistillOptions = run.options["distill"]
    if options.correct_teacher != "only" and loop.finished(run):
        return
    if options.correct_teacher != "only" and (apart is None or not apart.is_teacher):
        lock_run_directory(run)  # also while a teacher is corrected first
    steps = options.correction_iters or run.args.train_iters
    if run.args.rank == 0:
        print(f"learning from {run.args.distill_source['flag']}", flush=True)
    if isinstance(source, Teacher) and options.correct_teacher == "only":
        correct(run, source, steps)
        return
    if isinstance(source, Teacher) and options.correct_teacher == "first":
        source = corrected_first(run, source, steps)
    if apart is not None and apart.is_teacher:
        serve_teacher(run, source, apart)
        return
    setup = Setup(run, source, options, apart)
    pipeline_widths(setup.widths)
    if teacher_sizes(run, options) is not None:
        before_schedule(setup.before_schedule)
    weights = [(o.kd_weight, o.ce_weight) for o in (objective_at(options, source, share) for share in (0.0, 1.0))]
    mixed = weights not in ([(1.0, 0.0)] * 2, [(0.0, 1.0)] * 2) or bool(options.states)
    task = language_modelling(run.args, partial(masked_sums, mixed), identified=True)
    if isinstance(source, Cache):
        task = replace(task, datasets=packing.replayed(run.args, source.manifest.seed))
    try:
        loop.train(run, replace(task, extra_models=setup.extra_models()), hooks=(setup.hook,))
    except SystemExit as end:
        if end.code in (0, None):  # asked to stop, and has saved
            setup.close()
        raise
    except RuntimeError:  # gradients that are not finite, which Megatron may find first
        setup.check()
        raise
    setup.close()


def masked_sums(mixed: bool, batch: Mapping[str, Tensor], losses: Any) -> "Sums":
    """The sum of `total` over unmasked tokens, how many they are, and each component to log.

    Args:
        mixed: Whether to log what the student minimises, too.
        batch: With `loss_mask`, 1 where a token counts.
        losses: `distillation.model.StepLosses`.
    """
    mask = batch["loss_mask"].T.float()
    count = mask.sum().to(torch.int)
    sums = {name: (value * mask).sum() for name, value in losses.parts.items()}
    if mixed:
        sums["total loss"] = losses.total.detach() - sums.get("teacher loss", 0.0)
    return losses.total, count, {name: (value, count) for name, value in sums.items()}


def run(run: RunConfig, source: Teacher | Cache | Writing, split: RankSplit | None = None) -> None:
    """Write a cache, or train the student."""
    if isinstance(source, Writing):
        from megatron_ext.distillation.logit_cache.write import write

        write(run, source)
    else:
        distill(run, source, split)


def _dry_run(run: RunConfig, source: Teacher | Cache | Writing) -> DryRun:
    found = teacher_setup(run, source)
    rows = {} if found is None else {"teacher": teacher_row(found)}
    return DryRun(rows, memory=memory_per_gpu(run, found))


JOB = Job(
    "distill", options={"distill": DistillOptions}, defaults=STOPPABLE, check=check, dry_run=_dry_run, run=run
)  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Run the job on `args.words`; ranks that are the teacher's alone part from the student's first."""
    early = read_early(args.words, JOB.options)
    split = split_ranks(early)
    run_job(replace(JOB, run=partial(run, split=split)), command_line(args.words, early))
