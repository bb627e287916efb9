"""Pre-train a Transformer, Mamba-2 or hybrid model, or continue: `torchrun pretrain_hybrid.py --preset NAME ...`.

With `--skip-train`, measure the validation loss of a checkpoint instead.
"""

import sys

from megatron_ext.training.launch import STOPPABLE, Job, launch
from megatron_ext.training.program import main

JOB = Job("pretrain", defaults=STOPPABLE, measures=1)


def run() -> None:
    started = launch(JOB)
    from megatron_ext.training import dry_run, evaluate, run

    if started.dry_run:
        dry_run.show(started)
    elif started.args.skip_train:
        evaluate.evaluate(started)
    else:
        run.train(started)


if __name__ == "__main__":
    sys.exit(main(run))
