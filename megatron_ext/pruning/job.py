"""The pruning job: score, plan, apply, and say what was cut.

Scores are written as soon as they are there, beside `--save`: whatever fails afterwards, the same command goes on from
them. The run directory gets its name last, when all that belongs into it is there.
"""

import argparse
import json
import os
import shutil
from argparse import Namespace
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_ext.checkpoint import ranks
from megatron_ext.checkpoint.atomic import publish, write_text
from megatron_ext.checkpoint.file_checksums import write_rest
from megatron_ext.checkpoint.layout import Step
from megatron_ext.checkpoint.outputs import hold_new
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.errors import ConfigError
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.training_cost import Layout, forward_flops_per_token
from megatron_ext.pruning import report
from megatron_ext.pruning.apply import apply
from megatron_ext.pruning.checks import check, read_scores, source_step
from megatron_ext.pruning.depth_cost import depth_cost
from megatron_ext.pruning.depth_metrics import DEPTH_METRICS, Change
from megatron_ext.pruning.emulation import Moments
from megatron_ext.pruning.language_models import LANGUAGE_MODELS
from megatron_ext.pruning.leave_out import sublayers_of
from megatron_ext.pruning.options import GIB, PruneOptions
from megatron_ext.pruning.pictures import plot_losses
from megatron_ext.pruning.pruned_family import Loss, Measured, PrunedFamily, Round
from megatron_ext.pruning.saved_plan import SavedPlan
from megatron_ext.pruning.saved_scores import SavedScores, described
from megatron_ext.pruning.scores import Scores
from megatron_ext.reports.progress import Progress
from megatron_ext.training.job import FORWARD_ONLY, DryRun, Job, RunConfig
from megatron_ext.training.run_directory import CONFIG, config_yaml
from megatron_ext.training.run_job import run_job

SCORES = "scores.safetensors"
REPORT, HTML, LOSSES = "report.md", "report.html", "losses.json"
BESIDE = ("scores-*.safetensors", "round-*", "pruned")
"""What lies beside `--save` as `.NAME.*` until the run directory is there."""


def changes(run: RunConfig, target: Architecture) -> Table:
    """The table before and after, for `--dry-run`; which layers stay is known only once they are scored."""
    workload = run.options["prune"].served
    table = Table("", "before", "after", "kept", title="what pruning changes")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in report.size_rows(run.architecture, target, workload):
        table.add_row(*row.cells())
    return table


def costs(run: RunConfig, target: Architecture) -> Table:
    """What measuring takes at most, for `--dry-run`; by the product's model of costs."""
    options, arch, layout = run.options["prune"], run.architecture, Layout.from_args(run.args)
    table = Table("", "", title="what measuring costs at most (estimated)", show_header=False)
    if options.recover is not None:
        _recovery_costs(table, run, len(arch.pattern) - len(target.pattern))
    if options.plan is not None or options.scores is not None or not options.calibrates:
        table.add_row("calibration", "none")
        return table
    flops = options.samples * layout.seq_length * forward_flops_per_token(arch, layout.seq_length)
    table.add_row("calibration", f"{options.samples:,} sequences, {flops:.3g} operations")
    asked = options.calibration(arch, options.targets(), run.args.seed, run.args.global_batch_size)
    if asked.depth == "scan_task":
        units = len(sublayers_of(arch, asked.blocks))
        table.add_row("the task", f"asked {units - asked.run + 2:,} times")
    elif not isinstance(DEPTH_METRICS[asked.depth], Change):
        cost = depth_cost(
            arch, asked.depth, asked.depth_samples, layout, blocks=asked.blocks, kinds=asked.kinds, run=asked.run,
            sampling=asked.sampling,
        )  # fmt: skip
        each = f"{cost.evaluations:,} evaluations of {asked.depth_samples:,} sequences, {cost.flops:.3g} operations"
        table.add_row(asked.depth, each)
        table.add_row("kept per rank", f"{min(cost.states, asked.memory) / GIB:.2f} of {cost.states / GIB:.2f} GiB")
    return table


