"""The fused distillation loss against the plain method: time and peak memory, loss and gradients.

    python benchmarks/kd_loss.py [--tokens 8192 --vocabulary 128256 --hidden 4096]

Forward KL at temperature 1, from hidden states and output weights of student and teacher to the gradients of the
student's. Plain: two matrix products, fp32 log-softmaxes, `kl_div`, autograd. Ours: `distillation_losses`, with logits
compared in torch, and on a GPU also by Triton's kernels. Liger-Kernel's fused JSD (beta 0 is the forward KL) joins on
a GPU where it is installed (`pip install liger-kernel`). Each case runs in processes of its own, in turns; the time is
the median over all of them. The gradient of the weights is added to an fp32 buffer, as in Megatron's data parallelism.
The peak is what is allocated beyond the inputs and that buffer. A case that fails is reported as failed, and the others
run on.
On a GPU bf16 and 8,192 tokens x 128,256 words x hidden 4,096; on a CPU fp32 and a size that fits, and of so large a
vocabulary in bf16 the bytes of all tensors (`peak.py`), which are the same on any machine. On a GPU one chunk of logits
is compared alone, too, which must read both models' logits twice and write the student's once.
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
from peak import PeakMeter
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from megatron_ext.lm_head.fused_loss import CHUNK, Compare, LMHead
from megatron_ext.lm_head.losses import distillation_losses, loss_in_torch
from megatron_ext.lm_head.objective import Objective
from megatron_ext.lm_head.vocab_parallel import VocabParallel

SIZES = {"cuda": (8192, 128256, 4096), "cpu": (4096, 32000, 512)}
LARGE = (16, 128256, 1024)
PATIENCE = 900  # seconds: a process that was killed never answers
Case = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def plain(x: Tensor, w: Tensor, xt: Tensor, wt: Tensor) -> Tensor:
    """As it is usually written."""
    with torch.no_grad():
        log_q = log_softmax((xt @ wt.T).float(), dim=-1)
    log_p = log_softmax((x @ w.T).float(), dim=-1)
    return kl_div(log_p, log_q, reduction="sum", log_target=True)


def ours(compare: Compare) -> Case:
    """`distillation_losses`, its logits compared like this."""

    def case(x: Tensor, w: Tensor, xt: Tensor, wt: Tensor) -> Tensor:
        labels = torch.zeros(len(x), 1, dtype=torch.long, device=x.device)
        student, teacher = LMHead(x.unsqueeze(1), w), LMHead(xt.unsqueeze(1), wt)
        mask, vocabulary = torch.ones_like(labels).float(), VocabParallel(len(w), len(w))
        return distillation_losses(student, teacher, labels, mask, Objective(), vocabulary, compare).total

    return case


def comparison(name: str) -> Compare:
    """Ours by name."""
    if name == "ours":
        return loss_in_torch
    from megatron_ext.lm_head import triton_kl

    return triton_kl.compare


def liger(x: Tensor, w: Tensor, xt: Tensor, wt: Tensor) -> Tensor:
    """Liger-Kernel's."""
    from liger_kernel.transformers import LigerFusedLinearJSD  # pyright: ignore[reportMissingImports]

    return LigerFusedLinearJSD(jsd_beta=0.0, temperature=1.0)(x, w, xt, wt)


class Weight(torch.nn.Parameter):
    """A weight of Megatron's data parallelism."""

    main_grad: Tensor
    grad_added_to_main_grad: bool


def weight_of(values: Tensor) -> Weight:
    """A weight whose gradient is collected in fp32."""
    weight = Weight(values)
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(values, dtype=torch.float32), False
    return weight


def collect(weight: Weight) -> None:
    """What Megatron's hook does when a gradient has arrived."""
    if weight.grad is not None and not weight.grad_added_to_main_grad:
        weight.main_grad.add_(weight.grad)
    weight.grad = None


def measure_large(name: str, size: tuple[int, int, int]) -> dict[str, Any]:
    """Bytes of tensors beyond inputs and gradient buffer, on a CPU: at the most, and between the two passes."""
    case: Case = plain if name == "plain" else ours(loss_in_torch)
    tokens, vocabulary, hidden = size
    with PeakMeter() as meter:
        x, xt = (torch.randn(tokens, hidden).bfloat16() for _ in range(2))
        w, wt = weight_of(torch.zeros(vocabulary, hidden, dtype=torch.bfloat16)), torch.zeros(vocabulary, hidden)
        wt, x = wt.bfloat16(), x.requires_grad_()
        before = meter.peak = meter.alive
        value = case(x, w, xt, wt)
        held = meter.alive - before
        value.backward()
        collect(w)
    return {"peak": meter.peak - before, "held": held}


