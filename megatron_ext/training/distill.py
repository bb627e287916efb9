"""The distillation job: a student and its teacher in Megatron's own loop."""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_ext.checkpoint import tokenizer
from megatron_ext.distillation.cache import Cache
from megatron_ext.distillation.teacher import Teacher
from megatron_ext.errors import ConfigError
from megatron_ext.models.pattern import MOE
from megatron_ext.models.training_cost import Lesson
from megatron_ext.training.cache import Writing, check_cache, check_writing, compared
from megatron_ext.training.directory import hold
from megatron_ext.training.distill_options import (
    DistillOptions,
    check_weights,
    grid_of,
    objective_at,
    pairs,
    source_of,
    vocabulary_size,
)
from megatron_ext.training.launch import STOPPABLE, Job, Launch
from megatron_ext.training.teacher_identity import remember
from megatron_ext.training.teacher_ranks import Apart, teach

JOB = Job("distill", options={"distill": DistillOptions}, defaults=STOPPABLE)


def check(launch: Launch) -> Teacher | Cache | Writing:
    """Find what is wrong with the options, and with whom the student learns from, before any process group.

    Raises:
        ConfigError: An option is missing or illegal, the vocabularies differ, or the teacher does not fit the layout.
        CheckpointError: There is no usable checkpoint of the teacher, or the run that goes on had another one.
        DataError: There is no usable cache.
    """
    args, options = launch.args, launch.options["distill"]
    if options.cache_write is not None:
        return check_writing(launch, vocabulary_size())
    source = source_of(options)
    check_weights(options, source, vocabulary_size())
    if options.correct_teacher and not args.save:
        raise ConfigError("--distill-correct-teacher needs a directory for the teacher", legal="--save DIR")
    if args.fp16 and (options.states or options.correct_teacher):
        # Their optimizers do not see the loss scale of the student's.
        raise ConfigError("intermediate states and a corrected teacher do not go with --fp16", legal="--bf16")
    if isinstance(source, Cache):
        check_cache(launch, source, compared(options, source), vocabulary_size())
        remember(launch, source)
        return source
    grid = grid_of(launch, options)
    stages = args.pipeline_model_parallel_size * (args.virtual_pipeline_model_parallel_size or 1)
    source.check(
        launch.architecture,
        tokens=vocabulary_size(),
        student_multiple=args.make_vocab_size_divisible_by * args.tensor_model_parallel_size,
        tp=grid.tp if grid else args.tensor_model_parallel_size,
        stages=grid.pp if grid else stages,
        ep=args.expert_model_parallel_size,
        tokenizer_model=tokenizer.given(args),
    )
    source.check_length(args.seq_length)
    if grid and MOE in source.architecture.pattern:
        raise ConfigError("a teacher with experts must have the student's layout", got=f"{grid.tp} x {grid.pp}")
    pairs(launch, options, source)
    remember(launch, source)
    return source


def lesson(launch: Launch, source: Teacher | Cache | Writing) -> Lesson | None:
    """What a student learns from, for an estimate; None where a cache is written, which trains nothing."""
    options: DistillOptions = launch.options["distill"]
    if not isinstance(source, Teacher):
        return Lesson(None) if isinstance(source, Cache) else None
    together = options.correct_teacher == "together"
    grid = grid_of(launch, options)
    own = source.beside(launch.architecture) if grid is None else source.architecture
    return Lesson(own, None if grid is None else (grid.tp, grid.pp), options.teacher_ranks is not None, together)


def distill(launch: Launch, source: Teacher | Cache, apart: Apart | None = None) -> None:
    """Train the student until `--train-iters`.

    `metrics.jsonl` has `loss` and `val_loss`, the student's cross-entropy as in pre-training, and `kd_loss`; of
    intermediate states `states_loss`, the sum over the pairs, each pair's, and `states_weight`; of a teacher that is
    corrected `teacher_loss`; also `total_loss`, what the student minimises, where that is not one of them.
    """
    from megatron_ext.platform.loop import before_saving, before_schedule
    from megatron_ext.training import passes, run
    from megatron_ext.training.correction import correct, corrected_first
    from megatron_ext.training.data import build_datasets, get_identified_batch
    from megatron_ext.training.distill_setup import Setup
    from megatron_ext.training.step import forward_step

    options: DistillOptions = launch.options["distill"]
    if options.correct_teacher != "only" and run.finished(launch):
        return
    if options.correct_teacher != "only" and (apart is None or not apart.teaches):
        hold(launch)  # also while a teacher is corrected first
    steps = options.correction_iters or launch.args.train_iters
    if launch.args.rank == 0:
        print(f"learning from {launch.args.distill_source['flag']}", flush=True)
    if isinstance(source, Teacher) and options.correct_teacher == "only":
        correct(launch, source, steps)
        return
    if isinstance(source, Teacher) and options.correct_teacher == "first":
        source = corrected_first(launch, source, steps)
    if apart is not None and apart.teaches:
        teach(launch, source, apart)
        return
    setup = Setup(launch, source, options, apart)
    before_saving(setup.save)
    if grid_of(launch, options) is not None:
        before_schedule(setup.before_schedule)
    weights = [(o.kd_weight, o.ce_weight) for o in (objective_at(options, source, share) for share in (0.0, 1.0))]
    mixed = weights not in ([(1.0, 0.0)] * 2, [(0.0, 1.0)] * 2) or bool(options.states)
    step = partial(forward_step, loss=partial(masked_sums, mixed), batch_of=get_identified_batch)
    datasets = passes.repeated(source.manifest.seed) if isinstance(source, Cache) else build_datasets
    try:
        run.train(launch, step, hooks=(setup.hook,), datasets=datasets)
    except SystemExit as end:
        if end.code in (0, None):  # asked to stop, and has saved
            setup.close()
        raise
    setup.close()


def masked_sums(mixed: bool, loss_mask: Float[Tensor, "b s"], losses: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Megatron's loss contract: sum of `total` over unmasked tokens, how many they are, and each component to log.

    Args:
        mixed: Whether to log what the student minimises, too.
        loss_mask: 1 where a token counts.
        losses: `distillation.model.StepLosses`.
    """
    mask = loss_mask.T.float()
    count = mask.sum().to(torch.int)
    sums = {name: (value * mask).sum() for name, value in losses.parts.items()}
    if mixed:
        sums["total loss"] = losses.total.detach() - sums.get("teacher loss", 0.0)
    return losses.total, count, {name: torch.cat([x.detach().view(1), count.view(1)]) for name, x in sums.items()}
