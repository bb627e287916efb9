"""The fused distillation loss against the plain method: time and peak memory, loss and gradients.

    python benchmarks/kd_loss.py [--tokens 8192 --vocabulary 128256 --hidden 4096] [--cases plain ours] [--out FOLDER]

Forward KL at temperature 1, from hidden states and output weights of student and teacher to the gradients of the
student's. Plain: two matrix products, fp32 log-softmaxes, `kl_div`, autograd. Ours: `distillation_losses` as the
programs call it, which compares logits by Triton's kernels on a GPU (the result names its choice); there in torch, too.
Liger-Kernel's fused JSD (beta 0 is the forward KL) joins on a GPU where it is installed (`pip install liger-kernel`).
The gradient of the weights is added to an fp32 buffer, as in Megatron's data parallelism. The time is the median over
all repeats; the peak is what is allocated beyond the inputs and that buffer; the error of a gradient is relative to
the plain method in fp32 on the same inputs. On a CPU, where the peak is the process', each case runs in processes of
its own, in turns; on a GPU the cases of a round share one, until one of them fails, which is reported, and the others
go on in another.
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
from pathlib import Path
from typing import Any

import machine
import torch
from kd_cases import CASES, COMPARES, DEVICE, MEANS, Case, Weight, chosen, collect, ours, plain, weight_of
from peak import PeakMeter
from torch import Tensor

from megatron_ext.lm_head.fused_loss import Compare
from megatron_ext.lm_head.losses import loss_in_torch
from megatron_ext.lm_head.objective import Objective
from megatron_ext.lm_head.vocab_parallel import VocabParallel
from megatron_ext.models.loss_buffers import CHUNK

SIZES = {"cuda": (8192, 128256, 4096), "cpu": (4096, 32000, 512)}
LARGE = (16, 128256, 1024)
ROWS = 1024  # tokens at a time where gradients are made in fp32
PATIENCE = 900  # seconds: a process that was killed never answers
PROCESSES, REPEATS = {"cuda": 1, "cpu": 3}, {"cuda": 7, "cpu": 3}


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


def inputs(size: tuple[int, int, int]) -> tuple[Tensor, Weight, Tensor, Tensor]:
    """States and weights of a student and a teacher, made where they are used."""
    tokens, vocabulary, hidden = size
    how: dict[str, Any] = {"dtype": torch.bfloat16 if DEVICE == "cuda" else torch.float32, "device": DEVICE}
    torch.manual_seed(0)
    x, xt = (torch.randn(tokens, hidden, **how) for _ in range(2))
    w, wt = (torch.randn(vocabulary, hidden, **how).div_(hidden**0.5) for _ in range(2))
    return x.requires_grad_(), weight_of(w), xt, wt


def exact(given: tuple[Tensor, Weight, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Both gradients by the plain method in fp32, some tokens at a time."""
    x, w, xt, wt = (t.detach().float() for t in given)
    dx, dw = torch.empty_like(x), torch.zeros_like(w)
    for start in range(0, len(x), ROWS):
        rows = slice(start, start + ROWS)
        leaves = x[rows].requires_grad_(), w.requires_grad_()
        parts = torch.autograd.grad(plain(*leaves, xt[rows], wt), leaves)
        dx[rows] = parts[0]
        dw += parts[1]
    return dx, dw


