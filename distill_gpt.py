"""Train a model to match another: `torchrun distill_gpt.py --distill-teacher DIR --pretrained-checkpoint DIR ...`."""

import sys

from megatron_ext.training.launch import launch, main


def run() -> None:
    from megatron_ext.training import distill, dry_run

    started = launch(distill.JOB)
    teacher = distill.check(started)
    if started.dry_run:
        dry_run.show(started)
    else:
        distill.distill(started, teacher)


if __name__ == "__main__":
    sys.exit(main(run))
