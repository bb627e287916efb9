"""`megatron-ext vision-segment`: train UPerNet on a MambaVision backbone, or measure it with `--skip-train`."""

import argparse
import logging
from pathlib import Path
from typing import Any

from megatron_ext.errors import ConfigError, DataError
from megatron_ext.training.job import STOPPABLE, DryRun, Job, RunConfig
from megatron_ext.training.run_job import run_job
from megatron_ext.vision.downstream.backbone import check_backbone, train_or_measure
from megatron_ext.vision.images import MODES
from megatron_ext.vision.segmentation.folders import IGNORED, SegmentationFolder
from megatron_ext.vision.segmentation.options import SegmentOptions
from megatron_ext.vision.segmentation.task import folder, segmentation
from megatron_ext.vision.segmentation.upernet import FAMILY
from megatron_ext.vision.segmentation.variations import Crops

logger = logging.getLogger(__name__)

# AdamW as published; a polynomial of degree 1.
RECIPE = ("--lr-decay-style", "linear", "--weight-decay", "0.01", "--clip-grad", "0")


def check(run: RunConfig) -> dict[str, SegmentationFolder]:
    """Find what is wrong with the images and the flags.

    Returns:
        The images by split.

    Raises:
        ConfigError, DataError, CheckpointError: Says what.
    """
    options: SegmentOptions = run.options["segment"]
    model: Any = run.model
    args, backbone = run.args, model.backbone
    if options.data is None:
        raise DataError("no images", legal="--segment-data DIR with images/SPLIT and annotations/SPLIT")
    for name in ("flip", "one_class"):
        if not 0 <= getattr(options, name) <= 1:
            flag = f"--segment-{name.replace('_', '-')}"
            raise ConfigError(f"{flag} is a share", got=getattr(options, name), legal="0 to 1")
    if not 0 < options.smallest <= options.largest:
        got = f"--segment-smallest {options.smallest} --segment-largest {options.largest}"
        raise ConfigError("no range of scales", got=got, legal="the smallest above 0, the largest not below it")
    for name in ("auxiliary", "shorter", "pictures"):
        if (value := getattr(options, name)) is not None and value < 0:
            raise ConfigError(f"--segment-{name} is negative", got=value, legal="0 or more")
    if backbone.image_channels not in MODES:
        raise ConfigError("--mambavision-image-channels", got=backbone.image_channels, legal="1 or 3")
    if backbone.classes >= IGNORED:
        raise ConfigError("annotations are bytes", got=f"--mambavision-classes {backbone.classes}", legal="1 to 254")
    batch = args.micro_batch_size * args.data_parallel_size
    if batch == 1 and not args.skip_train:
        legal = "--micro-batch-size 2, or two data-parallel ranks"
        raise ConfigError(
            "pyramid pooling makes one pixel of an image, which no norm can be of", got="one image", legal=legal
        )
    check_backbone(run, options.backbone, "--segment-backbone")
    Crops(options, backbone)
    wanted = {"training": not args.skip_train, "validation": args.skip_train or args.eval_iters > 0}
    splits = {"training": options.train, "validation": options.valid}
    found = {name: folder(options, splits[name], backbone) for name, is_needed in wanted.items() if is_needed}
    for source in found.values():
        source.look()
    return found


def show(run: RunConfig, found: dict[str, SegmentationFolder]) -> DryRun:
    """What `--dry-run` adds."""
    rows = {"images": ", ".join(f"{len(source):,} for {name}" for name, source in found.items())}
    for name, source in found.items():
        if source.without:
            rows[f"left out of {name}"] = f"{len(source.without):,} without annotation, {source.without[0]} first"
    return DryRun(rows)


def run_checked(run: RunConfig, found: dict[str, SegmentationFolder]) -> None:
    """Train, or measure with `--skip-train`, which also draws some predictions."""
    options: SegmentOptions = run.options["segment"]
    model: Any = run.model
    args = run.args
    for name, source in found.items():
        if source.without and args.rank == 0:
            what = "%d images for %s have no annotation and are left out, %s first"
            logger.warning(what, len(source.without), name, source.without[0])
    train_or_measure(run, options.backbone)
    if args.skip_train and args.rank == 0 and args.save and options.pictures and run.start is not None:
        from megatron_ext.vision.segmentation.pictures import draw

        network: Any = FAMILY.read_network(run.start.step.path)
        shorter = model.backbone.resolution if options.shorter is None else options.shorter
        draw(network, found["validation"], shorter, options.pictures, Path(args.save) / "predictions.png")


JOB = Job(
    "vision-segment", FAMILY, options={"segment": SegmentOptions}, defaults=(*STOPPABLE, *RECIPE), measures=1,
    task=segmentation, check=check, dry_run=show, run=run_checked,
)  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Run the job on `args.words`."""
    run_job(JOB, args.words)
