"""The core of a Mamba-2 mixer on a GPU, forward and backward: ours against mamba-ssm's fused function.

    python benchmarks/ssm_gpu.py [--sizes full batch tp8 context] [--norm without with]

The core is all between the two projections: convolution, scan, gate (`mamba_split_conv1d_scan_combined`, without norm,
as Megatron calls it; with the norm by the same function, as our layers have it), in bf16 with A, D and the bias of the
step sizes in fp32. Ours in Triton, ours in plain torch, and mamba-ssm's where it is installed (`peers.py`).

Times are those of a replayed CUDA graph, so that no launch is waited for, in turns, medians; beside them the time of
the same step started kernel by kernel from Python, with many steps under way. The error of y and of each gradient is
relative to float64 on the same inputs, in norm (plain torch's scan in float64, which the tests hold against the
recurrence); that of the projection's gradient is told for each of its parts. Kernels of ours by time.
Writes results/ssm_gpu.json and ssm_gpu_norm.json, and .md; without a GPU it says so, writes nothing and ends with
status 1.
"""

import argparse
import importlib.metadata
import importlib.util
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import machine
import torch
from torch import Tensor
from triton.runtime import driver
from triton.testing import do_bench

from megatron_ext.ops import mamba_ssm_api
from megatron_ext.ops.dispatch import set_backend
from megatron_ext.ops.mamba_mixer.projection import Projection

NAMES = ("zxbcdt", "conv_weight", "conv_bias", "dt_bias", "A", "D")
HEAD_DIM, STATE = 64, 128
# Milliseconds for which Triton warms up and times a configuration, of either package; by default five times as many.
CHOOSING = {"warmup": 5, "rep": 20}
QUEUED = 5  # steps under way at once where they are started one by one
Inputs = dict[str, Tensor]
Case = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Size:
    """What a rank has of a layer of an 8B hybrid model (128 heads in 8 groups)."""

    batch: int
    tokens: int
    heads: int
    groups: int

    @property
    def projection(self) -> Projection:
        return Projection(self.heads, HEAD_DIM, self.groups)


SIZES = {
    "full": Size(1, 8192, 128, 8),
    "batch": Size(4, 4096, 128, 8),
    "tp8": Size(1, 8192, 16, 1),
    "context": Size(1, 131072, 4, 1),  # tensor parallel 4, context parallel 8
}


def inputs(size: Size, norm: bool, device: str) -> Inputs:
    """Random inputs as a trained layer has them; those in bf16 are rounded."""
    inner = size.heads * HEAD_DIM
    conv = inner + 2 * size.groups * STATE
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    given = {
        "zxbcdt": normal(size.batch, size.tokens, inner + conv + size.heads).bfloat16(),
        "conv_weight": (normal(conv, 4) / 2).bfloat16(),
        "conv_bias": (normal(conv) / 10).bfloat16(),
        "dt_bias": torch.empty(size.heads, device=device).uniform_(-4.5, -2.0, generator=generator),
        "A": -torch.empty(size.heads, device=device).uniform_(1, 16, generator=generator),
        "D": torch.ones(size.heads, device=device),
    }
    if norm:
        given["norm_weight"] = torch.ones(inner, device=device).bfloat16()
    return given


def call(function: Callable[..., Any], size: Size, t: Inputs) -> Tensor:
    """The fused function of either package."""
    norm = {"rmsnorm_weight": t["norm_weight"], "norm_before_gate": False} if "norm_weight" in t else {}
    return function(*(t[name] for name in NAMES), 256, headdim=HEAD_DIM, ngroups=size.groups, **norm)


def cases(size: Size) -> tuple[dict[str, Case], dict[str, str]]:
    """What can run here, and what is missing and why."""

    def ours(backend: str) -> Case:
        def run(t: Inputs) -> Tensor:
            set_backend(backend)
            return call(mamba_ssm_api.mamba_split_conv1d_scan_combined, size, t)

        return run

    found: dict[str, Case] = {"triton": ours("triton"), "torch": ours("torch")}
    absent = [name for name in ("mamba_ssm", "causal_conv1d") if importlib.util.find_spec(name) is None]
    if absent:
        return found, {"mamba_ssm": "not installed: " + ", ".join(absent)}

    def theirs(t: Inputs) -> Tensor:
        from mamba_ssm.ops.triton.ssd_combined import (  # pyright: ignore[reportMissingImports]
            mamba_split_conv1d_scan_combined,
        )

        return call(mamba_split_conv1d_scan_combined, size, t)

    return {**found, "mamba_ssm": theirs}, {}


def outcome(case: Case, given: Inputs, dy: Tensor) -> Inputs:
    """y and every gradient."""
    leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
    y = case(leaves)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach(), **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}


def parts(found: Inputs, size: Size) -> Inputs:
    """The same with the projection's gradient taken apart."""
    z, xBC, dt = size.projection.parts(found["dzxbcdt"])
    x, B, C = size.projection.inputs(xBC)
    rest = {name: t for name, t in found.items() if name != "dzxbcdt"}
    return {**rest, "dz": z, "dx": x, "dB": B, "dC": C, "ddt": dt}


