"""From hidden states and output weights to the distillation loss and its gradients, without ever holding the logits.

Logits are made for a chunk of tokens at a time (`chunked`), in the model's type, and compared in fp32: by two kernels
on CUDA (`triton_kl`), in torch a slice at a time. What is held does not grow with tokens x vocabulary: a chunk of
logits of each model, and in torch about six fp32 temporaries of `SLICE`.

Shapes: s sequence, b micro-batch, n = s b tokens, h hidden, v this rank's columns of the padded vocabulary.
"""

import importlib.util
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from megatron_ext.lm_head import divergences
from megatron_ext.lm_head.divergences import Divergence, TopK, softmax
from megatron_ext.lm_head.fused_loss import ChunkedLoss, Compare, Comparison, LMHead
from megatron_ext.lm_head.objective import Objective
from megatron_ext.lm_head.vocab_parallel import VocabParallel, row_max

SLICE = {"cpu": 2**18, "cuda": 2**22}
"""Logits that are compared at a time in fp32; on a CPU the temporaries must stay in the cache."""


class Losses(NamedTuple):
    """Only `total` carries a gradient.

    Attributes:
        total: Sum over tokens, weighted by the mask, of `kd_weight * kd + ce_weight * ce`.
        kd: Per token, temperature squared times the divergence.
        ce: Per token, the student's cross entropy with the labels in nats, comparable with a pre-training loss.
        finite: Per token, whether the teacher's logits were finite.
    """

    total: Float[Tensor, ""]
    kd: Float[Tensor, "s b"]
    ce: Float[Tensor, "s b"]
    finite: Tensor


def distillation_losses(
    student: LMHead,
    teacher: LMHead | TopK,
    labels: Int[Tensor, "s b"],
    mask: Float[Tensor, "s b"],
    objective: Objective,
    vocabulary: VocabParallel,
    compare: Compare | None = None,
) -> Losses:
    """The distillation loss of a micro-batch, exact under a vocabulary that is split over tensor-parallel ranks.

    Under tensor parallelism the gradient of `student.hidden` is this rank's part of a sum.

    Args:
        student: What the student's logits are made of.
        teacher: What the teacher's are made of, or its likeliest entries (n, k) at the objective's temperature.
        labels: The next token, numbered over the whole vocabulary.
        mask: The weight of each token; 0 where it does not count.
        objective: What is compared.
        vocabulary: This rank's columns. The divergence leaves padding out of both distributions; the cross entropy does
            not, as Megatron's does not.
        compare: What compares a chunk of logits; by default the fastest that can (`choose_kernel`).
    """
    compare = compare or choose_kernel(student.hidden.device, teacher, objective)
    flat: Any = teacher if isinstance(teacher, TopK) else teacher._replace(hidden=teacher.hidden.detach().flatten(0, 1))
    total, kd, ce, finite = _chunked(student, flat, labels, mask, objective, vocabulary, compare)
    return Losses(total, kd, ce, finite)


class CrossEntropy(NamedTuple):
    """Only `total` carries a gradient.

    Attributes:
        total: Sum over tokens, weighted by the mask.
        ce: Per token, in nats.
    """

    total: Float[Tensor, ""]
    ce: Float[Tensor, "s b"]


def cross_entropy(
    model: LMHead, labels: Int[Tensor, "s b"], mask: Float[Tensor, "s b"], vocabulary: VocabParallel
) -> CrossEntropy:
    """The cross entropy of a model with the next tokens, made as `distillation_losses` are; padding counts.

    Args:
        model: What its logits are made of.
        labels: The next token, numbered over the whole vocabulary.
        mask: The weight of each token.
        vocabulary: This rank's columns.
    """
    alone = Objective(kd_weight=0.0, ce_weight=1.0)
    total, _, ce, _ = _chunked(model, None, labels, mask, alone, vocabulary, cross_entropy_in_torch)
    return CrossEntropy(total, ce)


def choose_kernel(device: torch.device, teacher: LMHead | TopK | None, objective: Objective) -> Compare:
    """What compares a chunk of logits: Triton's kernels on CUDA for the divergences that they know, torch otherwise."""
    if device.type == "cuda" and isinstance(teacher, LMHead) and importlib.util.find_spec("triton") is not None:
        from megatron_ext.lm_head import triton_kl

        if objective.divergence in triton_kl.DIVERGENCES:
            return triton_kl.loss_in_triton
    return loss_in_torch


def _chunked(
    model: LMHead,
    teacher: LMHead | TopK | None,
    labels: Int[Tensor, "s b"],
    mask: Float[Tensor, "s b"],
    objective: Objective,
    vocabulary: VocabParallel,
    compare: Compare,
) -> tuple[Tensor, ...]:
    gradient = torch.is_grad_enabled() and (model.hidden.requires_grad or model.weight.requires_grad)
    what = Comparison(teacher, labels.flatten(), objective, vocabulary, compare, model.softcap)
    total, *each = ChunkedLoss.apply(model.hidden.flatten(0, 1), model.weight, mask.flatten().float(), what, gradient)
    return total, *(value.view(labels.shape) for value in each)