def measure(
    name: str, given: tuple[Tensor, Weight, Tensor, Tensor], repeats: int, right: tuple[Tensor, Tensor] | None = None
) -> dict[str, Any]:
    """Seconds of each repeat after a first one, the peak beyond the inputs, and errors if the right ones are known."""
    case, small = CASES[name], slice(0, 2)
    x, w, xt, wt = given
    case(x[small], w, xt[small], wt).backward()  # what is set up once is no cost of the loss
    collect(w)
    x.grad = None
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if DEVICE == "cuda" else _resident()
    seconds, loss = [], 0.0
    for _ in range(repeats + 1):
        x.grad = None
        w.main_grad.zero_()
        w.grad_added_to_main_grad = False
        _wait()
        start = time.perf_counter()
        value = case(x, w, xt, wt)
        value.backward()
        collect(w)
        _wait()
        seconds.append(time.perf_counter() - start)
        loss = float(value.detach())
        del value
    peak = (torch.cuda.max_memory_allocated() if DEVICE == "cuda" else machine.peak_memory()) - before
    scale = len(x) if name in MEANS else 1
    found: dict[str, Any] = {"seconds": seconds[1:], "peak": peak, "loss": loss * scale}
    if right is not None and x.grad is not None:
        pairs = {"dx": (x.grad.float(), right[0]), "dw": (w.main_grad, right[1])}
        found["errors"] = {key: float((got * scale - want).norm() / want.norm()) for key, (got, want) in pairs.items()}
    x.grad = None
    if DEVICE == "cuda" and name in COMPARES:
        torch.cuda.empty_cache()
        found["chunk"] = measure_chunk(COMPARES[name](), len(w), 20)
    return found


