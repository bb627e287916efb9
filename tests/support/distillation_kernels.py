"""The Triton kernels of the distillation loss against the float64 oracle; a program, because of how they run on a CPU.

    TRITON_INTERPRET=1 python tests/support/distillation_kernels.py cpu
    python tests/support/distillation_kernels.py cuda

Triton's interpreter must be asked for before anything imports Triton. Prints a JSON object: for each case what is wrong
with it, or nothing.
"""

import json
import multiprocessing
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.lm_head import naive, triton_kl
from megatron_ext.lm_head.losses import LMHead, distillation_losses
from megatron_ext.lm_head.objective import Objective
from megatron_ext.lm_head.vocab_parallel import VocabParallel


@dataclass(frozen=True)
class Case:
    """Five tokens of two sequences each, unless `sequence` says otherwise.

    Attributes:
        tokens, columns: Entries of the vocabulary, without and with padding.
        sharp: Whole numbers as logits, some of them in the thousands.
        ranks: Over how many the vocabulary is split.
    """

    objective: Objective
    tokens: int = 11
    columns: int = 11
    sequence: int = 5
    sharp: bool = False
    dtype: torch.dtype = torch.float32
    ranks: int = 1


BOTH = {"kd_weight": 0.7, "ce_weight": 0.4}
CASES = {
    "forward": Case(Objective()),
    "reverse": Case(Objective("reverse-kl")),
    "forward, temperature and padding": Case(Objective(temperature=2.5, **BOTH), 9, 12),
    "reverse, temperature and padding": Case(Objective("reverse-kl", 0.7, **BOTH), 9, 12),
    "forward, padding": Case(Objective(**BOTH), 9, 12),
    "cross entropy alone": Case(Objective(temperature=2.0, kd_weight=0, ce_weight=1), 9, 12),
    "forward, more than one block": Case(Objective(**BOTH), 5000, 9001, sequence=1),
    "reverse, more than one block": Case(Objective("reverse-kl", 2.0, **BOTH), 9000, 9001, sequence=1),
    "forward, sharp": Case(Objective(temperature=2.0, **BOTH), 9, 12, sharp=True),
    "reverse, sharp": Case(Objective("reverse-kl", **BOTH), 9, 12, sharp=True),
    "forward, half precision": Case(Objective(**BOTH), 50, 50, dtype=torch.bfloat16),
    "forward, two ranks": Case(Objective(temperature=2.5, **BOTH), 13, 16, ranks=2),
    "reverse, two ranks": Case(Objective("reverse-kl", **BOTH), 16, 16, ranks=2),
    "forward, a rank of padding": Case(Objective(**BOTH), 7, 16, ranks=2),
}
MASK = torch.tensor([1.0, 0.0, 0.5, 1.0, 2.0, 1.0, 0.0, 1.0, 0.25, 1.0])


def inputs(case: Case) -> tuple[Tensor, ...]:
    """Hidden states and output weights of student and teacher, labels and mask, in float64."""
    generator = torch.Generator().manual_seed(3)
    shapes = (case.sequence, 2, 6), (case.columns, 6), (case.sequence, 2, 8), (case.columns, 8)
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    if case.sharp:
        values = [(3 * x).round() * (40 if x.dim() == 3 else 1) for x in values]
    labels = torch.randint(case.tokens, (case.sequence, 2), generator=generator)
    mask = MASK[: 2 * case.sequence].view(case.sequence, 2).double()
    return *(x.to(case.dtype).double() for x in values), labels, mask