def measure(name: str, size: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    """Times of each repeat after a first one, seconds, and the peak beyond the inputs, bytes."""
    case: Case = {"plain": plain, "liger": liger}.get(name) or ours(comparison(name))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, vocabulary, hidden = size
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    x, xt = (torch.randn(tokens, hidden, dtype=dtype, device=device) for _ in range(2))
    values, wt = (torch.randn(vocabulary, hidden, dtype=dtype, device=device) / hidden**0.5 for _ in range(2))
    w, small = weight_of(values), slice(0, 2)
    case(x[small], w, xt[small], wt).backward()  # what is set up once is no cost of the loss
    collect(w)
    x.requires_grad_()
    before = torch.cuda.memory_allocated() if device == "cuda" else _resident()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, loss = [], 0.0
    for _ in range(repeats + 1):
        x.grad = None
        _wait(device)
        start = time.perf_counter()
        value = case(x, w, xt, wt)
        value.backward()
        collect(w)
        _wait(device)
        seconds.append(time.perf_counter() - start)
        loss = float(value.detach())
    peak = (torch.cuda.max_memory_allocated() if device == "cuda" else machine.peak_memory()) - before
    return {"seconds": seconds[1:], "peak": peak, "loss": loss}


def measure_chunk(name: str, vocabulary: int, repeats: int) -> dict[str, Any]:
    """The comparison of one chunk of logits alone, on a GPU: seconds, and bytes per second of what must be moved."""
    compare, n = comparison(name), CHUNK["cuda"] // (4 * vocabulary)  # of both models, in 16 bits
    logits, target = (torch.randn(n, vocabulary, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    labels, mask = torch.zeros(n, dtype=torch.long, device="cuda"), torch.ones(n, device="cuda")
    seconds = []
    for _ in range(repeats + 2):
        _wait("cuda")
        start = time.perf_counter()
        compare(logits, target, labels, mask, Objective(), VocabParallel(vocabulary, vocabulary), True)
        _wait("cuda")
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[2:])
    return {"tokens": n, "seconds": median, "bytes_per_second": 5 * logits.nbytes / median}


def _attempt(context: Any, function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """In a process of its own."""
    with context.Pool(1) as process:
        try:
            return process.apply_async(function, arguments).get(PATIENCE)
        except Exception as error:  # one method's failure is a result of the benchmark
            return {"error": f"{type(error).__name__}: {error}"[:500]}


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
    if device == "cuda":
        names += ["triton"] + ["liger"] * (importlib.util.find_spec("liger_kernel") is not None)
    context = multiprocessing.get_context("spawn")
    found: dict[str, list[Any]] = {name: [] for name in names}
    for _ in range(args.processes):
        for name in names:
            found[name].append(_attempt(context, measure, name, size, args.repeats))
    failed = {name: runs for name, runs in found.items() if any("error" in run for run in runs)}
    cases = {
        name: {
            "seconds": statistics.median(s for run in runs for s in run["seconds"]),
            "peak_bytes": statistics.median(run["peak"] for run in runs),
            "loss": runs[0]["loss"],
        }
        for name, runs in found.items()
        if name not in failed
    }
    chunks, large = {}, {}
    if device == "cpu":
        large = {name: _attempt(context, measure_large, name, LARGE) for name in names}
    if device == "cuda":
        chunks = {name: _attempt(context, measure_chunk, name, args.vocabulary, 20) for name in ("ours", "triton")}
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    report = {
        **machine.describe(), "device": where, "dtype": "bfloat16" if device == "cuda" else "float32",
        "tokens": args.tokens, "vocabulary": args.vocabulary, "hidden": args.hidden, "cases": cases, "runs": found,
        "chunks": chunks, "large": {"size": LARGE, "dtype": "bfloat16", **large},
        "gradients_bytes": args.tokens * args.hidden * (2 if device == "cuda" else 4),
    }  # fmt: skip
    base = cases.get("plain", {"seconds": float("nan"), "peak_bytes": float("nan")})
    rows = [
        f"| {name} | {case['seconds'] * 1e3:,.0f} | {case['seconds'] / base['seconds']:.2f} "
        f"| {case['peak_bytes'] / 1e6:,.0f} | {case['peak_bytes'] / base['peak_bytes']:.3f} | {case['loss']:.6g} |"
        for name, case in cases.items()
    ]
    rows += [f"| {name} | failed: {runs[0].get('error', 'in one process')} | | | | |" for name, runs in failed.items()]
    rows += [
        f"\nOne chunk of {chunk['tokens']:,} tokens compared ({name}): {chunk['seconds'] * 1e3:.2f} ms, "
        f"{chunk['bytes_per_second'] / 1e12:.2f} TB/s."
        for name, chunk in chunks.items()
        if "error" not in chunk
    ]
    sizes = f"{LARGE[0]} tokens x {LARGE[1]:,} words x hidden {LARGE[2]:,}, bf16"
    rows += [
        f"\n{sizes} ({name}): {case['peak'] / 1e6:,.0f} MB of tensors at most, {case['held'] / 1e6:,.1f} MB between "
        "the forward and the backward pass."
        for name, case in large.items()
        if "error" not in case
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
