"""`megatron-ext vision`: train an image classifier, or continue; `--skip-train` measures one on validation images."""

import argparse
from functools import partial
from typing import Any

from megatron_ext.training.job import STOPPABLE, DryRun, Job, RunConfig
from megatron_ext.training.run_job import run_job
from megatron_ext.vision import lamb, layer_decay
from megatron_ext.vision.checks import check
from megatron_ext.vision.family import FAMILY
from megatron_ext.vision.options import OPTIONS
from megatron_ext.vision.task import classification

RECIPE = ("--lr-decay-style", "cosine", "--weight-decay", "0.05", "--clip-grad", "5.0")


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
    from megatron_ext.platform.megatron_patches import before_saving, override_parameters
    from megatron_ext.training import loop

    model: Any = run.model
    if run.args.optimizer == "lamb":
        lamb.install()
    if (decay := run.options["layer"].decay) != 1:
        override_parameters(partial(layer_decay.overrides, model, decay))

    def averaging(chunks: list[Any]) -> list[Any]:
        if chunks[0].average is not None:
            before_saving(chunks[0].average.update)
        return chunks

    loop.train(run, hooks=(averaging,))


JOB = Job(
    "vision", FAMILY, options=OPTIONS, defaults=(*STOPPABLE, *RECIPE), measures=1, task=classification, check=check,
    dry_run=show, run=run_checked,
)  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Run the job on `args.words`."""
    run_job(JOB, args.words)