def _recovery_costs(table: Table, run: RunConfig, dropped: int) -> None:
    options, hidden = run.options["prune"], run.architecture.hidden_size
    fitting, samples = options.fitting, options.recover_samples or options.samples
    at_once = 1 if fitting.stream == "pruned" else min(dropped, fitting.at_a_time(hidden))
    moments = at_once * Moments.bytes(hidden, fitting.rank > 0) / GIB
    passes = fitting.passes(dropped, hidden)
    table.add_row("recovery", f"{passes} passes over {samples:,} sequences at most, {at_once} sub-layers at a time")
    table.add_row("moments per rank", f"{moments:.2f} GiB")
    table.add_row("what it adds", f"{dropped * hidden * (2 * fitting.rank + 1):,} parameters at most")


@dataclass
class Found:
    """What is to be cut, and what was measured on the way.

    Attributes:
        plan: From the original to the pruned model.
        scores: Of each round, on rank 0.
        losses: Of the original, and of what each round left.
        kept: Where the scores wait until the run directory is there.
    """

    plan: SavedPlan
    scores: list[Scores] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    kept: list[SavedScores] = field(default_factory=list)


def prune(run: RunConfig, request: Any, family: PrunedFamily = LANGUAGE_MODELS) -> None:
    """Score (unless scores or a plan are given), plan and apply.

    Args:
        run: The validated command line.
        request: What the job's check has found, which `family` understands.
        family: What the model belongs to.
    """
    args, options = run.args, run.options["prune"]
    source = source_step(args)
    if args.rank == 0:
        hold_new(Path(args.save), BESIDE)
    if options.plan is not None:
        found = Found(family.plan.load(options.plan))
    elif options.scores is not None:
        scores = read_scores(options, source.path, family.scores)
        found = Found(family.make_plan(run, Round(run.model, options.targets()), scores, options.scores), [scores])
    else:
        found = measure(run, request, source, family)
    found.plan = family.recover(run, found.plan)
    _join_processes()
    _write(run, source, found, family)
    if args.rank == 0:
        for kept in found.kept:
            kept.path.unlink(missing_ok=True)
        print((Path(args.save) / REPORT).read_text())
        print(f"written to {args.save}", flush=True)
    _wait()


def _write(run: RunConfig, source: Step, found: Found, family: PrunedFamily) -> None:
    """Make the run directory beside its place, whole, and then give it its name."""
    args = run.args
    plan, losses = found.plan, found.losses
    page = partial(family.page, run, plan, found.scores)
    attachments: dict[str, Any] = {
        CONFIG: lambda path: path.write_text(config_yaml(run)),
        REPORT: lambda path: path.write_text(page(losses)),
    }
    for number, scores in enumerate(found.scores):
        name = SCORES if number == 0 else f"{Path(SCORES).stem}.round-{number + 1}.safetensors"
        attachments[name] = scores.save
    html = partial(family.html, run, plan, found.scores)
    if (text := html(losses)) is not None:
        attachments[HTML] = lambda path: path.write_text(text)
    if found.scores:
        attachments["importance.png"] = lambda path: family.plot(found.scores[0], plan, path)
    whole = _beside(args, "pruned")
    _remove(whole)  # an earlier attempt's
    with Progress("written", unit="bytes") as progress:
        apply(plan, source.path, whole, attachments, progress.update)
    if losses:
        remark = _measure_pruned(run, found, whole, family)
        if args.rank == 0:
            write_text(whole / REPORT, page(losses, remark))
            write_text(whole / LOSSES, json.dumps([asdict(loss) for loss in losses], indent=2) + "\n")
            if (text := html(losses)) is not None:
                write_text(whole / HTML, text)
            plot_losses([(loss.name, loss.parameters, loss.nats) for loss in losses], whole / "loss.png", family.per)
    if args.rank == 0:
        write_rest(whole)
        publish(whole, args.save)


