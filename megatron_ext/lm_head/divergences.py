"""How far a student's next-token distribution is from its teacher's, and the gradient of that, for a slice of tokens.

Shapes: n tokens of the slice, v this rank's columns of the padded vocabulary, t those of them that are tokens, k kept
entries. Everything is fp32. The value is in nats where it is an entropy; the gradient with respect to
the student's logits is `None` if not asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from megatron_ext.lm_head.vocab_parallel import VocabParallel, row_max

TINY = 1e-37
"""Stands for a probability that underflowed, where a logarithm is taken of it."""

SMALL = 1e-30
"""Below which a sum of probabilities is made of logarithms instead: its parts may have underflowed."""


@dataclass(frozen=True)
class TopK:
    """A distribution of which only the likeliest entries are known one by one.

    Attributes:
        index: Their numbers in the whole vocabulary.
        log_q: Logarithms of their probabilities.
        log_rest: Logarithm of the probability of all others together.
    """

    index: Int[Tensor, "n k"]
    log_q: Float[Tensor, "n k"]
    log_rest: Float[Tensor, " n"]

    def __getitem__(self, rows: slice) -> "TopK":
        return TopK(self.index[rows], self.log_q[rows], self.log_rest[rows])


class Divergence(NamedTuple):
    """What is known of each token.

    Attributes:
        value: The divergence.
        grad: Its gradient with respect to the student's logits.
        finite: Whether the teacher's logits were finite.
    """

    value: Float[Tensor, " n"]
    grad: Float[Tensor, "n t"] | None
    finite: Tensor


class Distribution(NamedTuple):
    """A softmax over a vocabulary.

    Attributes:
        log: Logarithms of the probabilities.
        probability: The probabilities.
        log_sum: Logarithm of the sum of the exponentials.
    """

    log: Float[Tensor, "n t"]
    probability: Float[Tensor, "n t"]
    log_sum: Float[Tensor, " n"]


def softmax(
    vocabulary: VocabParallel, *logits: Float[Tensor, "n t"], temperature: float = 1.0
) -> tuple[Distribution, ...]:
    """The distributions of several logits over a split vocabulary, with two reductions in all.

    The logits are used as working memory.
    """
    if temperature != 1:
        for z in logits:
            z /= temperature
    top = vocabulary.max(*(row_max(z) for z in logits))
    exponentials = [z.sub_(m.unsqueeze(-1)).exp() for z, m in zip(logits, top, strict=True)]
    sums = vocabulary.sum(*(e.sum(-1) for e in exponentials))
    log_sums = sums.log()
    return tuple(
        Distribution(z.sub_(log_sum.unsqueeze(-1)), e.div_(total.unsqueeze(-1)), m + log_sum)
        for z, e, total, log_sum, m in zip(logits, exponentials, sums, log_sums, top, strict=True)
    )


def forward_kl(student: Distribution, teacher: Distribution, vocabulary: VocabParallel, gradient: bool) -> Divergence:
    """KL(teacher || student) = sum q (log q - log p); gradient p - q."""
    (value,) = vocabulary.sum(_dot(teacher.probability, teacher.log - student.log))
    grad = student.probability - teacher.probability if gradient else None
    return Divergence(value, grad, teacher.log_sum.isfinite())


def reverse_kl(student: Distribution, teacher: Distribution, vocabulary: VocabParallel, gradient: bool) -> Divergence:
    """KL(student || teacher) = sum p (log p - log q); gradient p (log p - log q - KL)."""
    difference = student.log - teacher.log
    (value,) = vocabulary.sum(_dot(student.probability, difference))
    grad = difference.sub_(value.unsqueeze(-1)).mul_(student.probability) if gradient else None
    return Divergence(value, grad, teacher.log_sum.isfinite())


def jensen_shannon(
    student: Distribution, teacher: Distribution, vocabulary: VocabParallel, gradient: bool, beta: float
) -> Divergence:
    """Generalised JSD, beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p.

    Agarwal et al., "On-Policy Distillation of Language Models" (arXiv 2306.13649, equation 3). Gradient
    (1 - beta) p (log p - log m - KL(p || m)).
    """
    log_m = (beta * teacher.probability).add_(student.probability, alpha=1 - beta).clamp_(min=TINY).log_()
    of_teacher = _dot(teacher.probability, teacher.log - log_m)
    difference = torch.sub(student.log, log_m, out=log_m)
    q_to_m, p_to_m = vocabulary.sum(of_teacher, _dot(student.probability, difference))
    grad = None
    if gradient:
        grad = difference.sub_(p_to_m.unsqueeze(-1)).mul_(student.probability).mul_(1 - beta)
    return Divergence(beta * q_to_m + (1 - beta) * p_to_m, grad, teacher.log_sum.isfinite())


def squared_error(
    student: Float[Tensor, "n t"], teacher: Float[Tensor, "n t"], vocabulary: VocabParallel, gradient: bool
) -> Divergence:
    """Mean squared difference of the logits over the vocabulary; gradient 2 (student - teacher) / tokens."""
    difference = student - teacher
    value, total = vocabulary.sum(_dot(difference, difference), teacher.sum(-1))
    grad = difference.mul_(2 / vocabulary.vocab_size) if gradient else None
    return Divergence(value / vocabulary.vocab_size, grad, total.isfinite())


def cosine(
    student: Float[Tensor, "n t"], teacher: Float[Tensor, "n t"], vocabulary: VocabParallel, gradient: bool
) -> Divergence:
    """One minus the cosine of the logits; gradient (cos student / |student| - teacher / |teacher|) / |student|."""
    ss, tt, st = vocabulary.sum(_dot(student, student), _dot(teacher, teacher), _dot(student, teacher))
    norm = ss.clamp(min=TINY).sqrt()
    product = norm * tt.clamp(min=TINY).sqrt()
    cos = st / product
    grad = None
    if gradient:
        grad = student * (cos / norm**2).unsqueeze(-1) - teacher / product.unsqueeze(-1)
    return Divergence(1 - cos, grad, tt.isfinite())


def top_k(teacher: Distribution, vocabulary: VocabParallel, k: int) -> TopK:
    """The teacher's k likeliest entries over the whole vocabulary, and the rest. Uses up `teacher.probability`."""
    here = min(k, vocabulary.columns)
    log_q, index = _padded_columns(teacher.log, vocabulary.columns).topk(here, sorted=False)
    log_q, index = vocabulary.gather(log_q), vocabulary.gather(index + vocabulary.first)
    if log_q.shape[-1] > k:
        log_q, chosen = log_q.topk(k, sorted=False)
        index = index.gather(-1, chosen)
    return TopK(index, log_q, _rest(teacher.probability, index, vocabulary).log())


