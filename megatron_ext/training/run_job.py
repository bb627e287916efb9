"""Running a job: the one way from a command line to what it asks for."""

from collections.abc import Sequence

from megatron_ext.training import dry_run
from megatron_ext.training.command_line import parse_command_line
from megatron_ext.training.job import Job


def run_job(job: Job, argv: Sequence[str]) -> None:
    """Parse and check a command line, and do what it asks for, or print it (`--dry-run`).

    Args:
        job: The kind of run.
        argv: The command line without the program's name.

    Raises:
        MegatronExtError: Something is wrong with it; says what.
    """
    run = parse_command_line(job, argv)
    checked = job.check(run)
    if run.dry_run:
        dry_run.show(run, job.dry_run(run, checked))
    elif job.run is not None:
        job.run(run, checked)
    elif run.args.skip_train:
        from megatron_ext.training import validation

        validation.validate(run)
    else:
        from megatron_ext.training import loop

        loop.train(run)