def ours(case: Case, device: str, group: Any = None) -> tuple[Tensor, ...]:
    """`kd`, `ce`, total, and this rank's gradients of hidden states and weight."""
    *values, labels, mask = inputs(case)
    rank = dist.get_rank(group) if group is not None else 0
    rows = slice(rank * case.columns // case.ranks, (rank + 1) * case.columns // case.ranks)
    hidden, weight, other, other_weight = (x.to(device, case.dtype) for x in values)
    own = LMHead(hidden.requires_grad_(), weight[rows].clone().requires_grad_())
    vocabulary = VocabParallel(len(own.weight), case.tokens, group)
    teacher = LMHead(other, other_weight[rows].contiguous())
    losses = distillation_losses(
        own, teacher, labels.to(device), mask.float().to(device), case.objective, vocabulary, triton_kl.loss_in_triton
    )
    losses.total.backward()
    assert losses.finite.all()
    assert not own.hidden.grad[mask == 0].any(), "a token that does not count has a gradient"  # type: ignore[index]
    found = losses.kd, losses.ce, losses.total, own.hidden.grad, own.weight.grad
    return tuple(x.detach().cpu().double() for x in found)  # type: ignore[union-attr]


def check(case: Case, parts: list[tuple[Tensor, ...]]) -> None:
    hidden, weight, *teacher, labels, mask = inputs(case)
    own = hidden.requires_grad_(), weight.requires_grad_()
    total, kd, ce = naive.distillation_losses(own, (teacher[0], teacher[1]), labels, mask, case.objective, case.tokens)
    total.backward()
    half = case.dtype == torch.bfloat16
    for part in parts:
        for got, want in zip(part[:3], (kd, ce, total), strict=True):
            # Of logits in the thousands fp32 knows a ten-thousandth.
            torch.testing.assert_close(
                got, want.detach(), rtol=1e-2 if half else 1e-5, atol=2e-4 if case.sharp else 1e-5
            )
    gradients = sum(part[3] for part in parts), torch.cat([part[4] for part in parts])
    for got, want in zip(gradients, (hidden.grad, weight.grad), strict=True):
        assert want is not None
        if half:
            assert (got - want).norm() < 0.01 * want.norm()
        else:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * max(1.0, float(want.abs().max())))


def not_finite(device: str) -> None:
    """A teacher's logit that is no number is seen, and reaches no token that does not count."""
    for bad in (torch.nan, torch.inf):
        logits, target = (torch.randn(3, 9, device=device) for _ in range(2))
        target[1, 4] = bad
        labels, mask = torch.zeros(3, dtype=torch.long, device=device), torch.tensor([1.0, 0.0, 1.0], device=device)
        *_, finite = triton_kl.loss_in_triton(logits, target, labels, mask, Objective(), VocabParallel(9, 9), True)
        assert finite.tolist() == [True, False, True]
        assert logits.isfinite().all()


def far_rows(device: str) -> None:
    """Rows that begin beyond 2^31 elements."""
    n, v = 17_000, 131_072
    logits, target = (torch.randn(n, v, dtype=torch.bfloat16, device=device) for _ in range(2))
    labels, mask = torch.zeros(n, dtype=torch.long, device=device), torch.ones(n, device=device)
    last = logits[-1:].clone(), target[-1:], labels[-1:], mask[-1:], Objective(), VocabParallel(v, v), True
    far = triton_kl.loss_in_triton(logits, target, labels, mask, Objective(), VocabParallel(v, v), True)
    near = triton_kl.loss_in_triton(*last)
    assert far[0][-1] == near[0][0]
    assert torch.equal(logits[-1:], last[0])


def _rank(rank: int, ranks: int, directory: str, device: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/init", rank=rank, world_size=ranks)
    found = {name: ours(case, device, dist.group.WORLD) for name, case in CASES.items() if case.ranks == ranks}
    torch.save(found, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


def on_two_ranks(device: str) -> list[dict[str, tuple[Tensor, ...]]]:
    """The cases of two ranks, in forks: to be called before torch starts a thread or CUDA."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as directory:
        processes = [context.Process(target=_rank, args=(rank, 2, directory, device)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0
        return [torch.load(Path(directory) / f"{rank}.pt") for rank in range(2)]


def main(device: str) -> None:
    for what in ("invalid value", "divide by zero", "overflow"):  # numpy, on what a mask leaves out
        warnings.filterwarnings("ignore", message=f"{what} encountered")
    split = on_two_ranks(device)
    torch.set_num_threads(1)
    report = {}
    for name, case in CASES.items():
        parts = [part[name] for part in split] if case.ranks > 1 else None
        report[name] = attempt(lambda case=case, parts=parts: check(case, parts or [ours(case, device)]))
    report["not finite"] = attempt(lambda: not_finite(device))
    if device == "cuda":
        report["far rows"] = attempt(lambda: far_rows(device))
    print(json.dumps(report))


def attempt(action: Any) -> str:
    try:
        action()
    except Exception as error:  # whatever it is, it is the case's
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    main(sys.argv[1])