def loss_in_torch(
    logits: Float[Tensor, "n v"],
    target: Float[Tensor, "n u"] | TopK,
    labels: Int[Tensor, " n"],
    mask: Float[Tensor, " n"],
    objective: Objective,
    vocabulary: VocabParallel,
    gradient: bool,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Tensor]:
    """`kd`, `ce` and `finite`, slice by slice; with `gradient` the logits become that of their weighted sum."""
    n, parts = logits.shape[0], []
    step = max(1, SLICE[logits.device.type] // logits.shape[1])
    for start in range(0, n, step):
        rows = slice(start, start + step)
        part = target[rows].float() if isinstance(target, Tensor) else target[rows]
        kd, ce, finite, grad = _slice(
            logits[rows].to(torch.float32, copy=True), part, labels[rows], objective, vocabulary, gradient
        )
        if grad is not None:
            logits[rows] = grad.mul_(mask[rows].unsqueeze(-1))
        parts.append((kd, ce, finite))
    kd, ce, finite = (torch.cat(column) for column in zip(*parts, strict=True))
    return kd, ce, finite


def cross_entropy_in_torch(
    logits: Float[Tensor, "n v"],
    target: None,
    labels: Int[Tensor, " n"],
    mask: Float[Tensor, " n"],
    objective: Objective,
    vocabulary: VocabParallel,
    gradient: bool,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Tensor]:
    """`loss_in_torch` of the cross entropy alone, in five passes over a slice, written over the logits.

    Where ranks share the vocabulary a slice is all there is: its sums are theirs together.
    """
    n, (column, here) = logits.shape[0], vocabulary.local(labels)
    step = n if vocabulary.ranks > 1 else max(1, SLICE[logits.device.type] // logits.shape[1])
    ce = logits.new_empty(n, dtype=torch.float32)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        z = logits[rows].float()  # itself in fp32
        (top,) = vocabulary.max(row_max(z))
        z.sub_(top.unsqueeze(-1))
        at_label = torch.where(here[rows], z.gather(-1, column[rows].unsqueeze(-1)).squeeze(-1), 0)
        total, at_label = vocabulary.sum(z.exp_().sum(-1), at_label)
        ce[rows] = total.log() - at_label
        if gradient:
            z.mul_((mask[rows] / total).unsqueeze(-1))
            z.scatter_add_(-1, column[rows].unsqueeze(-1), -(mask[rows] * here[rows]).unsqueeze(-1))
            if z.dtype != logits.dtype:
                logits[rows] = z
    return torch.zeros_like(ce), ce, torch.ones_like(ce, dtype=torch.bool)


def _slice(
    logits: Float[Tensor, "n v"],
    target: Float[Tensor, "n u"] | TopK,
    labels: Int[Tensor, " n"],
    objective: Objective,
    vocabulary: VocabParallel,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Float[Tensor, "n v"] | None]:
    """`kd`, `ce`, `finite` and the gradient of the weighted sum. Logits and target are working memory."""
    unpadded, temperature = vocabulary.unpadded_columns, objective.temperature
    column, here = vocabulary.local(labels)
    column = column.unsqueeze(-1)
    (at_label,) = vocabulary.sum(torch.where(here, logits.gather(-1, column).squeeze(-1), 0))
    # At temperature 1 the cross entropy needs no sum of its own, but for that of the padding.
    shared = temperature == 1 and not objective.of_logits
    whole = softmax(vocabulary, logits.clone())[0] if not shared else None
    padding = logits[:, unpadded:].clone() if shared and vocabulary.padded else None
    kd, student = _diverge(logits[:, :unpadded], target, objective, vocabulary, gradient)
    log_sum = whole.log_sum if whole is not None else student.log_sum
    if padding is not None:
        log_sum = torch.logaddexp(log_sum, _log_sum_exp(padding, vocabulary))
    scale = 1.0 if objective.of_logits else temperature
    value, ce = scale**2 * kd.value, log_sum - at_label
    if kd.grad is None:
        return value, ce, kd.finite, None
    if not objective.ce_weight:
        logits[:, unpadded:] = 0
        torch.mul(kd.grad, objective.kd_weight * scale, out=logits[:, :unpadded])
        return value, ce, kd.finite, logits
    if whole is not None:
        grad = whole.probability
    else:
        grad = logits
        grad[:, :unpadded].add_((student.log_sum - log_sum).unsqueeze(-1)).exp_()
        if padding is not None:
            grad[:, unpadded:] = padding.sub_(log_sum.unsqueeze(-1)).exp_()
    grad.mul_(objective.ce_weight).scatter_add_(-1, column, here.unsqueeze(-1) * -objective.ce_weight)
    grad[:, :unpadded].add_(kd.grad, alpha=objective.kd_weight * scale)
    return value, ce, kd.finite, grad


def _diverge(
    student: Float[Tensor, "n t"],
    target: Float[Tensor, "n u"] | TopK,
    objective: Objective,
    vocabulary: VocabParallel,
    gradient: bool,
) -> tuple[Divergence, Any]:
    """The divergence, and the student's distribution where it is one of distributions."""
    if isinstance(target, TopK):
        (own,) = softmax(vocabulary, student, temperature=objective.temperature)
        return divergences.top_k_kl(own, target, vocabulary, gradient, objective.divergence == "top-k-rest"), own
    teacher = target[:, : vocabulary.unpadded_columns]
    if objective.of_logits:
        return divergences.LOGITS[objective.divergence](student, teacher, vocabulary, gradient), None
    own, other = softmax(vocabulary, student, teacher, temperature=objective.temperature)
    if objective.sparse:
        finite = other.log_sum.isfinite()
        kept = divergences.top_k(other, vocabulary, objective.k)
        found = divergences.top_k_kl(own, kept, vocabulary, gradient, objective.divergence == "top-k-rest")
        return found._replace(finite=finite), own
    extra = {"beta": objective.beta} if objective.divergence == "jsd" else {}
    return divergences.DISTRIBUTIONS[objective.divergence](own, other, vocabulary, gradient, **extra), own


def _log_sum_exp(logits: Float[Tensor, "n p"], vocabulary: VocabParallel) -> Float[Tensor, " n"]:
    (top,) = vocabulary.max(row_max(logits))
    (total,) = vocabulary.sum((logits - top.unsqueeze(-1)).exp().sum(-1))
    return top + total.log()