def top_k_kl(
    student: Distribution, teacher: TopK, vocabulary: VocabParallel, gradient: bool, with_rest: bool
) -> Divergence:
    """KL over the teacher's likeliest entries.

    With the rest as one more entry (a "ghost token"), gradient p - q on the entries and p (1 - q_rest / p_rest)
    elsewhere; without, both distributions are renormalised over the entries, and nothing reaches the others. `teacher`
    must be of the temperature of `student`. Uses up `student.probability`.
    """
    finite = teacher.log_q.isfinite().all(-1)
    column, here = vocabulary.local(teacher.index)
    column = column.clamp(max=max(student.log.shape[-1] - 1, 0))  # what is here is a token, no padding
    log_p = student.log.gather(-1, column) if student.log.shape[-1] else torch.zeros_like(teacher.log_q)
    log_p = vocabulary.sum(*torch.where(here, log_p, 0).unbind(-1)).T
    if not with_rest:
        log_p, log_q = log_p.log_softmax(-1), teacher.log_q.log_softmax(-1)
        value = _dot(log_q.exp(), log_q - log_p)
        if not gradient:
            return Divergence(value, None, finite)
        grad = torch.zeros_like(student.log)
        return Divergence(value, _scatter(grad, column, here, log_p.exp() - log_q.exp()), finite)
    rest_q = teacher.log_rest.exp()
    rest_p = _rest(student.probability, teacher.index, vocabulary)
    log_rest_p = rest_p.clamp(min=TINY).log()
    # A probability may be smaller than fp32 can say; its logarithm, and its share of the rest, not.
    small = (rest_p < SMALL) & (rest_q > 0) if teacher.index.shape[-1] < vocabulary.vocab_size else rest_p < 0
    shares = None
    if small.any():
        log_rest_p[small], shares = _small_rest(student.log[small], column[small], here[small], vocabulary)
    value = _dot(teacher.log_q.exp(), teacher.log_q - log_p)
    value = value + torch.where(rest_q > 0, rest_q * (teacher.log_rest - log_rest_p), 0)
    if not gradient:
        return Divergence(value, None, finite)
    outside = 1 - rest_q / rest_p.clamp(min=TINY)
    grad = student.probability.mul_(outside.unsqueeze(-1))  # zero on the entries: `_rest` put it there
    if shares is not None:
        grad[small] = shares.mul_(-rest_q[small].unsqueeze(-1))
    return Divergence(value, _scatter(grad, column, here, log_p.exp() - teacher.log_q.exp()), finite)


