"""Run a validated job through `megatron.training.pretrain`: Megatron's loop, our model, our log."""

import logging
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.checkpoint import checksums, layout
from megatron_ext.errors import ConfigError
from megatron_ext.platform.bucket_padding import leave_out_padding
from megatron_ext.platform.megatron_patches import (
    after_validation,
    around_saves,
    before_saving,
    divert_scalars,
    keep_random_state,
    keep_write_results,
)
from megatron_ext.reports import metrics_file, training_plot
from megatron_ext.reports.megatron_output import MegatronOutput
from megatron_ext.reports.metrics_log import MetricsLog
from megatron_ext.training import signals
from megatron_ext.training.job import RunConfig, task_of
from megatron_ext.training.run_directory import create_run_directory, lock_run_directory

if TYPE_CHECKING:
    from megatron_ext.training.step import Task

logger = logging.getLogger(__name__)

Hook = Callable[[list[Any]], list[Any]]


def train(run: RunConfig, task: "Task | None" = None, hooks: tuple[Hook, ...] = (), config: Any = None) -> None:
    """Train until `--train-iters`, with Megatron's own loop.

    Args:
        run: The validated command line.
        task: What the model is trained on; by default the job's.
        hooks: Called in turn with the list of model chunks after they and the task's extra models are built, and before
            they are wrapped for data parallelism (`ModelConfig.pre_wrap_hooks`).
        config: Megatron's configuration of the model; by default the family's.
    """
    from megatron.core.enums import ModelType
    from megatron.training import pretrain, set_startup_timestamps
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_ext.training.extra_models import ExtraModels

    args = run.args
    if finished(run):
        return
    if _is_over(run):  # but for its validation
        args.save_interval = run.resumed  # the last step is there, and is not saved again
    if args.lr is None and not args.skip_train:
        raise ConfigError("no learning rate given", legal="--lr 3e-4, for instance")
    if not args.save:
        logger.warning("no --save: what is trained will be gone at the end")
    task = task or task_of(run)
    extra = ExtraModels(task.extra_models, args, run.start if run.resumed else None)
    lock_run_directory(run)
    if not args.async_save:
        keep_write_results()
    keep_random_state()
    leave_out_padding()
    before_saving(extra.save)
    if task.whole is not None:
        after_validation(task.whole)
    around_saves(checksums.forget, checksums.write_step)
    log: Any = None

    def begin(chunks: list[Any]) -> list[Any]:
        """Write the first files, now that the ranks have met: each of them has found the directory free."""
        nonlocal log
        create_run_directory(run)
        if args.save and args.rank in (0, args.world_size - 1):
            output.write_to(Path(args.save), args.rank)
        log = divert_scalars(lambda inner: _metrics_log(run, inner))
        if isinstance(log, MetricsLog):
            before_saving(lambda _: log.flush())  # the step's line is there when its checkpoint is
        return chunks

    config = config or run.job.family.config(args, run.model)
    config.pre_wrap_hooks = [begin, *config.pre_wrap_hooks, _equal_expert_metrics, extra.build, *hooks]
    set_startup_timestamps(program_start=time.time(), main_entry=time.time())
    container = pretrain_cfg_container_from_args(args, config)
    with MegatronOutput() as output:
        try:
            step = signals.from_first_step(args, task.forward_step)
            pretrain(container, task.datasets, ModelType.encoder_or_decoder, step)
        finally:
            if log is not None:
                log.close()
    if isinstance(log, MetricsLog) and metrics_file.read_metrics(log.path):
        training_plot.plot_training(log.path, log.path.with_name(training_plot.FILE), task.units["loss"])
        print(f"wrote {args.save}: metrics.jsonl, {training_plot.FILE}, training.log; logs/ has Megatron's", flush=True)


def finished(run: RunConfig) -> bool:
    """Whether the run that goes on has taken its last step in an earlier start; says so.

    Raises:
        ConfigError: It has, and elsewhere than in `--save`, where nothing would be.
    """
    args, done = run.args, run.resumed
    if not _is_over(run):
        return False
    flag, last = ("--train-samples", args.train_samples) if args.train_samples else ("--train-iters", args.train_iters)
    if args.save and Path(args.save).resolve() != Path(args.load).resolve():
        raise ConfigError(
            "nothing is left to train", got=f"{flag} {last}, and step {done} in --load {args.load}",
            legal=f"more {flag}, or --pretrained-checkpoint, which begins again from the weights",
        )  # fmt: skip
    if args.save and _lacks_validation(Path(args.save) / "metrics.jsonl", args):
        return False
    if args.rank == 0:
        print(f"nothing is left to train: {args.load} holds step {done}; more {flag} go on", flush=True)
    return True


def _is_over(run: RunConfig) -> bool:
    """Whether the step that the run goes on from is its last."""
    args = run.args
    return 0 < (args.train_iters or args.train_samples // args.global_batch_size) <= run.resumed


def _lacks_validation(path: Path, args: Any) -> bool:
    """Whether a run was ended between its last save and the validation that comes after it."""
    steps = metrics_file.read_metrics(path) if path.exists() else []
    return bool(args.eval_iters and steps) and "val_loss" not in steps[-1]


def _equal_expert_metrics(chunks: list[Any]) -> list[Any]:
    """Give the losses that balance experts one size on all pipeline stages.

    Megatron would make them shorter on stages without a mixture of experts, and hang when it sums over the stages.
    """
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    for name in ("load_balancing_loss", "seq_load_balancing_loss", "global_load_balancing_loss", "z_loss"):
        get_moe_metrics_tracker().ensure_initialized(name, chunks[0].config.num_layers)
    return chunks


def _metrics_log(run: RunConfig, inner: Any) -> Any:
    """The last rank, which knows the loss, writes `metrics.jsonl` into the run directory."""
    from megatron.core.num_microbatches_calculator import get_current_global_batch_size

    args = run.args
    if not args.save or args.rank != args.world_size - 1:
        return inner

    text = run.job.family.reads_text

    def per_step() -> int:
        return get_current_global_batch_size() * (args.seq_length if text else 1)

    path, unit = Path(args.save) / metrics_file.FILE, "tokens" if text else "samples"
    share = run.job.family.share_of_peak(run.model, args)
    return MetricsLog(
        path, run.resumed, per_step, args.train_iters, inner, unit, _seen(run, text), args.log_interval, share
    )


def _seen(run: RunConfig, text: bool) -> int:
    """Tokens, or samples, of which the step has learned that the run goes on from, which may be another run's."""
    if run.start is None or not run.resumed:
        return 0
    before = vars(layout.common(run.start.step.path).get("args", Namespace()))
    return before.get("consumed_train_samples", 0) * (before.get("seq_length", 0) if text else 1)
