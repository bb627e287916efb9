"""`--dry-run`: what a job would run, in one screen, without starting a process or touching a file."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from megatron_ext.models.training_cost import Layout, Lesson, memory
from megatron_ext.training.job import DryRun, RunConfig

GIB = 2**30
NOTHING = DryRun()


def layout_of(run: RunConfig) -> Layout:
    """What `models.training_cost` has to know of a validated command line, which is to run on GPUs."""
    args = run.args
    half = args.bf16 or args.fp16
    return Layout(
        tp=args.tensor_model_parallel_size,
        pp=args.pipeline_model_parallel_size,
        cp=args.context_parallel_size,
        dp=args.data_parallel_size,
        ep=args.expert_model_parallel_size,
        etp=args.expert_tensor_parallel_size,
        micro_batch=args.micro_batch_size,
        global_batch=args.global_batch_size,
        seq_length=args.seq_length,
        width=2 if half else 4,
        gradient_width=4 if args.accumulate_allreduce_grads_in_fp32 or not half else 2,
        shard_optimizer=args.use_distributed_optimizer,
        sequence_parallel=args.sequence_parallel,
        recompute=args.recompute_granularity == "full",
        overlap_gradients=args.overlap_grad_reduce,
        virtual=args.virtual_pipeline_model_parallel_size or 1,
        fused_gradients=args.gradient_accumulation_fusion,
    )


def memory_per_gpu(run: RunConfig, lesson: Lesson | None = None) -> dict[str, float]:
    """Bytes on the fullest rank, by component; see `training_cost.memory`."""
    return memory(run.architecture, layout_of(run), lesson)


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
    args, architecture = run.args, run.architecture
    if args.rank:
        return
    table = Table(title=f"{run.job.name}: dry run, nothing started, nothing written", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("model", f"{run.model_source}, pattern {args.hybrid_layer_pattern}")
    table.add_row(
        "sizes",
        f"hidden {architecture.hidden_size:,}, FFN {architecture.ffn_hidden_size:,}, vocabulary "
        f"{architecture.vocab_size:,}, {architecture.num_attention_heads} heads in "
        f"{architecture.num_query_groups} groups",
    )
    total, body = architecture.num_parameters(), architecture.num_parameters(embedding=False)
    active = f", of which a token uses {architecture.num_active_parameters():,}" if architecture.num_experts else ""
    table.add_row("parameters", f"{total:,} ({total / 1e9:.2f}B), without embeddings {body:,}{active}")
    for name, value in extra.rows.items():
        table.add_row(name, value)
    table.add_row("memory per GPU", shown(memory_per_gpu(run) if extra.memory is None else extra.memory))
    table.add_row(
        "layout",
        f"{args.world_size} ranks = tensor {args.tensor_model_parallel_size} x pipeline "
        f"{args.pipeline_model_parallel_size} x context {args.context_parallel_size} x data {args.data_parallel_size}",
    )
    tokens = args.global_batch_size * args.seq_length
    table.add_row(
        "batch",
        f"{args.global_batch_size} x {args.seq_length} = {tokens:,} tokens a step, micro-batch "
        f"{args.micro_batch_size}, {args.train_iters or 0:,} steps, {tokens * (args.train_iters or 0):,} tokens",
    )
    console = Console(width=120)
    for each in (table, *extra.tables):
        console.print(each)
