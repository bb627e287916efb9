"""`megatron-ext vision`: train an image classifier, or continue; `--skip-train` measures one on validation images."""

import argparse
from typing import Any

from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.training.job import STOPPABLE, DryRun, Job, RunConfig
from megatron_ext.training.run_job import run_job
from megatron_ext.vision.family import FAMILY
from megatron_ext.vision.images import Variations
from megatron_ext.vision.options import AverageOptions, ImageOptions
from megatron_ext.vision.task import classification, sources

RECIPE = ("--lr-decay-style", "cosine", "--weight-decay", "0.05", "--clip-grad", "5.0")


def check(run: RunConfig) -> dict[str, int]:
    """Find what is wrong with the images and the flags.

    Returns:
        The number of images by split.

    Raises:
        ConfigError, DataError: Says what.
    """
    options: ImageOptions = run.options["images"]
    model: Any = run.model
    args = run.args
    for name in ("flip", "erasing", "smoothing"):
        if not 0 <= getattr(options, name) < 1:
            raise ConfigError(f"--images-{name} is a share", got=getattr(options, name), legal="0 to less than 1")
    for name in ("crop", "smallest"):
        if not 0 < getattr(options, name) <= 1:
            raise ConfigError(f"--images-{name} is a share", got=getattr(options, name), legal="more than 0, at most 1")
    if min(options.mixup, options.cutmix) < 0:
        raise ConfigError("alphas are not negative", got=min(options.mixup, options.cutmix), legal="--images-mixup 0")
    if options.mixes and args.micro_batch_size % 2 and not args.skip_train:
        legal = "an even --micro-batch-size, or --images-mixup 0 --images-cutmix 0"
        raise ConfigError("images are mixed in pairs", got=f"--micro-batch-size {args.micro_batch_size}", legal=legal)
    if options.train is None and not args.skip_train:
        raise DataError("no images to train on", legal="--images-train DIR")
    if options.valid is None and (args.skip_train or args.eval_iters > 0):
        raise DataError("no images to measure on", legal="--images-valid DIR, or --eval-iters 0")
    decay = run.options["average"].decay
    if not 0 <= decay < 1:
        raise ConfigError("--average-decay is a share", got=decay, legal="0 to less than 1")
    if decay and run.start is not None and "average.step" not in CheckpointReader(run.start.step.path).shapes:
        what = "the checkpoint has no average of its weights, which is kept from a run's first step"
        raise ConfigError(what, got=f"--average-decay {decay}", legal="--average-decay 0")
    Variations(options, model)
    train, valid = sources(options)
    known = max(len(source.classes) for source in (train, valid) if source is not None)
    if known > model.classes:
        what = "there are more classes than the classifier knows"
        raise ConfigError(what, got=known, legal=f"--mambavision-classes {known}")
    return {name: len(s) for name, s in (("training", train), ("validation", valid)) if s is not None}


def show(run: RunConfig, images: dict[str, int]) -> DryRun:
    """What `--dry-run` adds."""
    model: Any = run.model
    counts = ", ".join(f"{count / 1e9:.3g} G {name}" for name, count in model.multiply_adds().items())
    found = ", ".join(f"{count:,} for {name}" for name, count in images.items())
    return DryRun({"multiply-adds an image": counts, "images": found})


def run_checked(run: RunConfig, images: dict[str, int]) -> None:
    """Train, or measure with `--skip-train`; before a save the average of the weights takes in the last step's."""
    if run.args.skip_train:
        from megatron_ext.training import validation

        validation.validate(run)
        return
    from megatron_ext.platform.megatron_patches import before_saving
    from megatron_ext.training import loop

    def averaging(chunks: list[Any]) -> list[Any]:
        if chunks[0].average is not None:
            before_saving(chunks[0].average.update)
        return chunks

    loop.train(run, hooks=(averaging,))


JOB = Job(
    "vision", FAMILY, options={"images": ImageOptions, "average": AverageOptions}, defaults=(*STOPPABLE, *RECIPE),
    measures=1, task=classification, check=check, dry_run=show, run=run_checked,
)  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Run the job on `args.words`."""
    run_job(JOB, args.words)
