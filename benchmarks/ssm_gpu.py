"""The core of a Mamba-2 mixer on a GPU, forward and backward: ours against mamba-ssm's fused function.

    python benchmarks/ssm_gpu.py [--norm] [--tokens 8192 --d-model 4096 --head-dim 64 --state 128 --groups 8]

The core is all between the two projections: convolution, scan, gate (`mamba_split_conv1d_scan_combined`, without norm,
as Megatron calls it; with `--norm` the norm too, by the same function, as our layers have it), in bf16 with A, D and
the bias of the step sizes in fp32. Ours in Triton with two sizes of a chunk, ours in plain torch, and mamba-ssm's where
it is installed, in turns; medians over the turns after a warm-up in which Triton chooses its configurations. The error
of y and of each gradient is relative to float64 on the same inputs, in norm (plain torch's scan in float64, which the
tests hold against the recurrence). Kernels of ours by time. Writes results/ssm_gpu.json (or ssm_gpu_norm.json) and .md;
without a GPU it says so, writes nothing and ends with status 1.
"""

import argparse
import importlib.metadata
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch
from torch import Tensor

from megatron_ext.ops import mamba_ssm_api
from megatron_ext.ops.dispatch import set_backend
from megatron_ext.ops.mamba_mixer.projection import Projection

NAMES = ("zxbcdt", "conv_weight", "conv_bias", "dt_bias", "A", "D")
Case = Callable[[dict[str, Tensor]], Tensor]


def inputs(args: argparse.Namespace) -> dict[str, Tensor]:
    """Random inputs as a trained layer has them, in float64; those in bf16 are rounded."""
    inner = 2 * args.d_model
    heads, conv = inner // args.head_dim, inner + 2 * args.groups * args.state
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    given = {
        "zxbcdt": normal(args.batch, args.tokens, inner + conv + heads).bfloat16(),
        "conv_weight": (normal(conv, 4) / 2).bfloat16(),
        "conv_bias": (normal(conv) / 10).bfloat16(),
        "dt_bias": torch.empty(heads).uniform_(-4.5, -2.0, generator=generator),
        "A": -torch.empty(heads).uniform_(1, 16, generator=generator),
        "D": torch.ones(heads),
    }
    if args.norm:
        given["norm_weight"] = torch.ones(inner).bfloat16()
    return {name: t.to(args.device) for name, t in given.items()}


def cases(args: argparse.Namespace) -> tuple[dict[str, Case], dict[str, str]]:
    """What can run here, and what is missing and why."""
    sizes = {"headdim": args.head_dim, "ngroups": args.groups}

    def called(function: Callable[..., Any], t: dict[str, Tensor]) -> Tensor:
        norm = {"rmsnorm_weight": t["norm_weight"], "norm_before_gate": False} if args.norm else {}
        return function(*(t[name] for name in NAMES), 256, **sizes, **norm)

    def ours(backend: str) -> Case:
        def run(t: dict[str, Tensor]) -> Tensor:
            set_backend(backend)
            return called(mamba_ssm_api.mamba_split_conv1d_scan_combined, t)

        return run

    def of_chunks(size: int) -> Case:
        def run(t: dict[str, Tensor]) -> Tensor:
            from megatron_ext.ops.mamba_mixer.triton import conv_scan_norm

            projection = Projection(t["A"].shape[0], args.head_dim, args.groups)
            more: dict[str, Any] = {"norm_weight": t.get("norm_weight"), "norm_before_gate": False, "chunk_size": size}
            return conv_scan_norm(*(t[name] for name in NAMES), projection=projection, **more)[0]

        return run

    found: dict[str, Case] = {"triton": ours("triton"), "triton, chunk 64": of_chunks(64), "torch": ours("torch")}
    missing = {}
    packages = [name for name in ("mamba_ssm", "causal_conv1d") if importlib.util.find_spec(name) is None]
    if packages:
        missing["mamba_ssm"] = "not installed: " + ", ".join(packages)
    else:

        def theirs(t: dict[str, Tensor]) -> Tensor:
            from mamba_ssm.ops.triton.ssd_combined import (  # pyright: ignore[reportMissingImports]
                mamba_split_conv1d_scan_combined,
            )

            return called(mamba_split_conv1d_scan_combined, t)

        found["mamba_ssm"] = theirs
    return found, missing


