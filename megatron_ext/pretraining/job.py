"""`megatron-ext pretrain`: train a Transformer, Mamba-2 or hybrid model, or continue; `--skip-train` measures one."""

import argparse
from typing import Any

from megatron_ext.training.job import STOPPABLE, Job, RunConfig, run_job


def run(run: RunConfig, checked: Any = None) -> None:
    """Train until `--train-iters`, or measure the loss of a checkpoint on the whole validation split."""
    from megatron_ext.pretraining import validation
    from megatron_ext.training import loop

    if run.args.skip_train:
        validation.validate(run)
    else:
        loop.train(run)


JOB = Job("pretrain", defaults=STOPPABLE, measures=1, run=run)


def main(args: argparse.Namespace) -> None:
    """Run the job on `args.words`."""
    run_job(JOB, args.words)
