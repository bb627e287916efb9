"""The fused distillation loss against the plain method: time and peak memory, loss and gradients.

    python benchmarks/kd_loss.py [--tokens 8192 --vocabulary 128256 --hidden 4096]

Forward KL at temperature 1, from hidden states and output weights of student and teacher to the gradients of the
student's. Plain: two matrix products, fp32 log-softmaxes, `kl_div`, autograd. Liger-Kernel's fused JSD (beta 0 is the
forward KL) joins where it is installed, on a GPU. Each case runs in processes of its own, in turns; the time is the
median over all of them. The peak is what is allocated beyond the inputs, the gradients included.
On a GPU bf16 and 8,192 tokens x 128,256 words x hidden 4,096; on a CPU fp32 and a size that fits.
"""

import argparse
import importlib.util
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import machine
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

SIZES = {"cuda": (8192, 128256, 4096), "cpu": (4096, 32000, 512)}
Case = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def plain(x: Tensor, w: Tensor, xt: Tensor, wt: Tensor) -> Tensor:
    """As it is usually written."""
    with torch.no_grad():
        log_q = log_softmax((xt @ wt.T).float(), dim=-1)
    log_p = log_softmax((x @ w.T).float(), dim=-1)
    return kl_div(log_p, log_q, reduction="sum", log_target=True)


def ours(x: Tensor, w: Tensor, xt: Tensor, wt: Tensor) -> Tensor:
    """`distillation_losses`."""
    from megatron_ext.distillation.losses import Head, distillation_losses
    from megatron_ext.distillation.objective import Objective
    from megatron_ext.models.vocabulary import Vocabulary

    labels = torch.zeros(len(x), 1, dtype=torch.long, device=x.device)
    student, teacher = Head(x.unsqueeze(1), w), Head(xt.unsqueeze(1), wt)
    return distillation_losses(
        student, teacher, labels, torch.ones_like(labels).float(), Objective(), Vocabulary(len(w), len(w))
    ).total


def liger(x: Tensor, w: Tensor, xt: Tensor, wt: Tensor) -> Tensor:
    """Liger-Kernel's."""
    from liger_kernel.transformers import LigerFusedLinearJSD  # pyright: ignore[reportMissingImports]

    return LigerFusedLinearJSD(jsd_beta=0.0, temperature=1.0)(x, w, xt, wt)


def measure(name: str, size: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    """Times of each repeat after a first one, seconds, and the peak beyond the inputs, bytes."""
    case: Case = {"plain": plain, "ours": ours, "liger": liger}[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, vocabulary, hidden = size
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    x, xt = (torch.randn(tokens, hidden, dtype=dtype, device=device) for _ in range(2))
    w, wt = (torch.randn(vocabulary, hidden, dtype=dtype, device=device) / hidden**0.5 for _ in range(2))
    small = slice(0, 2)
    case(x[small], w.requires_grad_(), xt[small], wt).backward()  # what is set up once is no cost of the loss
    w.grad = None
    x.requires_grad_()
    before = torch.cuda.memory_allocated() if device == "cuda" else _resident()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, loss = [], 0.0
    for _ in range(repeats + 1):
        x.grad = w.grad = None
        _wait(device)
        start = time.perf_counter()
        value = case(x, w, xt, wt)
        value.backward()
        _wait(device)
        seconds.append(time.perf_counter() - start)
        loss = float(value.detach())
    peak = (torch.cuda.max_memory_allocated() if device == "cuda" else machine.peak_memory()) - before
    return {"seconds": seconds[1:], "peak": peak, "loss": loss}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in zip(("tokens", "vocabulary", "hidden"), SIZES[device], strict=True):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    size = args.tokens, args.vocabulary, args.hidden
    names = ["plain", "ours"]
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        names.append("liger")
    context = multiprocessing.get_context("spawn")
    found: dict[str, list[Any]] = {name: [] for name in names}
    for _ in range(args.processes):
        for name in names:
            with context.Pool(1) as process:
                found[name].append(process.apply(measure, (name, size, args.repeats)))
    cases = {
        name: {
            "seconds": statistics.median(s for run in runs for s in run["seconds"]),
            "peak_bytes": statistics.median(run["peak"] for run in runs),
            "loss": runs[0]["loss"],
        }
        for name, runs in found.items()
    }
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    report = {
        **machine.describe(), "device": where, "dtype": "bfloat16" if device == "cuda" else "float32",
        "tokens": args.tokens, "vocabulary": args.vocabulary, "hidden": args.hidden, "cases": cases, "runs": found,
        "gradients_bytes": (args.tokens + args.vocabulary) * args.hidden * (2 if device == "cuda" else 4),
    }  # fmt: skip
    base = cases["plain"]
    rows = [
        f"| {name} | {case['seconds'] * 1e3:,.0f} | {case['seconds'] / base['seconds']:.2f} "
        f"| {case['peak_bytes'] / 1e6:,.0f} | {case['peak_bytes'] / base['peak_bytes']:.3f} | {case['loss']:.6g} |"
        for name, case in cases.items()
    ]
    text = (
        f"Distillation loss and gradients, {args.tokens:,} tokens x {args.vocabulary:,} words x hidden "
        f"{args.hidden:,}, {report['dtype']}, {where} ({report['machine']}); medians.\n\n"
        "| method | ms | of plain | peak MB beyond the inputs | of plain | loss |\n|---|---|---|---|---|---|\n"
        + "\n".join(rows)
    )
    machine.write(report, f"kd_loss_{device}", text)


if __name__ == "__main__":
    main()
