"""`megatron-ext pretrain`: train a Transformer, Mamba-2 or hybrid model, or continue; `--skip-train` measures one."""

import argparse

from megatron_ext.training.job import STOPPABLE, Job
from megatron_ext.training.run_job import run_job

JOB = Job("pretrain", defaults=STOPPABLE, measures=1)


def main(args: argparse.Namespace) -> None:
    """Run the job on `args.words`."""
    run_job(JOB, args.words)
