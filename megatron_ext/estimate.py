"""`megatron-ext estimate`: what a training run would take, from the flags of `pretrain_hybrid.py` alone."""

import argparse
import json
import os
from typing import TYPE_CHECKING, Any

from megatron_ext.errors import ConfigError
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.training_cost import (
    GPUS,
    Layout,
    TeacherSetup,
    forward_flops_per_token,
    memory,
    step_seconds,
    training_flops_per_token,
)

if TYPE_CHECKING:
    from megatron_ext.training.job import RunConfig

DAY = 86400.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own flags; every other one is a flag of `pretrain_hybrid.py`."""
    parser.epilog = "All other flags are those of pretrain_hybrid.py: --preset NAME, --seq-length 4096, --bf16, ..."
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs in all")
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="kind of GPU. Default: %(default)s.")
    efficiency = "share of the matrix units' peak that computing reaches, communication apart. Default: %(default)s."
    parser.add_argument("--efficiency", type=float, default=0.45, help=efficiency)
    parser.add_argument("--dollars-per-gpu-hour", type=float, default=2.5, help="price. Default: %(default)s.")
    teacher = "distil from this preset or checkpoint directory: its memory and forward pass are added"
    parser.add_argument("--teacher", metavar="NAME_OR_DIRECTORY", help=teacher)
    parser.add_argument("--json", action="store_true", help="one JSON object")


def main(args: argparse.Namespace) -> None:
    """Estimate and print.

    Raises:
        ConfigError: A wrong flag, or GPUs that the layout does not divide.
    """
    if args.gpus < 1 or not 0 < args.efficiency <= 1:
        raise ConfigError("--gpus or --efficiency", got=f"{args.gpus}, {args.efficiency}", legal="at least 1; up to 1")
    from megatron_ext.families.language_model import architecture_of
    from megatron_ext.training.command_line import parse_command_line
    from megatron_ext.training.job import Job

    os.environ["WORLD_SIZE"] = str(args.gpus)
    started = parse_command_line(Job("estimate"), ["--dry-run", *args.megatron_flags])
    teacher = None if args.teacher is None else architecture_of(args.teacher)[0]
    found = estimate(started, teacher, args.gpu, args.efficiency, args.dollars_per_gpu_hour)
    print(json.dumps(found, indent=2) if args.json else table(found))


def estimate(
    started: "RunConfig", teacher: Architecture | None, gpu: str, efficiency: float, dollars_per_gpu_hour: float
) -> dict[str, Any]:
    """All figures of a validated command line, and what they assume.

    Args:
        started: The command line.
        teacher: The model that is distilled from, if any.
        gpu: A name of `training_cost.GPUS`.
        efficiency: Share of the peak that computing reaches.
        dollars_per_gpu_hour: Price.
    """
    architecture, layout, kind = started.architecture, Layout.from_args(started.args), GPUS[gpu]
    parts = memory(architecture, layout, None if teacher is None else TeacherSetup(teacher))
    seconds = step_seconds(architecture, layout, kind, efficiency, teacher)
    step = sum(seconds.values())
    flops = training_flops_per_token(architecture, layout.seq_length)
    if teacher is not None:
        flops += forward_flops_per_token(teacher, layout.seq_length)
    steps = started.args.train_iters or 0
    price = layout.gpus / 3600 * dollars_per_gpu_hour
    return {
        "model": started.model_source,
        "parameters": architecture.num_parameters(),
        "active_parameters": architecture.num_active_parameters(),
        "flops_per_token": flops,
        "memory_bytes": parts,
        "fits": sum(parts.values()) <= kind.memory,
        "step_seconds": seconds,
        "tokens_per_step": layout.tokens,
        "tokens_per_second": layout.tokens / step,
        "mfu": layout.tokens * flops / (step * layout.gpus * kind.flops),
        "steps": steps,
        "days": steps * step / DAY,
        "dollars": steps * step * price,
        "dollars_per_billion_tokens": 1e9 / layout.tokens * step * price,
        "assumed": {
            "gpus": layout.gpus, "gpu": gpu, "peak_tflops": kind.flops / 1e12, "memory_gb": kind.memory / 1e9,
            "efficiency": efficiency, "link_gbs": kind.link / 1e9, "network_gbs": kind.network / 1e9,
            "dollars_per_gpu_hour": dollars_per_gpu_hour,
        },
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """The figures as text of up to 120 columns."""
    from rich.console import Console
    from rich.table import Table

    from megatron_ext.training.dry_run import shown

    assumed, seconds = found["assumed"], found["step_seconds"]
    step = sum(seconds.values())
    causes = ", ".join(f"{name} {value:.3f}" for name, value in seconds.items() if value)
    active = found["active_parameters"]
    each = f", of which a token uses {active:,}" if active != found["parameters"] else ""
    rows = {
        "model": found["model"],
        "parameters": f"{found['parameters']:,}{each}",
        "memory per GPU": f"{shown(found['memory_bytes'])}; {'fits' if found['fits'] else 'does NOT fit'}",
        "operations": f"{found['flops_per_token'] / 1e9:.2f} GFLOP per token",
        "step": f"{step:.3f} s for {found['tokens_per_step']:,} tokens: {causes}",
        "speed": f"{found['tokens_per_second']:,.0f} tokens/s, {found['mfu']:.1%} of the peak",
        "price": f"{found['dollars_per_billion_tokens']:,.0f} dollars per billion tokens",
    }
    if found["steps"]:
        whole = found["steps"] * found["tokens_per_step"]
        rows["in all"] = f"{whole / 1e9:,.2f}B tokens: {found['days']:,.2f} days, {found['dollars']:,.0f} dollars"
    rows["assumed"] = (
        f"{assumed['gpus']} x {assumed['gpu']} ({assumed['peak_tflops']:,.0f} TFLOP/s, {assumed['memory_gb']:.0f} GB, "
        f"{assumed['link_gbs']:.0f} GB/s in a node, {assumed['network_gbs']:.0f} between), computing at "
        f"{assumed['efficiency']:.0%} of the peak, {assumed['dollars_per_gpu_hour']} dollars per GPU hour"
    )
    shape = Table(title="an estimate on paper; nothing is started, nothing written", show_header=False)
    shape.add_column(style="bold")
    shape.add_column(overflow="fold")
    for name, value in rows.items():
        shape.add_row(name, value)
    console = Console(width=120)
    with console.capture() as text:
        console.print(shape)
    return text.get().rstrip()