def measure_all(names: list[str], size: tuple[int, int, int], repeats: int, check: bool) -> dict[str, Any]:
    """Of each case; one that fails is the last, for it may have broken the process."""
    given = inputs(size)
    found: dict[str, Any] = {}
    right = None
    for name in names:
        try:
            if check and right is None and DEVICE == "cuda":
                right = exact(given)
            found[name] = measure(name, given, repeats, right)
            if check and DEVICE == "cpu":  # after the peak has been read
                found[name] |= {"errors": measure(name, given, 0, exact(given))["errors"]}
        except Exception as error:  # one method's failure is a result of the benchmark
            found[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
            break
    return found


def measure_chunk(compare: Compare, vocabulary: int, repeats: int) -> dict[str, Any]:
    """The comparison of one chunk of logits alone, on a GPU: seconds, and bytes per second of what must be moved."""
    n = CHUNK["cuda"] // (4 * vocabulary)  # of both models, in 16 bits
    logits, target = (torch.randn(n, vocabulary, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    labels, mask = torch.zeros(n, dtype=torch.long, device="cuda"), torch.ones(n, device="cuda")
    seconds = []
    for _ in range(repeats + 2):
        _wait()
        start = time.perf_counter()
        compare(logits, target, labels, mask, Objective(), VocabParallel(vocabulary, vocabulary), True)
        _wait()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[2:])
    return {"tokens": n, "seconds": median, "bytes_per_second": 5 * logits.nbytes / median}


def measure_in_turns(names: list[str], size: tuple[int, int, int], processes: int, repeats: int) -> dict[str, Any]:
    """All results of each case; on a CPU each is of a process of its own."""
    context = multiprocessing.get_context("spawn")
    runs: dict[str, list[Any]] = {name: [] for name in names}
    for turn in range(processes):
        left = names
        while left:
            batch = left if DEVICE == "cuda" else left[:1]
            found = _attempt(context, measure_all, batch, size, repeats, turn == 0)
            if "error" in found:  # of the process
                found = {batch[0]: found}
            for name, run in found.items():
                runs[name].append(run)
            left = left[len(found) :]
    return runs


def _attempt(context: Any, function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """In a process of its own."""
    with context.Pool(1) as process:
        try:
            return process.apply_async(function, arguments).get(PATIENCE)
        except Exception as error:  # one method's failure is a result of the benchmark
            return {"error": f"{type(error).__name__}: {error}"[:500]}


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _case(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What is shown of a case: medians over its runs, or why one of them failed."""
    failed = [run["error"] for run in runs if "error" in run]
    if failed:
        return {"error": failed[0]}
    first = runs[0]
    return {
        "seconds": statistics.median(s for run in runs for s in run["seconds"]),
        "peak_bytes": statistics.median(run["peak"] for run in runs),
        **{key: first[key] for key in ("loss", "errors", "chunk") if key in first},
    }


def _lines(cases: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """A row of each case, and below the table the chunks alone."""
    rows, below = [], []
    for name, case in cases.items():
        if "error" in case:
            rows.append(f"| {name} | failed: {case['error']} | | | | | | |".replace("\n", " "))
            continue
        errors = [f"{case['errors'][key]:.1e}" for key in ("dx", "dw")] if "errors" in case else ["", ""]
        rows.append(
            f"| {name} | {case['seconds'] * 1e3:,.1f} | {case['seconds'] / base['seconds']:.2f} "
            f"| {case['peak_bytes'] / 1e6:,.0f} | {case['peak_bytes'] / base['peak_bytes']:.3f} | {case['loss']:.6g} "
            f"| {errors[0]} | {errors[1]} |"
        )
        if chunk := case.get("chunk"):
            below.append(
                f"\nOne chunk of {chunk['tokens']:,} tokens compared ({name}): {chunk['seconds'] * 1e3:.2f} ms, "
                f"{chunk['bytes_per_second'] / 1e12:.2f} TB/s."
            )
    return rows + below


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in zip(("tokens", "vocabulary", "hidden"), SIZES[DEVICE], strict=True):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--processes", type=int, default=PROCESSES[DEVICE], help="rounds")
    parser.add_argument("--repeats", type=int, default=REPEATS[DEVICE], help="of a case in a round")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="all that can run here by default")
    parser.add_argument("--out", type=Path, help="folder of the results")
    args = parser.parse_args()
    names = args.cases or ["plain", "ours"]
    if DEVICE == "cuda" and not args.cases:
        names += ["ours in torch", "liger"]
    absent = [name for name in names if name == "liger" and importlib.util.find_spec("liger_kernel") is None]
    names = [name for name in names if name not in absent]
    size = args.tokens, args.vocabulary, args.hidden
    runs = measure_in_turns(names, size, args.processes, args.repeats)
    cases, large = {name: _case(runs[name]) for name in names}, {}
    cases |= {name: {"error": "not installed: liger-kernel"} for name in absent}
    if DEVICE == "cpu":
        context = multiprocessing.get_context("spawn")
        large = {name: _attempt(context, measure_large, name, LARGE) for name in names}
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    report = {
        **machine.describe(), "device": where, "dtype": "bfloat16" if DEVICE == "cuda" else "float32",
        "tokens": args.tokens, "vocabulary": args.vocabulary, "hidden": args.hidden, "compare": chosen().__name__,
        "cases": cases, "runs": runs, "large": {"size": LARGE, "dtype": "bfloat16", **large},
        "gradients_bytes": args.tokens * args.hidden * (2 if DEVICE == "cuda" else 4),
    }  # fmt: skip
    unknown = {"seconds": float("nan"), "peak_bytes": float("nan")}
    base = unknown | {key: value for key, value in cases.get("plain", {}).items() if key in unknown}
    rows = _lines(cases, base)
    sizes = f"{LARGE[0]} tokens x {LARGE[1]:,} words x hidden {LARGE[2]:,}, bf16"
    rows += [
        f"\n{sizes} ({name}): {case['peak'] / 1e6:,.0f} MB of tensors at most, {case['held'] / 1e6:,.1f} MB between "
        "the forward and the backward pass."
        for name, case in large.items()
        if "error" not in case
    ]
    text = (
        f"Distillation loss and gradients, {args.tokens:,} tokens x {args.vocabulary:,} words x hidden "
        f"{args.hidden:,}, {report['dtype']}, {where} ({report['machine']}); medians; ours compares by "
        f"`{report['compare']}`.\n\n"
        "| method | ms | of plain | peak MB beyond the inputs | of plain | loss | error of dX | of dW |\n"
        "|---|---|---|---|---|---|---|---|\n" + "\n".join(rows)
    )
    machine.write(report, f"kd_loss_{DEVICE}", text, args.out)


if __name__ == "__main__":
    main()
