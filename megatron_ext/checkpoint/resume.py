"""Where a run goes on: the newest step that verifies, found before any process group forms, never by chance.

Megatron writes its tracker file in place; one that is empty makes it exit with status 0, a missing one makes it start
from random weights. So the step is settled here, and Megatron is told which one to load.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.atomic import atomic_write
from megatron_ext.errors import CheckpointError, UntrustedError
from megatron_ext.models.architecture import Architecture

# Of the optimizer and its schedule.
SETTINGS = (
    "train_iters", "train_samples", "global_batch_size", "lr", "min_lr", "lr_decay_style", "lr_decay_iters",
    "lr_decay_samples", "lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction", "lr_wsd_decay_style",
    "lr_wsd_decay_iters", "lr_wsd_decay_samples", "weight_decay", "start_weight_decay", "end_weight_decay",
    "weight_decay_incr_style", "adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum", "clip_grad",
)  # fmt: skip


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


def check_optimizer(step: layout.Step, args: Namespace) -> None:
    """Check that a step holds the state of the optimizer that a run with these (Megatron's) arguments has.

    Raises:
        CheckpointError: It holds that of another one, or none.
    """
    saved = layout.common(step.path).get("args")
    if not isinstance(saved, Namespace):
        return
    again = "--no-load-optim begins with a new optimizer, --pretrained-checkpoint with a new run"
    if getattr(saved, "no_save_optim", False):
        raise CheckpointError("the checkpoint has no optimizer state (--no-save-optim)", got=step.path, legal=again)
    if (kind := getattr(saved, "optimizer", args.optimizer)) != args.optimizer:
        raise CheckpointError(
            "the state of one optimizer does not fit another",
            got=f"{kind} in {step.path}, --optimizer {args.optimizer}",
            legal=f"--optimizer {kind}; {again}",
        )  # fmt: skip
    before, now = _precision(saved), _precision(args)
    half = before != "fp32" and now != "fp32" and not args.use_distributed_optimizer
    if before != now and not half:  # the main parameters of both halves are alike, if each rank has all of them
        legal = "neither --bf16 nor --fp16" if before == "fp32" else f"--{before}"
        raise CheckpointError(
            "the optimizer state cannot move to another precision", got=f"{before} in {step.path}, now {now}",
            legal=f"{legal}; {again}",
        )  # fmt: skip


def has_moments(step: layout.Step) -> bool:
    """Whether the optimizer had taken a step: under fp16 the first ones may all have been skipped."""
    keys = [key for key in layout.read_metadata(step.path).state_dict_metadata if "fp32_param" not in key]
    return any("optimizer.state." in key or "optimizer.distributed." in key for key in keys)


def _precision(args: Namespace) -> str:
    return "bf16" if getattr(args, "bf16", False) else "fp16" if getattr(args, "fp16", False) else "fp32"


def changed_settings(step: layout.Step, args: Namespace) -> dict[str, tuple[Any, Any]]:
    """What a run that goes on does otherwise than before: for each setting of the training its old and its new value.

    Args:
        step: Where it goes on from.
        args: Megatron's arguments, validated.
    """
    saved = layout.common(step.path).get("args")
    if not isinstance(saved, Namespace):
        return {}
    changed = {}
    for name in SETTINGS:
        before, now = getattr(saved, name, None), getattr(args, name, None)
        if name.startswith("lr_decay_") and now is None:
            continue  # Megatron puts the length of the training there
        if before != now and hasattr(saved, name):
            changed[name] = (before, now)
    return changed


def check_sharding(step: layout.Step, args: Namespace) -> None:
    """Check that the optimizer's state of a step can be loaded by a run with these (Megatron's) arguments.

    The distributed optimizer's state has a form of its own. It goes on on any layout if it was saved as Megatron's
    `fully_reshardable`; as `dp_reshardable` only on as many tensor- and pipeline-parallel ranks.

    Raises:
        CheckpointError: It cannot; names what was saved, and what can.
    """
    saved = layout.common(step.path).get("args")
    if not isinstance(saved, Namespace) or getattr(saved, "no_save_optim", None):
        return  # `check_optimizer` says so
    was, now = (bool(getattr(own, "use_distributed_optimizer", False)) for own in (saved, args))
    fresh = "or a new optimizer: --no-load-optim"
    if was != now:
        how = "with" if was else "without"
        raise CheckpointError(
            "the optimizer's state cannot move between the distributed optimizer and the plain one",
            got=f"{step.path}, saved {how} --use-distributed-optimizer",
            legal=f"a run {how} --use-distributed-optimizer, {fresh}",
        )  # fmt: skip
    if not was or getattr(saved, "dist_ckpt_optim_fully_reshardable", False):
        return
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    before, after = ([getattr(own, name) for name in names] for own in (saved, args))
    if before != after:
        raise CheckpointError(
            "the distributed optimizer's state was saved in a form that stays on its layout (dp_reshardable)",
            got=f"{step.path}: TP {before[0]}, PP {before[1]}; this run: TP {after[0]}, PP {after[1]}",
            legal=f"the layout it was saved on, whose next save is for any (fully_reshardable); {fresh}",
        )  # fmt: skip


def check_same_model(step: layout.Step, args: Namespace) -> None:
    """Check that a run with these (Megatron's) arguments goes on with the model that a step holds.

    Weights of another shape would not load; another RoPE base, epsilon or activation would, and be another function.

    Raises:
        CheckpointError: It is another model; names what differs.
    """
    saved = layout.described(step.path)
    family = getattr(args, "ext_family", None)
    now = Architecture.from_args(args).to_dict() if family is None else {"family": family, **args.ext_model}
    differences = [
        f"{name}={now.get(name)} instead of {value}" for name, value in saved.items() if now.get(name) != value
    ]
    if differences:
        raise CheckpointError(
            "a run cannot go on with another model", got=", ".join(differences),
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
            with atomic_write(tracker) as temporary:
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
