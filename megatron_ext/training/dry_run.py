"""`--dry-run`: what a job would run, in one screen, without starting a process or touching a file."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from megatron_ext.models.training_cost import Layout, TeacherSetup, memory
from megatron_ext.training.job import DryRun, RunConfig

GIB = 2**30
NOTHING = DryRun()


def memory_per_gpu(run: RunConfig, lesson: TeacherSetup | None = None) -> dict[str, float]:
    """Bytes on the fullest rank, by component; see `training_cost.memory`."""
    return memory(run.architecture, Layout.from_args(run.args), lesson)


def shown(parts: Mapping[str, float]) -> str:
    """Bytes by component as one line."""
    each = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    return f"{sum(parts.values()) / GIB:.2f} GiB: {each} (estimated)"


def show(run: RunConfig, extra: DryRun = NOTHING) -> None:
    """Print model, parameters, memory per GPU and layout, and what a job adds; once, under torchrun too.

    Args:
        run: The validated command line.
        extra: Of the job.
    """
    args, family = run.args, run.job.family
    if args.rank:
        return
    table = Table(title=f"{run.job.name}: dry run, nothing started, nothing written", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("model", run.model_source)
    for name, value in (family.rows(args, run.model) | dict(extra.rows)).items():
        table.add_row(name, value)
    memory = family.memory(run.model, Layout.from_args(run.args)) if extra.memory is None else extra.memory
    table.add_row("memory per GPU", shown(memory))
    table.add_row(
        "layout",
        f"{args.world_size} ranks = tensor {args.tensor_model_parallel_size} x pipeline "
        f"{args.pipeline_model_parallel_size} x context {args.context_parallel_size} x data {args.data_parallel_size}",
    )
    steps = args.train_iters or 0
    if not family.reads_text:
        count = args.global_batch_size
        table.add_row("batch", f"{count:,} samples, micro-batch {args.micro_batch_size}, {steps:,} steps")
        _print(table, extra)
        return
    tokens = args.global_batch_size * args.seq_length
    table.add_row(
        "batch",
        f"{args.global_batch_size} x {args.seq_length} = {tokens:,} tokens a step, micro-batch "
        f"{args.micro_batch_size}, {steps:,} steps, {tokens * steps:,} tokens",
    )
    _print(table, extra)


def _print(table: Table, extra: DryRun) -> None:
    console = Console(width=120)
    for each in (table, *extra.tables):
        console.print(each)
