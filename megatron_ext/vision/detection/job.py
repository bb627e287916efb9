"""`megatron-ext vision-detect`: train R-CNN on a MambaVision backbone, or measure it with `--skip-train`."""

import argparse
import logging
from pathlib import Path
from typing import Any

from megatron_ext.errors import ConfigError, DataError
from megatron_ext.training.job import STOPPABLE, DryRun, Job, RunConfig
from megatron_ext.training.run_job import run_job
from megatron_ext.vision.detection.coco import CocoImages
from megatron_ext.vision.detection.options import DetectOptions
from megatron_ext.vision.detection.precision import check_installed
from megatron_ext.vision.detection.rcnn import FAMILY, STRIDE
from megatron_ext.vision.detection.task import detection, images
from megatron_ext.vision.downstream.backbone import check_backbone, train_or_measure
from megatron_ext.vision.images import MODES

logger = logging.getLogger(__name__)

# AdamW as published for backbones of this kind; the rate falls by steps there, by a cosine here.
RECIPE = ("--lr-decay-style", "cosine", "--weight-decay", "0.05", "--clip-grad", "1.0")


def check(run: RunConfig) -> dict[str, CocoImages]:
    """Find what is wrong with the images and the flags.

    Returns:
        The images by split.

    Raises:
        ConfigError, DataError, CheckpointError: Says what.
    """
    options: DetectOptions = run.options["detect"]
    model: Any = run.model
    args, backbone = run.args, model.backbone
    check_installed()
    if not 0 <= options.flip <= 1:
        raise ConfigError("--detect-flip is a share", got=options.flip, legal="0 to 1")
    if not 0 < options.smallest <= options.largest:
        got = f"--detect-smallest {options.smallest} --detect-largest {options.largest}"
        raise ConfigError("no range of scales", got=got, legal="the smallest above 0, the largest not below it")
    if options.pictures < 0:
        raise ConfigError("--detect-pictures is negative", got=options.pictures, legal="0 or more")
    if backbone.image_channels not in MODES:
        raise ConfigError("--mambavision-image-channels", got=backbone.image_channels, legal="1 or 3")
    if backbone.resolution % STRIDE:
        got = f"--mambavision-resolution {backbone.resolution}"
        raise ConfigError("the training square has no whole strides", got=got, legal=f"a multiple of {STRIDE}")
    check_backbone(run, options.backbone, "--detect-backbone")
    found = {}
    for split, is_needed in {"train": not args.skip_train, "valid": args.skip_train or args.eval_iters > 0}.items():
        if is_needed:
            if getattr(options, split) is None or getattr(options, f"{split}_file") is None:
                legal = f"--detect-{split} DIR --detect-{split}-file FILE.json" + ", or --eval-iters 0" * (
                    split == "valid"
                )
                raise DataError(f"no images for {split}", legal=legal)
            found[split] = images(options, split, model)
    _check_categories(found, backbone.classes)
    return found


def _check_categories(found: dict[str, CocoImages], classes: int) -> None:
    for source in found.values():
        if len(source.categories) > classes:
            what = "there are more categories than the heads know"
            legal = f"--mambavision-classes {len(source.categories)}"
            raise ConfigError(what, got=f"{source.file}: {len(source.categories)}", legal=legal)
    if len({tuple(source.categories) for source in found.values()}) > 1:
        got = ", ".join(f"{source.file}: {len(source.categories)}" for source in found.values())
        raise DataError("training and validation have other categories", got=got, legal="the same ids in both files")


def show(run: RunConfig, found: dict[str, CocoImages]) -> DryRun:
    """What `--dry-run` adds."""
    rows = {"images": ", ".join(f"{len(source):,} for {split}" for split, source in found.items())}
    for split, source in found.items():
        if source.left_out:
            rows[f"left out of {split}"] = f"{len(source.left_out):,}: {source.left_out[0]}, and so on"
    return DryRun(rows)


def run_checked(run: RunConfig, found: dict[str, CocoImages]) -> None:
    """Train, or measure with `--skip-train`, which also draws some detections."""
    options: DetectOptions = run.options["detect"]
    model: Any = run.model
    args = run.args
    for split, source in found.items():
        if source.left_out and args.rank == 0:
            logger.warning("%d are left out of %s, such as %s", len(source.left_out), split, source.left_out[0])
    train_or_measure(run, options.backbone)
    if args.skip_train and args.rank == 0 and args.save and options.pictures and run.start is not None:
        from megatron_ext.vision.detection.pictures import draw

        network: Any = FAMILY.read_network(run.start.step.path)
        draw(network, found["valid"], model.backbone.resolution, options.pictures, Path(args.save) / "detections.png")


JOB = Job(
    "vision-detect", FAMILY, options={"detect": DetectOptions}, defaults=(*STOPPABLE, *RECIPE), measures=1,
    task=detection, check=check, dry_run=show, run=run_checked,
)  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Run the job on `args.words`."""
    run_job(JOB, args.words)
