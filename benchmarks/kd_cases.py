"""The methods that `kd_loss.py` compares, and a weight as Megatron's data parallelism has it."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from megatron_ext.lm_head.fused_loss import Compare, LMHead
from megatron_ext.lm_head.losses import choose_kernel, distillation_losses, loss_in_torch
from megatron_ext.lm_head.objective import Objective
from megatron_ext.lm_head.vocab_parallel import VocabParallel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Case = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def plain(x: Tensor, w: Tensor, xt: Tensor, wt: Tensor) -> Tensor:
    """As it is usually written."""
    with torch.no_grad():
        log_q = log_softmax((xt @ wt.T).float(), dim=-1)
    log_p = log_softmax((x @ w.T).float(), dim=-1)
    return kl_div(log_p, log_q, reduction="sum", log_target=True)


def ours(compare: Compare | None) -> Case:
    """`distillation_losses`, its logits compared like this; by default as it chooses."""

    def case(x: Tensor, w: Tensor, xt: Tensor, wt: Tensor) -> Tensor:
        labels = torch.zeros(len(x), 1, dtype=torch.long, device=x.device)
        student, teacher = LMHead(x.unsqueeze(1), w), LMHead(xt.unsqueeze(1), wt)
        mask, vocabulary = torch.ones_like(labels).float(), VocabParallel(len(w), len(w))
        return distillation_losses(student, teacher, labels, mask, Objective(), vocabulary, compare).total

    return case


def chosen() -> Compare:
    """What `distillation_losses` compares logits by, here."""
    empty = torch.empty(0, 0)
    return choose_kernel(torch.device(DEVICE), LMHead(empty, empty), Objective())


def liger(x: Tensor, w: Tensor, xt: Tensor, wt: Tensor) -> Tensor:
    """Liger-Kernel's, a mean over the tokens."""
    from liger_kernel.transformers import LigerFusedLinearJSD  # pyright: ignore[reportMissingImports]

    labels = torch.zeros(len(x), dtype=torch.long, device=x.device)  # none is ignored
    return LigerFusedLinearJSD(jsd_beta=0.0, temperature=1.0)(x, w, xt, wt, labels)


CASES: dict[str, Case] = {"plain": plain, "ours": ours(None), "ours in torch": ours(loss_in_torch), "liger": liger}
COMPARES: dict[str, Callable[[], Compare]] = {"ours": chosen, "ours in torch": lambda: loss_in_torch}
MEANS = ("liger",)  # their loss and gradients are to be multiplied by the tokens


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