def measure(run: RunConfig, request: Any, source: Step, family: PrunedFamily = LANGUAGE_MODELS) -> Found:
    """Score and plan in `--prune-iterations` rounds, each on what the one before left; the plans become one.

    Between rounds the model that is left is written beside `--save`, and removed again. What an earlier start has
    scored is not scored again.
    """
    from megatron_ext.training.forward import start

    options = run.options["prune"]
    if options.calibrates:
        start(run)
    _join_processes()
    whole: SavedPlan | None = None
    every: list[Scores] = []
    losses: list[Loss] = []
    waiting: list[SavedScores] = []
    for number, targets in enumerate(options.rounds(run.model)):
        round = Round(run.model if whole is None else whole.target, targets, whole)
        kept = SavedScores.of(run, family, round, source)
        scores = kept.found()
        if not ranks.gather(scores is not None)[0]:
            scores = _score(run, request, source, family, round, number)
            if scores is not None:
                kept.save(scores)
                scores = family.scores.load(kept.path)  # as a later start would find them
        waiting.append(kept)
        plan, loss = None, None
        if scores is not None:
            every.append(scores)
            plan = family.make_plan(run, round, scores, SCORES).to_dict()
            loss = scores.loss
        plan, loss = ranks.gather((plan, loss))[0]
        assert plan is not None
        if loss is not None:
            losses.append(Loss(f"after round {number}" if number else "original", round.model.num_parameters(), loss))
        whole = family.plan.from_dict(plan) if whole is None else whole.then(family.plan.from_dict(plan))
    assert whole is not None
    return Found(whole, every, losses, waiting)


def _score(
    run: RunConfig, request: Any, source: Step, family: PrunedFamily, round: Round, number: int
) -> Scores | None:  # fmt: skip
    """The scores of the model that so many rounds left, on rank 0."""
    from megatron_ext.training.forward import build_model, load_other

    args, options = run.args, run.options["prune"]
    current, step, between = run, source.path, None
    if round.plan is not None:
        between = _beside(args, f"round-{number}")
        _remove(between)  # an earlier attempt's
        apply(round.plan, source.path, between)
        step = between
    measured = Measured({}, None)
    if options.calibrates:
        current, chunks = (run, build_model(run)) if between is None else load_other(run, round.model, between)
        measured = family.calibrate(current, chunks, round, request)
    values = dict(measured.values or {})
    if options.width_metric == "magnitude":
        values |= family.magnitudes(CheckpointReader(step), round.model)
    if between is not None:
        _remove(between)
    return described(run, family, round, source, values, measured) if ranks.rank() == 0 else None


def _measure_pruned(run: RunConfig, found: Found, checkpoint: Path, family: PrunedFamily) -> str:
    """Add the pruned model's loss on the calibration data, or say why this layout cannot run it."""
    from megatron_ext.training.forward import load_other, mean_metrics

    target = found.plan.target
    try:
        family.check_layout(run, target)
    except ConfigError as error:
        return f"The pruned model's loss was not measured, because it does not fit this run's layout: {error}"
    pruned, model = load_other(run, target, checkpoint)
    metrics, _ = mean_metrics(pruned, model, family.split, run.options["prune"].samples)
    found.losses.append(Loss("pruned", target.num_parameters(), metrics["loss"]))
    return ""


def _beside(args: Namespace, what: str) -> Path:
    return Path(args.save).parent / f".{Path(args.save).name}.{what}"


def _remove(directory: Path) -> None:
    """On all ranks: none goes on before it is gone."""
    if ranks.rank() == 0:
        shutil.rmtree(directory, ignore_errors=True)
    ranks.gather(None)


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


JOB = Job(
    "prune",
    options={"prune": PruneOptions},
    defaults=FORWARD_ONLY,
    offline=lambda early: early.prune_recover is None and (early.prune_scores or early.prune_plan) is not None,
    makes_new=True,
    check=check,
    dry_run=lambda run, request: DryRun(tables=(changes(run, request.target), costs(run, request.target))),
    run=prune,
)  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Run the job on `args.words`."""
    run_job(JOB, args.words)