DISTRIBUTIONS: dict[str, Callable[..., Divergence]] = {
    "forward-kl": forward_kl,
    "reverse-kl": reverse_kl,
    "jsd": jensen_shannon,
}
LOGITS: dict[str, Callable[..., Divergence]] = {"mse": squared_error, "cosine": cosine}
SPARSE = ("top-k", "top-k-rest")


def names() -> tuple[str, ...]:
    """What a student can be trained by; an entry of `DISTRIBUTIONS` or `LOGITS` makes one, also from outside."""
    return (*DISTRIBUTIONS, *LOGITS, *SPARSE)


def _dot(a: Float[Tensor, "n t"], b: Float[Tensor, "n t"]) -> Float[Tensor, " n"]:
    return torch.linalg.vecdot(a, b)


def _padded_columns(log: Float[Tensor, "n t"], columns: int) -> Float[Tensor, "n v"]:
    return torch.nn.functional.pad(log, (0, columns - log.shape[-1]), value=-torch.inf)


def _rest(
    probability: Float[Tensor, "n t"], index: Int[Tensor, "n k"], vocabulary: VocabParallel
) -> Float[Tensor, " n"]:
    """What is left when the entries of `index` are set to zero, in place: no difference of nearly equal sums."""
    if probability.shape[-1]:
        column, here = vocabulary.local(index)
        column = column.clamp(max=probability.shape[-1] - 1)
        kept = torch.where(here, 0, 1).to(probability.dtype)
        probability.scatter_reduce_(-1, column, kept, "prod")
    (rest,) = vocabulary.sum(probability.sum(-1))
    return rest


def _small_rest(
    log: Float[Tensor, "n t"], column: Int[Tensor, "n k"], here: Tensor, vocabulary: VocabParallel
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n t"]]:
    """The logarithm of what is left beside these entries, and the share that each other entry has of it."""
    kept = torch.where(here, 1.0, 0.0).to(log.dtype)
    entry = torch.zeros_like(log).scatter_reduce_(-1, column, kept, "amax") if log.shape[-1] else log
    rest = log.masked_fill(entry > 0, -torch.inf)
    (top,) = vocabulary.max(row_max(rest))
    shares = rest.sub_(top.unsqueeze(-1)).exp_()
    (total,) = vocabulary.sum(shares.sum(-1))
    return top + total.log(), shares.div_(total.unsqueeze(-1))


def _scatter(grad: Tensor, column: Tensor, here: Tensor, values: Tensor) -> Tensor:
    return grad.scatter_add_(-1, column, torch.where(here, values, 0)) if grad.shape[-1] else grad
