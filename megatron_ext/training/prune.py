"""The pruning job: score, plan, apply, and say what was cut."""

from pathlib import Path
from typing import Any

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.stream import Reader
from megatron_ext.errors import ConfigError
from megatron_ext.models.config import Architecture
from megatron_ext.models.pattern import MAMBA
from megatron_ext.pruning import tasks
from megatron_ext.pruning.apply import apply
from megatron_ext.pruning.budget import Targets, resolve
from megatron_ext.pruning.depth import check_borders
from megatron_ext.pruning.magnitude import magnitudes
from megatron_ext.pruning.plan import Plan
from megatron_ext.pruning.scores import BLOCKS, STDERR, Scores, mamba
from megatron_ext.pruning.select import make_plan
from megatron_ext.training.directory import CONFIG, describe
from megatron_ext.training.launch import Job, Launch
from megatron_ext.training.prune_options import PruneOptions

SCORES = "scores.safetensors"


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
        return plan.target
    targets = options.targets()
    if options.scores is not None:
        plan = make_plan(_scores(launch), launch.architecture, targets, merge_heads=options.merge_heads)
        return plan.target
    targets.check(launch.architecture)
    target = resolve(launch.architecture, targets, _some_layers(launch.architecture, targets))
    check_borders(launch.pattern)
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


def prune(launch: Launch) -> None:
    """Score (unless scores or a plan are given), plan and apply; rank 0 writes the run directory, all at once."""
    args, options = launch.args, launch.options["prune"]
    source = layout.find(args.load)
    attachments: dict[str, Any] = {CONFIG: lambda path: path.write_text(describe(launch))}
    scores, loss = None, None
    if options.plan is None and options.scores is None:
        from megatron_ext.training.calibrate import calibrate

        calibration = options.calibration(launch.architecture, args.seed)
        values, loss = calibrate(launch, calibration)
        if values is not None:
            if options.width_metric == "magnitude":
                values |= magnitudes(Reader(source.path), launch.architecture)
            data = " ".join(args.data_path or args.train_data_path or ["mock"])
            scores = Scores(
                values=values, architecture=launch.architecture, model=str(args.load), iteration=source.iteration,
                fingerprint=layout.fingerprint(source.path), data=data, seed=args.seed, samples=options.samples,
                metric=options.metric(),
            )  # fmt: skip
    elif options.scores is not None:
        scores = _scores(launch)
    if args.rank == 0:
        if options.plan is not None:
            plan = Plan.load(options.plan)
        else:
            assert scores is not None
            plan = make_plan(
                scores,
                launch.architecture,
                options.targets(),
                scores_path=options.scores or SCORES,
                merge_heads=options.merge_heads,
            )
        if scores is not None:
            attachments[SCORES] = scores.save
            attachments["importance.png"] = lambda path: _plot(scores, plan, path)
        attachments["report.md"] = lambda path: path.write_text(report(plan, loss))
        apply(plan, source.path, args.save, attachments)
        print(report(plan, loss))
        print(f"\nwritten to {args.save}", flush=True)
    _wait()


def report(plan: Plan, loss: float | None) -> str:
    """What was cut, as Markdown."""
    rows = ["| | before | after | kept |", "|---|---:|---:|---:|"]
    source, target = plan.source, plan.target

    def row(name: str, before: int, after: int) -> None:
        rows.append(f"| {name} | {before:,} | {after:,} | {after / before:.0%} |")

    row("parameters", source.num_parameters(), target.num_parameters())
    row("without embeddings", source.num_parameters(embedding=False), target.num_parameters(embedding=False))
    if source.num_experts:
        row("parameters that a token uses", source.num_active_parameters(), target.num_active_parameters())
    row("layers", len(source.layers.blocks), len(target.layers.blocks))
    for name, field in (
        ("hidden", "hidden_size"), ("FFN", "ffn_hidden_size"), ("query heads", "num_attention_heads"),
        ("Mamba-2 heads", "mamba_num_heads"), ("Mamba-2 head channels", "mamba_head_dim"), ("experts", "num_experts"),
        ("FFN of an expert", "moe_ffn_hidden_size"), ("shared FFN", "moe_shared_expert_intermediate_size"),
    ):  # fmt: skip
        if getattr(source, field):
            row(name, getattr(source, field), getattr(target, field))
    text = "# Pruned\n\n" + "\n".join(rows) + f"\n\nPattern `{source.pattern}` to `{target.pattern}`.\n"
    if loss is not None:
        text += f"\nLoss of the original on the calibration data: {loss:.4f} nats per token.\n"
    return text


def _scores(launch: Launch) -> Scores:
    return Scores.load(launch.options["prune"].scores)


def _plot(scores: Scores, plan: Plan, path: Path) -> None:
    from megatron_ext.evaluation.report import plot_importance

    one_dimensional = {name: value for name, value in scores.values.items() if value.dim() == 1}
    kept: dict[str, Any] = {"hidden": list(plan.hidden or range(plan.source.hidden_size))}
    blocks = plan.source.layers.blocks
    staying = [i for i, block in enumerate(blocks) if set(block) <= set(plan.units)]
    one_dimensional = {name: value for name, value in one_dimensional.items() if not _is_detail(name)}
    for name in one_dimensional:
        if name.startswith("depth."):
            kept[name] = staying if name.endswith(BLOCKS) else list(plan.units)
    for axis, values in (
        ("ffn", plan.ffn), ("query_head", plan.query_heads), ("mamba_head", plan.mamba_heads),
        ("expert", plan.experts), ("shared_ffn", plan.shared_ffn),
    ):  # fmt: skip
        kept |= {f"layers.{layer}.{axis}": list(indices) for layer, indices in values.items()}
    for layer in plan.source.layers.indices(MAMBA):
        channels = list(plan.head_channels.get(layer, range(plan.source.mamba_head_dim)))
        one_dimensional[f"layers.{layer}.mamba_head"] = scores[mamba(layer)][:, channels].norm(dim=1)
    plot_importance(one_dimensional, kept, path)


def _is_detail(name: str) -> bool:
    """Scores that a picture would not gain by."""
    return name.endswith(STDERR) or name.startswith("depth.scan_")


def _wait() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
