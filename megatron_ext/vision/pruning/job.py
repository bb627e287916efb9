"""`megatron-ext prune --load NETWORK`: a trained image network to a smaller one; the flow is `pruning.job`'s."""

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_ext.errors import ConfigError, DataError
from megatron_ext.pruning.checks import read_scores, source_step
from megatron_ext.pruning.depth_metrics import DEPTH_METRICS, Change
from megatron_ext.pruning.job import prune
from megatron_ext.pruning.weights import check_weights
from megatron_ext.training.job import FORWARD_ONLY, DryRun, Job, RunConfig
from megatron_ext.training.run_job import run_job
from megatron_ext.vision.architecture import MambaVision
from megatron_ext.vision.checkpoint import read_evaluation
from megatron_ext.vision.family import FAMILY
from megatron_ext.vision.images import Variations
from megatron_ext.vision.options import ImageOptions
from megatron_ext.vision.pruning.axes import blocks_of
from megatron_ext.vision.pruning.networks import IMAGE_NETWORKS, calibration
from megatron_ext.vision.pruning.options import CalibrationImages, PruneImageOptions
from megatron_ext.vision.pruning.plan import ImagePlan
from megatron_ext.vision.pruning.report import size_rows
from megatron_ext.vision.pruning.scores import ImageScores
from megatron_ext.vision.pruning.targets import make_plan
from megatron_ext.vision.sources import open_source


@dataclass(frozen=True)
class Request:
    """A pruning job that can begin.

    Attributes:
        target: What the network becomes; which of its blocks stay is not known before they are scored.
        images: How many there are to calibrate on.
    """

    target: MambaVision
    images: int = 0


def check(run: RunConfig) -> Request:
    """Find what is wrong with the options before any work is done.

    Raises:
        ConfigError, PlanError, CheckpointError, DataError: Says what.
    """
    args, options = run.args, run.options["prune"]
    model: Any = run.model
    for name in ("load", "save"):
        if getattr(args, name) is None:
            raise ConfigError(f"--{name} is missing", legal="--load NETWORK --save NEW_DIRECTORY")
    source = source_step(args).path
    given = [name for name in options.given() if name != "plan"]
    if options.plan is not None:
        if given:
            flag = f"--prune-{given[0].replace('_', '-')}"
            raise ConfigError(f"{flag} would have no effect: the plan says what is kept", got=flag)
        plan = ImagePlan.load(options.plan)
        plan.check(model)
        check_weights("a plan", plan.provenance.fingerprint, plan.provenance.iteration, source)
        return Request(plan.target)
    targets = options.targets()
    targets.check(model)
    _check_effects(options)
    if options.scores is not None:
        return Request(make_plan(read_scores(options, source, ImageScores), model, targets).target)
    count = len(blocks_of(model)) if options.blocks is None else options.blocks
    target = targets.resolve(model, range(count))
    return Request(target, _images(run) if options.calibrates else 0)


def _check_effects(options: PruneImageOptions) -> None:
    """Refuse each option that would change nothing."""
    reasons: dict[str, str] = {}
    if options.blocks is None:
        reasons["depth_metric"] = "no blocks are to go"
    if options.width_metric != "activation":
        reasons |= dict.fromkeys(("batch_aggregation", "sequence_aggregation"), "weights alone are scored")
    if not options.calibrates:
        reasons["samples"] = "weights alone are scored"
    for name in options.given():
        if name in reasons:
            flag = f"--prune-{name.replace('_', '-')}"
            raise ConfigError(f"{flag} would have no effect: {reasons[name]}", got=f"{flag} {getattr(options, name)}")


def _images(run: RunConfig) -> int:
    """How many images there are to calibrate on."""
    args, options, images = run.args, run.options["prune"], run.options["images"]
    model: Any = run.model
    if images.train is None:
        raise DataError("no images to calibrate on", legal="--images-train DIR, or --prune-width-metric magnitude")
    if options.samples < 1 or options.samples % args.global_batch_size:
        legal = f"multiples of {args.global_batch_size}"
        raise ConfigError("--prune-samples must be a multiple of --global-batch-size", got=options.samples, legal=legal)
    Variations(ImageOptions(), model)
    classes = read_evaluation(source_step(args).path).classes
    source = open_source(Path(images.train), None if classes is None else {c: i for i, c in enumerate(classes)})
    if len(source.classes) > model.classes:
        raise ConfigError("there are more classes than the classifier knows", got=len(source.classes))
    if options.samples > len(source):
        raise ConfigError(
            "--prune-samples are more than there are", got=options.samples, legal=f"{len(source)} at most"
        )
    return len(source)


def show(run: RunConfig, request: Request) -> DryRun:
    """What `--dry-run` adds."""
    model: Any = run.model
    options = run.options["prune"]
    table = Table("", "before", "after", "kept", title="what pruning changes")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in size_rows(model, request.target):
        table.add_row(*row.cells())
    rows = {"calibration": "none"}
    if request.images:
        passes = 1
        if options.blocks is not None and not isinstance(DEPTH_METRICS[options.depth_metric], Change):
            passes += 1 + len(blocks_of(model))
        rows["calibration"] = f"{options.samples:,} of {request.images:,} images, {passes} times at least"
    return DryRun(rows, (table,))


JOB = Job(
    "prune", FAMILY, options={"prune": PruneImageOptions, "images": CalibrationImages}, defaults=FORWARD_ONLY,
    makes_new=True, task=calibration, check=check, dry_run=show, run=partial(prune, family=IMAGE_NETWORKS),
)  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Run the job on `args.words`."""
    run_job(JOB, args.words)
