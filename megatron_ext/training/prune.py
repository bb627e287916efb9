"""The pruning job: score, plan, apply, and say what was cut."""

import os
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.reader import Reader
from megatron_ext.errors import ConfigError
from megatron_ext.evaluation.report import plot_losses
from megatron_ext.models.config import Architecture
from megatron_ext.pruning import tasks
from megatron_ext.pruning.apply import apply
from megatron_ext.pruning.budget import Targets, resolve
from megatron_ext.pruning.depth import check_borders
from megatron_ext.pruning.magnitude import magnitudes
from megatron_ext.pruning.plan import Plan
from megatron_ext.pruning.scores import Scores
from megatron_ext.pruning.select import make_plan
from megatron_ext.pruning.weights import check_weights
from megatron_ext.training import prune_report
from megatron_ext.training.directory import CONFIG, describe, write_atomically
from megatron_ext.training.launch import Job, Launch
from megatron_ext.training.prune_options import PruneOptions
from megatron_ext.training.prune_report import Loss

SCORES = "scores.safetensors"
REPORT = "report.md"


JOB = Job(
    "prune",
    options={"prune": PruneOptions},
    defaults=(
        "--eval-iters", "0", "--train-iters", "1", "--lr", "0", "--skip-train",
        "--no-load-optim", "--no-load-rng", "--finetune",
    ),
    offline=("--prune-scores", "--prune-plan"),
)  # fmt: skip


def check(launch: Launch) -> Architecture:
    """Find what is wrong with the options before any work is done.

    Returns:
        What the model will become; which of its layers stay is not known before it is scored.

    Raises:
        ConfigError, PlanError, CheckpointError: Says what.
    """
    args, options = launch.args, launch.options["prune"]
    for name in ("load", "save"):
        if getattr(args, name) is None:
            raise ConfigError(f"--{name} is missing", legal="--load MODEL --save NEW_DIRECTORY")
    if options.plan is not None:
        plan = Plan.load(options.plan)
        plan.check(launch.architecture)
        made = plan.provenance
        check_weights("a plan", made.fingerprint, made.iteration, source_step(args).path)
        return plan.target
    targets = options.targets()
    if options.scores is not None:
        plan = make_plan(_scores(launch), launch.architecture, targets, merge_heads=options.merge_heads)
        return plan.target
    targets.check(launch.architecture)
    target = resolve(launch.architecture, targets, _some_layers(launch.architecture, targets))
    check_borders(launch.pattern)
    _check_rounds(launch, options)
    if (options.depth_metric == "scan_task") != (options.task is not None):
        raise ConfigError("--prune-depth-metric scan_task goes with --prune-task", got=options.task)
    if options.task is not None:
        tasks.load_task(options.task)
    if options.samples < 1 or options.samples % args.global_batch_size:
        raise ConfigError(
            "--prune-samples must be a multiple of --global-batch-size", got=options.samples,
            legal=f"multiples of {args.global_batch_size}",
        )  # fmt: skip
    return target


def source_step(args: Namespace) -> layout.Step:
    """The step that is cut: the one that Megatron loads, which `--ckpt-step` may say."""
    return layout.find(Path(args.load) / (f"iter_{args.ckpt_step:07d}" if args.ckpt_step else ""))


def _check_rounds(launch: Launch, options: PruneOptions) -> None:
    if options.iterations < 1:
        raise ConfigError("--prune-iterations must be positive", got=options.iterations)
    if options.iterations > 1 and options.merge_heads:
        raise ConfigError("query heads are merged once: --prune-merge-heads goes with --prune-iterations 1")
    for targets in options.rounds(launch.architecture)[:-1]:
        small = resolve(launch.architecture, targets, _some_layers(launch.architecture, targets))
        try:
            _check_layout(launch, small)
        except ConfigError as error:
            raise ConfigError(f"a model between two rounds does not fit this layout: {error}") from error


def _some_layers(arch: Architecture, targets: Targets) -> str:
    """A pattern with as many layers as are asked for; which ones stay is not known before they are scored."""
    if targets.num_layers is not None:
        return "".join(arch.pattern[i] for block in arch.layers.blocks[: targets.num_layers] for i in block)
    left = targets.kinds(arch)
    pattern = ""
    for unit in arch.pattern[: targets.num_sublayers]:
        left[unit] = left.get(unit, len(arch.pattern)) - 1
        pattern += unit if left[unit] >= 0 else ""
    return pattern


def changes(launch: Launch, target: Architecture) -> Table:
    """The table before and after, for `--dry-run`; which layers stay is known only once they are scored."""
    workload = launch.options["prune"].served
    table = Table("", "before", "after", "kept", title="what pruning changes")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in prune_report.compare(launch.architecture, target, workload):
        table.add_row(*row.cells())
    return table


