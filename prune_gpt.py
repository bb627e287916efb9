"""Cut a trained model to a smaller one: `torchrun prune_gpt.py --load DIR --save DIR --prune-target-params 0.5 ...`."""

import sys

from megatron_ext.training.launch import launch
from megatron_ext.training.program import main


def run() -> None:
    from megatron_ext.training import dry_run, prune
    from megatron_ext.training.prune_check import check

    started = launch(prune.JOB)
    request = check(started)
    if started.dry_run:
        dry_run.show(started, prune.changes(started, request.target), prune.costs(started))
    else:
        prune.prune(started, request)


if __name__ == "__main__":
    sys.exit(main(run))
