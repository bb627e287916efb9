"""Pre-training a Transformer, a Mamba-2 model and a hybrid: tokens/s, TFLOP/s and MFU beside plain Megatron-Core.

    python benchmarks/pretrain.py [--steps 7] [--rounds 3] [--models Transformer Mamba-2 hybrid]

1.2 to 1.5B parameters on one GPU in bf16, tiny sizes on a CPU in fp32. Each run is a process of its own that trains
through `pretrain_hybrid.py`'s loop; ours and the peer take turns, and each figure is the median over the steps of all
rounds after two of warm-up. The peer is Megatron-Core with its own kernels: of a Transformer a `GPTModel` of its local
modules; of a model with Mamba-2 layers the same `HybridModel` with mamba-ssm's kernels (`peers.py`), the other layers
on whatever both find, Transformer Engine or plain torch. On a CPU Megatron's Mamba layer cannot run.
Model FLOPs utilisation is against the 989 TFLOP/s that an H100 and an H200 have on paper.
Writes results/pretrain_cpu.json or pretrain_cuda.json, and .md.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import torch
from peak import PeakMeter

from megatron_ext.platform.device import device_type

WARM_UP = 2
PAPER_FLOPS = 989e12  # of an H100 or H200, dense bf16
DEVICE = device_type()
PATTERNS = {
    "cpu": {"Transformer": "*-" * 4, "Mamba-2": "M" * 8, "hybrid": "M-M-*-M-"},
    "cuda": {"Transformer": "*-" * 16, "Mamba-2": "M" * 28, "hybrid": "M-M-M-*-M-M-M-M-M-*-M-M-M-M-"},
}
SIZES = {
    "cpu": [
        "--hidden-size", "256", "--ffn-hidden-size", "768", "--num-attention-heads", "8", "--num-query-groups", "2",
        "--kv-channels", "32", "--mamba-num-heads", "16", "--mamba-head-dim", "32", "--mamba-state-dim", "32",
        "--mamba-num-groups", "2", "--vocab-size", "4095", "--seq-length", "512", "--max-position-embeddings", "512",
        "--micro-batch-size", "2", "--global-batch-size", "2",
    ],
    "cuda": [
        "--hidden-size", "2048", "--ffn-hidden-size", "5632", "--num-attention-heads", "16", "--num-query-groups", "8",
        "--kv-channels", "128", "--mamba-num-heads", "64", "--mamba-head-dim", "64", "--mamba-state-dim", "128",
        "--mamba-num-groups", "8", "--vocab-size", "31999", "--seq-length", "4096", "--max-position-embeddings", "4096",
        "--micro-batch-size", "4", "--global-batch-size", "4", "--bf16",
    ],
}  # fmt: skip
COMMON = [
    "--group-query-attention", "--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear", "--lr", "1e-4",
    "--position-embedding-type", "rope", "--untie-embeddings-and-output-weights", "--mock-data", "--tokenizer-type",
    "NullTokenizer", "--eval-iters", "0",
]  # fmt: skip


def peer_of(model: str) -> tuple[list[str], str]:
    """What the peer is started with, and why there is none."""
    if model == "Transformer":
        return ["--transformer-impl", "local"], ""
    if DEVICE == "cpu":
        return [], "Megatron-Core's Mamba layer needs mamba-ssm, which needs a GPU"
    absent = [package for package in ("mamba_ssm", "causal_conv1d") if importlib.util.find_spec(package) is None]
    return ["--ext-ssm-backend", "mamba_ssm"], f"not installed: {', '.join(absent)}" if absent else ""


def child(out: Path, kind: str, meter: bool, flags: list[str]) -> None:
    """Train in this process; seconds of each step, parameters, operations per token and peak memory into `out`.

    The first rank writes; a step begins with its first forward pass.
    """
    from megatron_ext.training.command_line import parse_command_line
    from megatron_ext.training.job import Job

    started = parse_command_line(Job("pretrain"), flags)
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.core.utils import unwrap_model
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.global_vars import set_args

    from megatron_ext.checkpoint.gpt import to_args
    from megatron_ext.models.training_cost import training_flops_per_token
    from megatron_ext.training import loop
    from megatron_ext.training.step import language_modelling

    config = None
    if kind == "peer" and "--transformer-impl" in flags:
        own = to_args(started.architecture) | {"transformer_impl": "local"}
        args = Namespace(**vars(started.args) | own)
        set_args(args)
        config = gpt_config_from_args(args)
    begun: list[float] = []

    built, task = "", language_modelling(started.args)

    def timed(data: Any, model: Any) -> Any:
        nonlocal built
        built = type(unwrap_model(model)).__name__
        torch.cuda.synchronize()
        begun.append(time.perf_counter())
        return task.forward_step(data, model)

    if meter and DEVICE == "cpu":
        with PeakMeter() as counted:
            loop.train(started, replace(task, forward_step=timed), config=config)
        peak = counted.peak
    else:
        loop.train(started, replace(task, forward_step=timed), config=config)
        peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
    torch.cuda.synchronize()
    begun = [*begun[:: get_num_microbatches()], time.perf_counter()]
    seconds = [stop - start for start, stop in zip(begun[WARM_UP:], begun[WARM_UP + 1 : -1], strict=False)]
    found = {
        "model": built,
        "seconds": seconds,
        "parameters": started.architecture.num_parameters(),
        "flops_per_token": training_flops_per_token(started.architecture, started.args.seq_length),
        "tokens": started.args.global_batch_size * started.args.seq_length,
        "peak_bytes": peak,
    }
    if started.args.rank == 0:
        out.write_text(json.dumps(found))


def run_child(model: str, kind: str, steps: int, meter: bool = False) -> dict[str, Any]:
    """One run in a process of its own."""
    more = peer_of(model)[0] if kind == "peer" else ["--ext-ssm-backend", "torch" if DEVICE == "cpu" else "triton"]
    flags = [f"--hybrid-layer-pattern={PATTERNS[DEVICE][model]}", *SIZES[DEVICE], *COMMON, *more]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, __file__, "--child", str(out), kind, str(int(meter)), *flags]
        command += ["--train-iters", str(steps + WARM_UP + 1)]
        environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-4000:])
        return json.loads(out.read_text())


def peak_flops() -> float:
    """Operations a second of a large matrix product here, on a CPU in fp32, on a GPU in bf16; the best of ten."""
    size, kind = (8192, torch.bfloat16) if DEVICE == "cuda" else (1024, torch.float32)
    a = torch.randn(size, size, device=DEVICE, dtype=kind)
    best = float("inf")
    for _ in range(10):
        begun = time.perf_counter()
        torch.mm(a, a)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def measure(model: str, steps: int, rounds: int) -> dict[str, Any]:
    """Ours and the peer in turns."""
    missing = peer_of(model)[1]
    kinds = ["ours"] if missing else ["ours", "peer"]
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind in list(kinds):
            try:
                runs[kind].append(run_child(model, kind, steps))
            except RuntimeError as error:
                if kind == "ours":
                    raise
                missing = f"failed: {str(error)[-500:]}"
                kinds.remove(kind)
    found: dict[str, Any] = {"pattern": PATTERNS[DEVICE][model], "peer_missing": missing}
    for kind in kinds:
        first = runs[kind][0]
        step = statistics.median(second for each in runs[kind] for second in each["seconds"])
        found["parameters"] = first["parameters"]
        found[kind] = {
            "model": first["model"], "step_seconds": step, "tokens_per_second": first["tokens"] / step,
            "tflops": first["tokens"] * first["flops_per_token"] / step / 1e12,
            "mfu": first["tokens"] * first["flops_per_token"] / step / PAPER_FLOPS,
            "peak_bytes": first["peak_bytes"] or run_child(model, kind, 1, meter=True)["peak_bytes"],
        }  # fmt: skip
    if not missing:
        found["ratio"] = found["peer"]["step_seconds"] / found["ours"]["step_seconds"]
    return found


def main() -> None:
    """Measure, print, write."""
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), sys.argv[3], sys.argv[4] == "1", sys.argv[5:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=list(PATTERNS[DEVICE]), default=list(PATTERNS[DEVICE]))
    parser.add_argument("--out", type=Path, help="folder of the results")
    args = parser.parse_args()
    peak, models = peak_flops(), {}
    for model in args.models:
        models[model] = measure(model, args.steps, args.rounds)
        write(args, peak, models)  # after each, because the next one may not come


def write(args: Namespace, peak: float, models: dict[str, dict[str, Any]]) -> None:
    """Write what has been measured so far."""
    report = {
        "what": "pre-training: plain Megatron-Core's time of a step over ours",
        "ratios": {model: found.get("ratio") for model, found in models.items()},
        **machine.describe(),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU",
        "peak_tflops": peak / 1e12,
        "sizes": {"steps": args.steps, "rounds": args.rounds, "flags": SIZES[DEVICE]},
        "models": models,
    }
    lines = ["| | parameters | | tokens/s | TFLOP/s | of a matrix product's | MFU | peak MB | over the peer |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for model, found in models.items():
        for kind in ("ours", "peer"):
            if kind not in found:
                lines.append(f"| {model} | | {kind} | not run: {found['peer_missing']} | | | | | |")
                continue
            own = found[kind]
            mfu = f"{own['mfu']:.1%}" if DEVICE == "cuda" else ""
            ratio = f"{found['ratio']:.2f}x" if kind == "ours" and "ratio" in found else ""
            share = f"{own['tflops'] * 1e12 / peak:.0%} | {mfu}"
            lines.append(
                f"| {model} | {found['parameters'] / 1e6:,.1f}M | {kind} | {own['tokens_per_second']:,.0f} | "
                f"{own['tflops']:.3g} | {share} | {own['peak_bytes'] / 1e6:,.0f} | {ratio} |"
            )
    machine.write(report, f"pretrain_{DEVICE}", "\n".join(lines), args.out)


if __name__ == "__main__":
    main()