def graph_of(work: Callable[[], object]) -> Callable[[], None]:
    """What replays the work; it has run before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def clocked(work: Callable[[], object], times: int) -> float:
    """Seconds of each of so many runs, one after the other, by the device's clock."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        work()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3 / times


def kernels(case: Case, given: Inputs, dy: Tensor) -> dict[str, float]:
    """Microseconds of each kernel in one step, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        outcome(case, given, dy)
        torch.cuda.synchronize()
    times = {event.key: event.device_time_total for event in profile.key_averages() if event.device_time_total > 0}
    return dict(sorted(times.items(), key=lambda item: -item[1])[:20])


def measure(size: Size, norm: bool, repeats: int) -> dict[str, Any]:
    """Times, memory and errors of every case."""
    found, missing = cases(size)
    given = inputs(size, norm, "cuda")
    dy = torch.randn(size.batch, size.tokens, size.heads * HEAD_DIM, device="cuda").bfloat16()
    exact = parts(outcome(found["torch"], {name: t.double() for name, t in given.items()}, dy.double()), size)
    results: dict[str, dict[str, Any]] = {}
    replays: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {}
    for name, case in found.items():
        try:
            got = parts(outcome(case, given, dy), size)  # compiles
            errors = {key: float((got[key].double() - right).norm() / right.norm()) for key, right in exact.items()}
            del got
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            outcome(case, given, dy)
            leaves = {key: t.detach().requires_grad_() for key, t in given.items()}
            results[name] = {"errors": errors, "peak_bytes": torch.cuda.max_memory_allocated() - before}
            results[name]["started_seconds"] = clocked(lambda case=case: outcome(case, given, dy), QUEUED)
            replays[name] = (
                graph_of(lambda case=case, leaves=leaves: case(leaves)),
                graph_of(lambda case=case: outcome(case, given, dy)),
            )
        except Exception as error:  # whatever a peer or a compiler raises: the others are measured all the same
            missing[name] = f"{type(error).__name__}: {str(error)[:500]}"
            results.pop(name, None)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in results}
    for turn in range(repeats):
        for name in sorted(results, reverse=bool(turn % 2)):
            forward, step = (clocked(replay, QUEUED) for replay in replays[name])
            times[name].append((forward, step))
    for name, result in results.items():
        result["forward_seconds"] = statistics.median(forward for forward, _ in times[name])
        result["step_seconds"] = statistics.median(step for _, step in times[name])
        result["steps"] = [step for _, step in times[name]]
        if name != "torch":
            result["kernels_microseconds"] = kernels(found[name], given, dy)
    set_backend("auto")
    return {"size": asdict(size), "cases": results, "missing": missing}


def table(report: dict[str, Any]) -> str:
    """Ratios first; what is missing is said."""
    lines = [
        f"{report['what']}, bf16, heads of {HEAD_DIM}, state {STATE}, {report['device']}; medians of replayed graphs, "
        "in brackets started from Python.",
        "",
        "| | kernels | speed over mamba_ssm | forward ns/token | step ns/token | MB | error of y | worst gradient |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label, found in report["sizes"].items():
        size, base = found["size"], found["cases"].get("mamba_ssm")
        tokens = size["tokens"] * size["batch"]
        shape = f"{label}: {size['batch']} x {size['tokens']:,}, {size['heads']} heads, {size['groups']} groups"
        for name, case in found["cases"].items():
            keys = ("step_seconds", "started_seconds")
            over = "{:.2f} ({:.2f})".format(*(base[key] / case[key] for key in keys)) if base else "not measured"
            worst = max((key for key in case["errors"] if key != "y"), key=case["errors"].get)
            step, started = (f"{case[key] * 1e9 / tokens:,.1f}" for key in keys)
            lines.append(
                f"| {shape} | {name} | {over} | {case['forward_seconds'] * 1e9 / tokens:,.1f} | {step} ({started}) "
                f"| {case['peak_bytes'] / 1e6:,.0f} | {case['errors']['y']:.1e} | {worst} {case['errors'][worst]:.1e} |"
            )
        lines += [f"| {shape} | {name} | not measured: {why} | | | | | |" for name, why in found["missing"].items()]
    return "\n".join(lines)


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--norm", nargs="+", choices=("without", "with"), default=["without", "with"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="folder of the results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing is measured", file=sys.stderr)
        return 1
    driver.active.get_benchmarker = lambda: partial(do_bench, **CHOOSING)
    versions = {}
    for package in ("triton", "mamba_ssm", "causal_conv1d"):
        if importlib.util.find_spec(package) is not None:
            versions[package] = importlib.metadata.version(package)
    for norm in args.norm:
        report = {
            "what": "core of a Mamba-2 mixer, forward + backward" + (", with its norm" if norm == "with" else ""),
            **machine.describe(), "device": torch.cuda.get_device_name(), "kernels": versions, "sizes": {},
        }  # fmt: skip
        for label in args.sizes:
            report["sizes"][label] = measure(SIZES[label], norm == "with", args.repeats)
            torch.cuda.empty_cache()
            name = "ssm_gpu_norm" if norm == "with" else "ssm_gpu"
            machine.write(report, name, table(report), args.out)  # after each, because the next one may not come
    return 0


if __name__ == "__main__":
    sys.exit(main())