def prune(launch: Launch) -> None:
    """Score (unless scores or a plan are given), plan and apply; rank 0 writes the run directory, all at once."""
    args, options = launch.args, launch.options["prune"]
    source = source_step(args)
    if options.plan is not None:
        measured = Measured(Plan.load(options.plan))
    elif options.scores is not None:
        scores = _scores(launch)
        plan = make_plan(
            scores, launch.architecture, options.targets(), scores_path=options.scores, merge_heads=options.merge_heads
        )
        measured = Measured(plan, [scores])
    else:
        measured = measure(launch)
    plan, losses = measured.plan, measured.losses
    attachments: dict[str, Any] = {
        CONFIG: lambda path: path.write_text(describe(launch)),
        REPORT: lambda path: path.write_text(prune_report.markdown(plan, options.served, losses)),
    }
    for number, scores in enumerate(measured.scores):
        name = SCORES if number == 0 else f"{Path(SCORES).stem}.round-{number + 1}.safetensors"
        attachments[name] = scores.save
    if measured.scores:
        attachments["importance.png"] = lambda path: prune_report.plot_scores(measured.scores[0], plan, path)
    _join_processes()
    apply(plan, source.path, args.save, attachments)
    if losses:
        remark = _measure_pruned(launch, measured)
        if args.rank == 0:
            write_atomically(Path(args.save) / REPORT, prune_report.markdown(plan, options.served, losses, remark))
            plot_losses([(loss.name, loss.parameters, loss.nats) for loss in losses], Path(args.save) / "loss.png")
    if args.rank == 0:
        print((Path(args.save) / REPORT).read_text())
        print(f"written to {args.save}", flush=True)
    _wait()


@dataclass
class Measured:
    """What calibration found out.

    Attributes:
        plan: From the original to the pruned model.
        scores: Of each round, on rank 0.
        losses: Of the original, and of what each round left.
    """

    plan: Plan
    scores: list[Scores] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)


def measure(launch: Launch) -> Measured:
    """Score and plan in `--prune-iterations` rounds, each on what the one before left; the plans become one.

    Between rounds the model that is left is written beside `--save`, and removed again.
    """
    from megatron_ext.training.calibrate import calibrate
    from megatron_ext.training.evaluate import load_model, load_other

    args, options = launch.args, launch.options["prune"]
    rounds = options.rounds(launch.architecture)
    step = source_step(args)
    current, model = launch, load_model(launch)
    whole: Plan | None = None
    found: list[Scores] = []
    losses: list[Loss] = []
    for number, targets in enumerate(rounds):
        if whole is not None:
            del model  # before the next one takes its place
            current, model = _between(launch, whole, step.path, number, load_other)
        name = "original" if whole is None else f"after round {number}"
        values, loss = calibrate(current, model, options.calibration(current.architecture, targets, args.seed))
        losses.append(Loss(name, current.architecture.num_parameters(), loss))
        plan = None
        if values is not None:
            scores = _as_scores(current, values, step)
            found.append(scores)
            plan = make_plan(scores, current.architecture, targets, scores_path=SCORES, merge_heads=options.merge_heads)
        plan = _from_rank_0(plan)
        whole = plan if whole is None else whole.then(plan)
        if args.rank == 0 and number:
            shutil.rmtree(_round_directory(args, number))
    assert whole is not None
    return Measured(whole, found, losses)


def _between(
    launch: Launch, plan: Plan, step: Path, number: int, load_other: Callable[..., tuple[Launch, list[Any]]]
) -> tuple[Launch, list[Any]]:
    """The model that so many rounds left."""
    import torch

    checkpoint = _round_directory(launch.args, number)
    if launch.args.rank == 0:
        shutil.rmtree(checkpoint, ignore_errors=True)  # an earlier attempt's
    torch.distributed.barrier()
    apply(plan, step, checkpoint)
    return load_other(launch, plan.target, checkpoint)


def _round_directory(args: Namespace, number: int) -> Path:
    return Path(args.save).parent / f".{Path(args.save).name}.round-{number}"


def _measure_pruned(launch: Launch, measured: Measured) -> str:
    """Add the pruned model's loss on the calibration data, or say why this layout cannot run it."""

    from megatron_ext.training.evaluate import load_other, mean_loss

    target = measured.plan.target
    try:
        _check_layout(launch, target)
    except ConfigError as error:
        return f"The pruned model's loss was not measured, because it does not fit this run's layout: {error}"
    pruned, model = load_other(launch, target, Path(launch.args.save))
    loss, _ = mean_loss(pruned, model, "train", launch.options["prune"].samples)
    measured.losses.append(Loss("pruned", target.num_parameters(), loss))
    return ""


def _check_layout(launch: Launch, arch: Architecture) -> None:
    args = launch.args
    stages = args.pipeline_model_parallel_size * (args.virtual_pipeline_model_parallel_size or 1)
    arch.validate(
        tp=args.tensor_model_parallel_size, pp=stages, ep=args.expert_model_parallel_size,
        etp=args.expert_tensor_parallel_size,
    )  # fmt: skip
    check_borders(arch.layers.split(stages))


def _as_scores(launch: Launch, values: dict[str, Any], step: layout.Step) -> Scores:
    args, options = launch.args, launch.options["prune"]
    if options.width_metric == "magnitude":
        values |= magnitudes(Reader(step.path), launch.architecture)
    return Scores(
        values=values, architecture=launch.architecture, model=str(launch.args.load), iteration=step.iteration,
        fingerprint=layout.fingerprint(step.path), data=" ".join(args.data_path or args.train_data_path or ["mock"]),
        seed=args.seed, samples=options.samples, metric=options.metric(),
    )  # fmt: skip


def _from_rank_0(plan: Plan | None) -> Plan:
    import torch

    values = [None if plan is None else plan.to_dict()]
    torch.distributed.broadcast_object_list(values, src=0)
    assert values[0] is not None
    return Plan.from_dict(values[0])


def _scores(launch: Launch) -> Scores:
    scores = Scores.load(launch.options["prune"].scores)
    check_weights("scores", scores.fingerprint, scores.iteration, source_step(launch.args).path)
    return scores


def _join_processes() -> None:
    """What torchrun started works together also where no model is run."""
    import torch

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")


def _wait() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
