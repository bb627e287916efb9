"""Where a run goes on: the newest step that verifies, found before any process group forms, never by chance.

Megatron writes its tracker file in place; one that is empty makes it exit with status 0, a missing one makes it start
from random weights. So the step is settled here, and Megatron is told which one to load.
"""

from argparse import Namespace
from pathlib import Path

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.atomic import replacing
from megatron_ext.errors import CheckpointError, UntrustedError
from megatron_ext.models.config import Architecture


def has_checkpoint(directory: Path) -> bool:
    """Whether anything in `directory` claims to be a Megatron checkpoint, complete or not."""
    return (directory / layout.TRACKER).is_file() or bool(layout.steps(directory))


def architecture_on_disk(path: Path) -> Architecture:
    """The model of the newest complete step at `path`.

    Raises:
        CheckpointError: There is none, or it does not say what it holds.
    """
    return layout.architecture(layout.find(path).path)


def sequence_length_on_disk(path: Path) -> int | None:
    """The sequence length that the newest complete step at `path` was trained with, if it says so."""
    return getattr(layout.common(layout.find(path).path).get("args"), "seq_length", None)


def check_experts(step: layout.Step, args: Namespace) -> None:
    """Check that the optimizer state of a step can be loaded by a run with these (Megatron's) arguments.

    Experts that ranks do not share have an optimizer of their own, and Megatron cannot join the two again.

    Raises:
        CheckpointError: The step has one optimizer and the run needs two, or the other way round.
    """
    saved = layout.common(step.path).get("args")
    if isinstance(saved, Namespace) and _experts_apart(saved) != _experts_apart(args):
        raise CheckpointError(
            "the optimizer state cannot move between expert parallel size 1 and larger ones", got=step.path,
            legal="the expert parallel sizes it was trained with, or a new optimizer: --no-load-optim",
        )  # fmt: skip


def check_same_model(step: layout.Step, args: Namespace) -> None:
    """Check that a run with these (Megatron's) arguments goes on with the model that a step holds.

    Weights of another shape would not load; another RoPE base, epsilon or activation would, and be another function.

    Raises:
        CheckpointError: It is another model; names what differs.
    """
    saved, now = layout.architecture(step.path).to_dict(), Architecture.from_args(args).to_dict()
    told = [f"{name}={now[name]} instead of {value}" for name, value in saved.items() if now[name] != value]
    if told:
        raise CheckpointError(
            "a run cannot go on with another model", got=", ".join(told),
            legal="the model of the checkpoint; --pretrained-checkpoint starts a new run from its weights",
        )  # fmt: skip


def _experts_apart(args: Namespace) -> bool:
    etp = getattr(args, "expert_tensor_parallel_size", None) or args.tensor_model_parallel_size
    apart = getattr(args, "expert_model_parallel_size", 1) > 1 or etp != args.tensor_model_parallel_size
    return apart and getattr(args, "num_experts", None) is not None


def resume_point(directory: Path) -> layout.Step:
    """The newest step of `directory` that verifies.

    An empty or damaged tracker file is replaced (atomically, by each process alike), because Megatron cannot be
    told to ignore it, and so is one that says `release` where a step of a training is newer, or the other way round.
    A tracker that names another iteration is left alone: Megatron is told which one to load.

    Raises:
        CheckpointError: No step verifies.
    """
    step = layout.newest(directory)
    tracker, said = directory / layout.TRACKER, layout.tracked(directory)
    if said is None or not (said.isdigit() or said == layout.RELEASE) or (said == layout.RELEASE) != step.is_release:
        try:
            with replacing(tracker) as temporary:
                temporary.write_text(step.name)
        except OSError as error:
            raise CheckpointError(
                f"the tracker file is missing or damaged, and cannot be written: {error}", got=tracker,
                legal=f"a file that says {step.name}",
            ) from error  # fmt: skip
    return step


def own_resume_point(directory: Path) -> layout.Step | None:
    """The step that a run goes on from in its own directory; None if none of its saves was ever finished.

    Megatron writes the tracker file when a save is complete. So steps without one are of a first save that was cut off,
    while a tracker without steps means that something was lost.

    Raises:
        CheckpointError: What was complete once no longer verifies.
    """
    if not has_checkpoint(directory):
        return None
    if not (directory / layout.TRACKER).exists():
        try:
            layout.newest(directory)
        except UntrustedError:
            raise
        except CheckpointError:
            return None
    return resume_point(directory)