def outcome(case: Case, given: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """y and every gradient."""
    leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
    y = case(leaves)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach(), **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(case: Case, given: dict[str, Tensor], dy: Tensor, device: str) -> tuple[float, float]:
    """Wall time of a forward and of a whole step."""
    leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
    wait(device)
    start = time.perf_counter()
    y = case(leaves)
    wait(device)
    middle = time.perf_counter()
    y.backward(dy)
    wait(device)
    return middle - start, time.perf_counter() - start


def peak(case: Case, given: dict[str, Tensor], dy: Tensor) -> int:
    """Bytes allocated beyond the inputs, the gradients included."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outcome(case, given, dy)
    return torch.cuda.max_memory_allocated() - before


def kernels(case: Case, given: dict[str, Tensor], dy: Tensor) -> dict[str, float]:
    """Microseconds of each kernel in one step, the longest first."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        outcome(case, given, dy)
        torch.cuda.synchronize()
    times = {event.key: event.device_time_total for event in profile.key_averages() if event.device_time_total > 0}
    return dict(sorted(times.items(), key=lambda item: -item[1])[:20])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Times, memory and errors of every case."""
    found, missing = cases(args)
    given = inputs(args)
    inner = 2 * args.d_model
    dy = torch.randn(args.batch, args.tokens, inner, generator=torch.Generator().manual_seed(1)).bfloat16()
    dy = dy.to(args.device)
    for name, case in list(found.items()):
        try:
            for _ in range(3):
                seconds(case, given, dy, args.device)
        except Exception as error:  # whatever a peer or a compiler raises: the others are measured all the same
            missing[name] = f"{type(error).__name__}: {str(error)[:500]}"
            del found[name]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    for turn in range(args.repeats):
        for name in sorted(found, reverse=bool(turn % 2)):
            times[name].append(seconds(found[name], given, dy, args.device))
    set_backend("torch")
    exact = outcome(cases(args)[0]["torch"], {name: t.double() for name, t in given.items()}, dy.double())
    results: dict[str, Any] = {}
    for name, case in found.items():
        got = outcome(case, given, dy)
        errors = {key: float((got[key].double() - right).norm() / right.norm()) for key, right in exact.items()}
        del got
        results[name] = {
            "forward_seconds": statistics.median(forward for forward, _ in times[name]),
            "step_seconds": statistics.median(step for _, step in times[name]),
            "steps": [step for _, step in times[name]],
            "peak_bytes": peak(case, given, dy) if args.device == "cuda" else None,
            "errors": errors,
        }
    if args.device == "cuda" and "triton" in found:
        results["triton"]["kernels_microseconds"] = kernels(found["triton"], given, dy)
    set_backend("auto")
    return {"cases": results, "missing": missing}


def table(report: dict[str, Any]) -> str:
    """Ratios first; what is missing is said."""
    cases, tokens = report["cases"], report["sizes"]["tokens"] * report["sizes"]["batch"]
    base = cases.get("mamba_ssm")
    lines = [
        f"Core of a Mamba-2 mixer, forward + backward, bf16, {report['sizes']}, {report['device']}; medians.",
        "",
        "| kernels | speed over mamba_ssm | forward ns/token | step ns/token | peak MB | error of y | worst gradient |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, case in cases.items():
        ratio = f"{base['step_seconds'] / case['step_seconds']:.2f}" if base else "not measured"
        worst = max((key for key in case["errors"] if key != "y"), key=case["errors"].get)
        memory = "" if case["peak_bytes"] is None else f"{case['peak_bytes'] / 1e6:,.0f}"
        lines.append(
            f"| {name} | {ratio} | {case['forward_seconds'] * 1e9 / tokens:,.1f} "
            f"| {case['step_seconds'] * 1e9 / tokens:,.1f} | {memory} | {case['errors']['y']:.1e} "
            f"| {worst} {case['errors'][worst]:.1e} |"
        )
    lines += [f"\n{name}: not measured, {why}" for name, why in report["missing"].items()]
    return "\n".join(lines)


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"batch": 1, "tokens": 8192, "d_model": 4096, "head_dim": 64, "state": 128, "groups": 8}
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--norm", action="store_true", help="with the norm after the gate")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only to try the script out")
    parser.add_argument("--out", type=Path, help="folder of the results")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing is measured", file=sys.stderr)
        return 1
    where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    versions = {}
    for package in ("triton", "mamba_ssm", "causal_conv1d"):
        if importlib.util.find_spec(package) is not None:
            versions[package] = importlib.metadata.version(package)
    report = {
        "what": "core of a Mamba-2 mixer, forward + backward" + (", with its norm" if args.norm else ""),
        **machine.describe(), "device": where, "kernels": versions,
        "sizes": {name: getattr(args, name) for name in sizes}, **measure(args),
    }  # fmt: skip
    machine.write(report, "ssm_gpu_norm" if args.norm else "ssm_gpu", table(report), args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
