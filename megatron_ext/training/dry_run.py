"""`--dry-run`: what a job would run, in one screen, without starting a process or touching a file."""

from rich.console import Console
from rich.table import Table

from megatron_ext.models.axes import parameters_per_rank
from megatron_ext.training.launch import Launch

GIB = 2**30


def memory_per_gpu(launch: Launch) -> dict[str, float]:
    """Bytes on the fullest rank: weights, gradients, optimizer state, and an estimate of the activations.

    Weights and gradients take the parameter dtype (gradients fp32 unless reduced in bf16); Adam keeps two fp32 moments
    and, beside 16-bit weights, an fp32 copy; the distributed optimizer divides these by the data-parallel size.
    Activations follow "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198, equation 2)
    with flash attention: 34 s b h bytes per block in 16 bits, the linear part divided by TP.
    """
    args, architecture = launch.args, launch.architecture
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    ep, etp = args.expert_model_parallel_size, args.expert_tensor_parallel_size
    parameters = max(parameters_per_rank(architecture, tp=tp, pp=pp, ep=ep, etp=etp))
    half = args.bf16 or args.fp16
    width = 2 if half else 4
    gradient = 4 if args.accumulate_allreduce_grads_in_fp32 or not half else 2
    states = 8 + (4 if half else 0)
    shards = args.data_parallel_size if args.use_distributed_optimizer else 1
    tokens = args.micro_batch_size * args.seq_length / args.context_parallel_size
    per_unit = tokens * architecture.hidden_size * 17 * (width / 2)
    share = tp if args.sequence_parallel else 1
    units = -(-len(architecture.pattern) // pp)
    in_flight = min(pp, 8)
    activations = per_unit * units * in_flight / share
    if args.recompute_granularity == "full":
        activations = tokens * architecture.hidden_size * width * units * in_flight / share + per_unit
    return {
        "weights": parameters * width,
        "gradients": parameters * gradient,
        "optimizer": parameters * states / shards,
        "activations (estimate)": activations,
    }


def show(launch: Launch, *more: Table) -> None:
    """Print model, parameters, memory per GPU and layout, and `more` that a job has to say."""
    args, architecture = launch.args, launch.architecture
    table = Table(title=f"{launch.job.name}: dry run, nothing started, nothing written", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("model", f"{launch.model_source}, pattern {args.hybrid_layer_pattern}")
    table.add_row(
        "sizes",
        f"hidden {architecture.hidden_size:,}, FFN {architecture.ffn_hidden_size:,}, vocabulary "
        f"{architecture.vocab_size:,}, {architecture.num_attention_heads} heads in "
        f"{architecture.num_query_groups} groups",
    )
    total, body = architecture.num_parameters(), architecture.num_parameters(embedding=False)
    active = f", of which a token uses {architecture.num_active_parameters():,}" if architecture.num_experts else ""
    table.add_row("parameters", f"{total:,} ({total / 1e9:.2f}B), without embeddings {body:,}{active}")
    memory = memory_per_gpu(launch)
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in memory.items())
    table.add_row("memory per GPU", f"{sum(memory.values()) / GIB:.2f} GiB: {parts}")
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
    for each in (table, *more):
        console.print(each)
