"""Forward passes without training: load a model on any layout, and its mean loss on a data split."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from megatron_ext.reports.megatron_output import suppressed_output
from megatron_ext.reports.metrics_file import key_of
from megatron_ext.training.job import RunConfig, task_of

if TYPE_CHECKING:
    from megatron_ext.training.step import Task


def load_model(run: RunConfig) -> list[Any]:
    """Start Megatron, build this rank's chunks of the model and load its weights; in evaluation mode."""
    start(run)
    return build_model(run)


def start(run: RunConfig) -> None:
    """Start Megatron's process groups, for forward passes only."""
    from megatron.training import initialize_megatron

    run.args.skip_train = True  # no optimizer, no gradient buffers
    run.args.eval_micro_batch_size = run.args.micro_batch_size  # that of a validation between steps of training
    with suppressed_output():
        initialize_megatron()


def load_other(run: RunConfig, model: Any, checkpoint: Path) -> tuple[RunConfig, list[Any]]:
    """Another model on the same layout, once `load_model` has started Megatron; free the one before first.

    Args:
        run: The command line that Megatron was started with.
        model: The other model, of the same family; it must fit the layout (`check_layout`).
        checkpoint: Its weights.

    Returns:
        The command line as if it had named that model, and this rank's chunks in evaluation mode.
    """
    from megatron.training.global_vars import set_args

    args = run.job.family.with_model(run.args, model)
    args.load, args.pretrained_checkpoint, args.ckpt_step = str(checkpoint), None, None
    set_args(args)
    other = replace(run, args=args, model=model)
    return other, build_model(other)


def build_model(run: RunConfig, config: Any = None) -> list[Any]:
    """This rank's chunks of the model, in evaluation mode, with the weights of the checkpoint that is to be loaded.

    Args:
        run: The validated command line.
        config: Megatron's configuration of the model; by default the family's.
    """
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.training import setup_model_and_optimizer

    from megatron_ext.training.extra_models import ExtraModels

    config = config or run.job.family.config(run.args, run.model)
    if run.job.task is not None:
        extra = ExtraModels(run.job.task(run).extra_models, run.args, run.start)
        config.pre_wrap_hooks = [*config.pre_wrap_hooks, extra.build]
    container = pretrain_cfg_container_from_args(run.args, config)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with suppressed_output():
        model, _, _ = setup_model_and_optimizer(
            ModelType.encoder_or_decoder, cfg_container=container, pg_collection=groups
        )
    for chunk in model:
        chunk.eval()
    return model


def forward_pass(
    step: Callable[..., Any],
    model: Sequence[Any],
    iterators: Sequence[Any],
    micro_batches: int,
    shape: tuple[int, int],
    collect: bool = False,
) -> list[Any]:
    """Send micro-batches through all pipeline stages, with the schedule that Megatron trains by.

    Args:
        step: Megatron's `forward_step_func`.
        model: This rank's chunks, one for each virtual stage.
        iterators: Of micro-batches, one for each chunk; None where it reads none.
        micro_batches: How many; with a virtual pipeline, a multiple of its ranks.
        shape: Sequences of a micro-batch, and tokens of a sequence.
        collect: Whether `step` returns, beside the output, a function of it that is no loss.

    Returns:
        What the loss, or the other function, makes of each, on the ranks of the last stage; nothing elsewhere.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    schedule: Any = get_forward_backward_func()
    return schedule(
        forward_step_func=step,
        data_iterator=list(iterators) if len(model) > 1 else iterators[0],
        model=list(model),
        num_microbatches=micro_batches,
        micro_batch_size=shape[0],
        seq_length=shape[1],
        forward_only=True,
        collect_non_loss_data=collect,
    )


@torch.no_grad()
def mean_metrics(
    run: RunConfig,
    model: list[Any],
    split: Literal["train", "valid"],
    samples: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, float], int]:
    """Each metric of the job's task over the first samples of a split; the same on every layout.

    Args:
        run: The validated command line; its batch sizes decide how many samples go through at once.
        model: From `load_model`.
        split: Which part of the data.
        samples: Samples, a multiple of the global batch; all whole batches of the split by default.
        progress: Called with samples done and in all.

    Returns:
        The metrics by name, and the number of samples.
    """
    task = task_of(run)
    loaders = [_loader(run, task, split, samples, stage) for stage in range(len(model))]
    iterators = [iter(loader) if loader is not None else None for loader, _ in loaders]
    steps = (loaders[0][1] if samples is None else samples) // run.args.global_batch_size
    found = forward_all(run, model, iterators, steps, progress, task)
    return found | dict(task.whole() if task.whole else ()), steps * run.args.global_batch_size


def micro_batches(run: RunConfig, model: list[Any], split: Literal["train", "valid"], samples: int) -> list[Any]:
    """The first sequences of a split as this rank's micro-batches, for each chunk of the model that reads data."""
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    count = samples // run.args.global_batch_size * get_num_microbatches()
    loaders = [_loader(run, task_of(run), split, samples, stage)[0] for stage in range(len(model))]
    return [list(islice(loader, count)) if loader is not None else None for loader in loaders]


