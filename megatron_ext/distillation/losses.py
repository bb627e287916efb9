"""What a student is trained to match, exact under a vocabulary that is split over tensor-parallel ranks.

Shapes: b micro-batch, s sequence, v this rank's part of the padded vocabulary, n tokens of one slice.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

SLICE = 2**25
"""Logits that are held in fp32 at a time: 128 MiB for each of the few temporaries."""


class Losses(NamedTuple):
    """Per token, in nats; only `total` carries a gradient.

    Attributes:
        total: `kd_weight * kd + ce_weight * ce`.
        kd: Temperature squared times KL(teacher || student) at that temperature.
        ce: The student's cross-entropy with the labels, comparable with a pre-training loss.
    """

    total: Float[Tensor, "b s"]
    kd: Float[Tensor, "b s"]
    ce: Float[Tensor, "b s"]


def distillation_losses(
    student: Float[Tensor, "b s v"],
    teacher: Float[Tensor, "b s v"],
    labels: Int[Tensor, "b s"],
    *,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Losses:
    """Forward KL from teacher to student and the student's cross-entropy, for every token.

    `kd = T^2 sum_i q_i (log q_i - log p_i)`, q = softmax(teacher / T), p = softmax(student / T): Hinton et al.,
    "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531, section 2), whose T^2 keeps the gradient's scale
    whatever T is.

    All arithmetic is fp32 whatever the inputs' type, `SLICE` logits at a time. Kept until the backward pass is one
    gradient in the student's type and nothing else: neither student's nor teacher's logits.

    Args:
        student: Logits of the student, this rank's columns of the vocabulary.
        teacher: Logits of the teacher, the same columns.
        labels: The next token, numbered over the whole vocabulary.
        temperature: T.
        kd_weight: Weight of `kd` in `total`.
        ce_weight: Weight of `ce` in `total`.
        vocab_size: Entries of the vocabulary that are tokens. Those beyond are padding: `kd` leaves them out of both
            distributions. `ce` does not, as Megatron's loss does not. By default all are tokens.
        group: The tensor-parallel group; None when the vocabulary is whole.
    """
    weights = (temperature, kd_weight, ce_weight)
    return Losses(*_Distillation.apply(student, teacher, labels, weights, vocab_size, group))


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student, teacher, labels, weights, vocab_size, group):
        shape, columns = labels.shape, student.shape[-1]
        student_flat, teacher_flat = student.reshape(-1, columns), teacher.reshape(-1, columns)
        first = columns * (dist.get_rank(group) if group is not None else 0)
        tokens = columns if vocab_size is None else min(max(vocab_size - first, 0), columns)
        gradient = torch.empty_like(student_flat) if student.requires_grad else None
        kd, ce = (student.new_empty(labels.numel(), dtype=torch.float32) for _ in range(2))
        step = max(1, SLICE // columns)
        for start in range(0, labels.numel(), step):
            part = slice(start, start + step)
            kd[part], ce[part], slope = _slice(
                student_flat[part].to(torch.float32, copy=True),
                teacher_flat[part].float(),
                labels.reshape(-1)[part] - first,
                weights,
                tokens,
                group,
                gradient is not None,
            )
            if gradient is not None and slope is not None:
                gradient[part] = slope
        if gradient is not None:
            ctx.save_for_backward(gradient.view(student.shape))
        kd, ce = kd.view(shape), ce.view(shape)
        ctx.mark_non_differentiable(kd, ce)
        return weights[1] * kd + weights[2] * ce, kd, ce

    @staticmethod
    def backward(ctx: Any, *grad_outputs):
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad_outputs[0].unsqueeze(-1)), None, None, None, None, None


def _slice(
    student: Float[Tensor, "n v"],
    teacher: Float[Tensor, "n v"],
    labels: Int[Tensor, " n"],
    weights: tuple[float, float, float],
    tokens: int,
    group: dist.ProcessGroup | None,
    with_gradient: bool,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, "n v"] | None]:
    """`kd`, `ce` and the gradient of their weighted sum with respect to `student`, which is used as working memory.

    Labels count from this rank's first column; of the columns the first `tokens` are no padding.
    """
    temperature, kd_weight, ce_weight = weights
    here = (labels >= 0) & (labels < student.shape[-1])
    label = labels.clamp(0, student.shape[-1] - 1).unsqueeze(-1)
    at_label = student.gather(-1, label).squeeze(-1) * here
    log_p, log_q = student[:, :tokens] / temperature, teacher[:, :tokens] / temperature

    # Maxima, then sums of exponentials, then the sums over the vocabulary: one reduction for all three quantities each.
    top = _reduce([_max(log_p), _max(log_q), _max(student)], dist.ReduceOp.MAX, group)
    shares = [x.sub_(m.unsqueeze(-1)).exp().sum(-1) for x, m in zip((log_p, log_q, student), top, strict=True)]
    sums = _reduce(shares, dist.ReduceOp.SUM, group).log_()
    log_p -= sums[0].unsqueeze(-1)
    log_q -= sums[1].unsqueeze(-1)
    student -= sums[2].unsqueeze(-1)
    q = log_q.exp()
    kl, at_label = _reduce([(log_q.sub_(log_p) * q).sum(-1), at_label], dist.ReduceOp.SUM, group)
    kd, ce = temperature**2 * kl, top[2] + sums[2] - at_label
    if not with_gradient:
        return kd, ce, None
    slope = student.exp_().scatter_add_(-1, label, -here.float().unsqueeze(-1)).mul_(ce_weight)
    slope[:, :tokens] += log_p.exp_().sub_(q).mul_(kd_weight * temperature)
    return kd, ce, slope


def _max(logits: Float[Tensor, "n v"]) -> Float[Tensor, " n"]:
    if logits.shape[-1] == 0:  # a rank that holds nothing but padding
        return logits.new_full(logits.shape[:1], -torch.inf)
    return logits.amax(-1)


def _reduce(values: list[Tensor], operation: Any, group: dist.ProcessGroup | None) -> Tensor:
    stacked = torch.stack(values)
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(stacked, operation, group)
    return stacked
