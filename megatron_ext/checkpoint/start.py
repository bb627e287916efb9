"""What a run begins with, found before anything is started: the step it goes on from, or weights to start from."""

import logging
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.resume import (
    changed_settings,
    check_experts,
    check_optimizer,
    check_same_model,
    check_sharding,
    has_moments,
    own_resume_point,
    resume_point,
)
from megatron_ext.errors import CheckpointError, ConfigError
from megatron_ext.platform.resuming import prepare_resume

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """A step that is loaded.

    Attributes:
        flag: The flag that names it, `--load` or `--pretrained-checkpoint`.
        directory: The checkpoint directory.
        step: The step in it.
    """

    flag: str
    directory: Path
    step: layout.Step

    @property
    def continues(self) -> bool:
        """Whether the step is of a training, and named by `--load`: iteration, data and optimizer go on from it."""
        return self.flag == "--load" and not self.step.is_release


def find_start(early: Namespace) -> Start | None:
    """What a command line loads; None if it starts from random weights.

    `--load` counts before `--pretrained-checkpoint`, as in Megatron, but may be empty only where it is the run's own
    `--save`: that is how a job starts and goes on with one command.

    Args:
        early: `load`, `save`, `pretrained_checkpoint` (paths or None) and `ckpt_step`.

    Raises:
        CheckpointError: A directory that was asked for has no complete checkpoint; names its flag.
        ConfigError: `--ckpt-step` would go back in a directory where later steps are.
    """
    if early.load is not None:
        own = early.save is not None and early.save.resolve() == early.load.resolve()
        if not own or own_resume_point(early.load) is not None:
            return _start("--load", early.load, early.ckpt_step, own)
    if early.pretrained_checkpoint is not None:
        return _start("--pretrained-checkpoint", early.pretrained_checkpoint, early.ckpt_step, False)
    return None


def _start(flag: str, directory: Path, iteration: int | None, own: bool) -> Start:
    try:
        step = resume_point(directory)
        if iteration is None or iteration == step.iteration:
            return Start(flag, directory, step)
        chosen = layout.Step(directory / f"iter_{iteration:07d}", iteration)
        if not chosen.path.is_dir():
            there = ", ".join(str(each.iteration) for each in layout.steps(directory) if not each.is_release)
            raise CheckpointError(f"--ckpt-step {iteration}: no such step", got=directory, legal=there or "none there")
        layout.verify(chosen.path)
    except CheckpointError as error:
        raise CheckpointError(f"{flag}: {error}") from error
    if own and iteration < step.iteration:
        raise ConfigError(
            "--ckpt-step goes back in the run's own directory, where later steps would stay among the new ones",
            got=f"--ckpt-step {iteration}, and step {step.iteration} in {directory}",
            legal="--save NEW_DIRECTORY, into which the run branches off",
        )  # fmt: skip
    return Start(flag, directory, chosen)


def tell_megatron(start: Start | None, args: Namespace) -> None:
    """Say which step to load, and how, so that Megatron neither exits silently nor starts from random weights.

    What the command line says of optimizer and schedule counts, unless `--use-checkpoint-opt_param-scheduler` is there.

    Raises:
        CheckpointError: The optimizer's state cannot be loaded by this run.
        ConfigError: `--finetune` would begin again among the steps that the run's own directory has.
    """
    if start is None:
        return
    own = args.save is not None and Path(args.save).resolve() == start.directory.resolve()
    if args.finetune and own and not args.skip_train:
        raise ConfigError(
            "--finetune begins at step 1 in the run's own directory, over its steps, and each start would again",
            got=f"--finetune, and step {start.step.iteration} in {start.directory}",
            legal="--save NEW_DIRECTORY; or no --finetune, which goes on; --no-load-optim with a new optimizer",
        )  # fmt: skip
    args.ckpt_step = None if start.step.is_release else start.step.iteration
    args.exit_on_missing_checkpoint = True
    stepped = True
    if _loads_optimizer(start, args):
        check_experts(start.step, args)
        check_optimizer(start.step, args)
        check_sharding(start.step, args)
        stepped = has_moments(start.step)
        args.override_opt_param_scheduler = not args.use_checkpoint_opt_param_scheduler
    prepare_resume(args.use_checkpoint_opt_param_scheduler, stepped)


def check_continues(start: Start | None, args: Namespace) -> None:
    """Check that a run that goes on does so with the model of its checkpoint; say which of its settings are others.

    Args:
        start: What is loaded.
        args: Megatron's arguments, validated, when the vocabulary is known.

    Raises:
        CheckpointError: It is another model.
    """
    if start is None or not _loads_optimizer(start, args):
        return
    check_same_model(start.step, args)
    if args.skip_train:
        return
    changes = [f"{name} {now} (was {before})" for name, (before, now) in changed_settings(start.step, args).items()]
    if changes and args.rank == 0:
        rest = "as the flags say; --use-checkpoint-opt_param-scheduler keeps its course"
        if args.use_checkpoint_opt_param_scheduler:
            rest = "on the course of the checkpoint"
        logger.warning(
            "from step %d with %s; the learning rate goes on %s", start.step.iteration, ", ".join(changes), rest
        )


def _loads_optimizer(start: Start, args: Namespace) -> bool:
    return start.continues and not (args.finetune or args.no_load_optim)
