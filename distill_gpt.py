"""Train a model to match another: `torchrun distill_gpt.py --distill-teacher DIR --pretrained-checkpoint DIR ...`."""

import sys

from megatron_ext.training.launch import launch
from megatron_ext.training.program import main


def run() -> None:
    from megatron_ext.training import cache, cache_write, distill, dry_run, teacher_ranks

    apart = teacher_ranks.divide(sys.argv[1:])
    started = launch(distill.JOB, cache.command_line(sys.argv[1:]))
    source = distill.check(started)
    if started.dry_run:
        dry_run.show(started, lesson=distill.lesson(started, source))
    elif isinstance(source, cache.Writing):
        cache_write.write(started, source)
    else:
        distill.distill(started, source, apart)


if __name__ == "__main__":
    sys.exit(main(run))
