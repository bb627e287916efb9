"""Where a run goes on: the newest step that verifies, found before any process group forms, never by chance.

Megatron writes its tracker file in place; one that is empty makes it exit with status 0, a missing one makes it start
from random weights. So the step is settled here, and Megatron is told which one to load.
"""

import warnings
from argparse import Namespace
from pathlib import Path

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.atomic import replacing
from megatron_ext.errors import CheckpointError
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
    """The newest step of `directory` that verifies; warns when that is not what the tracker file says.

    An empty or damaged tracker file is replaced (atomically, by each process alike), because Megatron cannot be
    told to ignore it. A tracker that names another step is left alone.

    Raises:
        CheckpointError: No step verifies.
    """
    step = layout.newest(directory)
    tracker = directory / layout.TRACKER
    said = tracker.read_text().strip() if tracker.is_file() else None
    named = layout.RELEASE if step.is_release else str(step.iteration)
    if said == named:
        return step
    state = "is missing" if said is None else f"says {said!r}"
    warnings.warn(f"{tracker} {state}; going on from {step.path.name}, the newest step that verifies", stacklevel=2)
    if said is None or not (said.isdigit() or said == layout.RELEASE):
        try:
            with replacing(tracker) as temporary:
                temporary.write_text(named)
        except OSError as error:
            raise CheckpointError(
                f"the tracker file {state} and cannot be written: {error}", got=tracker,
                legal=f"a file that says {named}",
            ) from error  # fmt: skip
    return step