@torch.no_grad()
def forward_all(
    run: RunConfig,
    model: list[Any],
    iterators: Sequence[Any],
    steps: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    task: "Task | None" = None,
) -> dict[str, float]:
    """Each metric over so many global batches, on all ranks.

    Args:
        run: The validated command line.
        model: From `load_model`.
        iterators: Of micro-batches, one for each chunk of the model; None where it reads none.
        steps: Global batches.
        progress: Called with samples done and in all.
        task: By default the job's.
    """
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    args = run.args
    whole: dict[str, tuple[float, float]] = {}
    for step in range(steps):
        for name, (some, counted) in forward_sums(run, model, iterators, get_num_microbatches(), task).items():
            total, count = whole.get(name, (0.0, 0.0))
            whole[name] = total + some, count + counted
        progress((step + 1) * args.global_batch_size, steps * args.global_batch_size)
    return {name: total / count for name, (total, count) in whole.items() if count}


@torch.no_grad()
def forward_sums(
    run: RunConfig, model: list[Any], iterators: Sequence[Any], micro_batches: int, task: "Task | None" = None
) -> dict[str, tuple[float, float]]:
    """Of so many micro-batches of each rank the sum of each metric, and what it is divided by; on all ranks.

    Tensor-parallel ranks repeat the same sums, and count as often: only the ratio is a mean. Other stages add nothing.

    Args:
        run: The validated command line.
        model: From `load_model`.
        iterators: Of micro-batches, one for each chunk of the model; None where it reads none.
        micro_batches: With a virtual pipeline, a multiple of its ranks.
        task: By default the job's.
    """
    task, shape = task or task_of(run), (run.args.micro_batch_size, run.args.seq_length)
    found: list[dict[str, torch.Tensor]] = forward_pass(task.forward_step, model, iterators, micro_batches, shape)
    names = list(task.units)
    sums = torch.zeros(len(names), 2, dtype=torch.float64)
    for metrics in found:
        for tag, pair in metrics.items():
            if (name := key_of(tag)) in names:
                sums[names.index(name)] += pair.double().cpu()
    everywhere = sums.to(torch.cuda.current_device())
    torch.distributed.all_reduce(everywhere)
    return {name: (float(total), float(count)) for name, (total, count) in zip(names, everywhere, strict=True)}


def _loader(run: RunConfig, task: "Task", split: str, samples: int | None, stage: int) -> tuple[Any, int]:
    """A data loader on the ranks that read data, and the number of samples in the split on every rank."""
    from megatron.training.datasets.data_samplers import build_pretraining_data_loader

    wanted = (samples, 0, 0) if split == "train" else (0, samples, 0)
    with suppressed_output():
        dataset = task.datasets(wanted, vp_stage=stage)[0 if split == "train" else 1]
    count = torch.tensor([len(dataset) if dataset is not None else 0], device=torch.cuda.current_device())
    torch.distributed.all_reduce(count, op=torch.distributed.ReduceOp.MAX)
    return build_pretraining_data_loader(dataset, 0), int(count)
