"""Images per second of mambavision_tiny beside timm's swin_tiny and convnext_tiny, and of the selective scan's forms.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/vision_speed.py [--out DIR]

Random weights, 224 x 224 pixels, in turns, medians: inference and a forward with its backward. On a GPU in bf16 with
channels last, 128 images at once, by the device's clock; on a CPU in float32, one thread, by CPU time, which equals
wall time on an idle machine. The scan has the sizes of mambavision_tiny's third stage: against the recurrence as it is
defined, and on a GPU against mamba-ssm's where it is installed. Writes results/vision_speed_{cpu,cuda}.{json,md}.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from machine import describe, write
from torch import Tensor

import megatron_ext.vision.timm_models  # noqa: F401  timm knows ours from here on
from megatron_ext.ops import dispatch
from megatron_ext.ops.selective_scan import naive

OURS = "mambavision_tiny"
MODELS = (OURS, "swin_tiny_patch4_window7_224", "convnext_tiny")
PASSES = ("inference", "training")
WINDOWS, TOKENS, CHANNELS, STATE = 1, 196, 160, 8  # of an image in the third stage


def clock(device: str) -> float:
    """Seconds, when all that was started is done."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def in_turns(cases: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each case, round by round; two rounds before them do not count."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 2):
        for name, case in cases.items():
            begun = clock(device)
            case()
            if number > 1:
                times[name].append(clock(device) - begun)
    return times


def models(batch: int, device: str, what: str) -> dict[str, Callable[[], object]]:
    """A forward pass of each model, for training with its backward."""
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    images = torch.randn(batch, 3, 224, 224, device=device, dtype=kind)
    if device == "cuda":
        images = images.contiguous(memory_format=torch.channels_last)

    def case(name: str) -> Callable[[], object]:
        model: Any = timm.create_model(name).to(device, kind)
        if device == "cuda":
            model = model.to(memory_format=torch.channels_last)
        if what == "inference":
            model.eval()
            return torch.inference_mode()(lambda: model(images))

        def step() -> None:
            model(images).float().logsumexp(-1).sum().backward()
            model.zero_grad()

        return step

    return {name: case(name) for name in MODELS}


def scans(batch: int, device: str, what: str) -> tuple[dict[str, Callable[[], object]], str | None]:
    """The scan in each form that runs here, and why mamba-ssm's does not."""
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(kind)

    x, dt = normal(batch * WINDOWS, TOKENS, CHANNELS), normal(batch * WINDOWS, TOKENS, CHANNELS)
    B, C = normal(batch * WINDOWS, TOKENS, STATE), normal(batch * WINDOWS, TOKENS, STATE)
    A = -torch.arange(1.0, STATE + 1, device=device).expand(CHANNELS, -1).contiguous()
    leaves, skip = [x, dt, A, B, C], torch.ones(CHANNELS, device=device)

    def case(scan: Callable[..., Any], given: list[Tensor]) -> Callable[[], object]:
        if what == "inference":
            return torch.inference_mode()(lambda: scan(*given))
        own = [t.detach().clone().requires_grad_() for t in given]
        return lambda: torch.autograd.grad(scan(*own).float().sum(), own)

    def ours(scan: Callable[..., Any]) -> Callable[..., Tensor]:
        return lambda x, dt, A, B, C: scan(x, dt, A, B, C, skip, dt_softplus=True)[0]

    fast = dispatch.backend(x=x, state=STATE)
    found = {fast.name: case(ours(fast.selective_scan), leaves), "recurrence": case(ours(naive.selective_scan), leaves)}
    if device != "cuda" or importlib.util.find_spec("selective_scan_cuda") is None:
        return found, "no GPU" if device != "cuda" else "mamba-ssm's selective_scan_cuda is not installed"
    from mamba_ssm.ops.selective_scan_interface import (  # pyright: ignore[reportMissingImports]
        selective_scan_fn,
    )

    def theirs(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return selective_scan_fn(x, dt, A, B, C, skip, delta_softplus=True)

    turned = [x.mT.contiguous(), dt.mT.contiguous(), A, B.mT.contiguous(), C.mT.contiguous()]
    return found | {"mamba_ssm": case(theirs, turned)}, None


def compared(
    cases: dict[str, Callable[[], object]], first: str, count: int, rounds: int, device: str
) -> dict[str, Any]:
    """Of each case images per second, the slowest and the fastest round's, and how much faster the first one is."""
    times = in_turns(cases, rounds, device)
    medians = {name: statistics.median(own) for name, own in times.items()}
    return {
        "images_per_second": {name: count / median for name, median in medians.items()},
        "spread": {name: [count / max(own), count / min(own)] for name, own in times.items()},
        "ratio": {name: median / medians[first] for name, median in medians.items() if name != first},
    }


def markdown(report: dict[str, Any]) -> str:
    """Two tables."""
    lines = [
        f"Images per second, median of {report['rounds']} rounds (slowest to fastest), {report['batch']} at once, "
        f"{report['dtype']}, {report['device'] if report['device'] != 'CPU' else report['machine'] + ', one thread'}.",
        "",
    ]
    for name, first in (("models", OURS), ("scan", report["fast"])):
        lines += [f"| {name} | inference | {first} over it | training | {first} over it |", "|---|---:|---:|---:|---:|"]
        for case in report[name]["inference"]["images_per_second"]:
            cells = []
            for what in PASSES:
                found = report[name][what]
                low, high = found["spread"][case]
                cells.append(f"{found['images_per_second'][case]:,.1f} ({low:,.1f} to {high:,.1f})")
                cells.append("" if case == first else f"{found['ratio'][case]:.2f}x")
            lines.append(f"| {case} | " + " | ".join(cells) + " |")
        lines.append("")
    if report["mamba_ssm_missing"]:
        lines.append(f"mamba-ssm's scan: not measured: {report['mamba_ssm_missing']}.")
    return "\n".join(lines).rstrip()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results; by default benchmarks/results")
    parser.add_argument("--batch", type=int, help="images at once; by default 128 on a GPU, 4 on a CPU")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = arguments.batch or (128 if device == "cuda" else 4)
    if device == "cpu":
        torch.set_num_threads(1)
    report = describe() | {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU", "batch": batch,
        "dtype": "bfloat16" if device == "cuda" else "float32", "rounds": arguments.rounds,
        "timm": timm.__version__, "models": {}, "scan": {},
    }  # fmt: skip
    for what in PASSES:
        report["models"][what] = compared(models(batch, device, what), OURS, batch, arguments.rounds, device)
        cases, missing = scans(batch, device, what)
        report["fast"], report["mamba_ssm_missing"] = next(iter(cases)), missing
        report["scan"][what] = compared(cases, report["fast"], batch, arguments.rounds, device)
    write(report, f"vision_speed_{device}", markdown(report), arguments.out)


if __name__ == "__main__":
    main()
