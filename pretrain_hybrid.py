"""Pre-train a Transformer, Mamba-2 or hybrid model, or continue: `torchrun pretrain_hybrid.py --preset NAME ...`."""

import sys

from megatron_ext.training.launch import Job, launch, main

JOB = Job("pretrain")


def run() -> None:
    started = launch(JOB)
    from megatron_ext.training import dry_run, run

    if started.dry_run:
        dry_run.show(started)
    else:
        run.train(started)


if __name__ == "__main__":
    sys.exit(main(run))
