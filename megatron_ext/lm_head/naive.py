"""All of this package as the papers write it: whole logits, no split, gradients by autograd, the type of the input.

Shapes: n tokens, t entries of the vocabulary, v with its padding, k kept entries, h hidden; leading dimensions are
free.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from megatron_ext.lm_head.divergences import SPARSE, TopK
from megatron_ext.lm_head.objective import Objective


def cross_entropy(logits: Float[Tensor, "n v"], labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """In nats; padding counts, as in Megatron's."""
    return F.cross_entropy(logits, labels, reduction="none")


def log_probabilities(logits: Float[Tensor, "n t"], labels: Int[Tensor, " n"]) -> Float[Tensor, "2 n"]:
    """The log-probability of each label, and 1 where it is the most probable token."""
    log_p = logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    return torch.stack([log_p, (logits.argmax(-1) == labels).to(log_p.dtype)])


def top_k(logits: Float[Tensor, "n t"], k: int) -> TopK:
    """The k likeliest entries, the likeliest first, and the tail; at temperature 1."""
    log_q, index = logits.log_softmax(-1).topk(k)
    return TopK(index, log_q, _tail(logits.log_softmax(-1), index)[..., 0])


def kl(log_a: Float[Tensor, "n t"], log_b: Float[Tensor, "n t"]) -> Float[Tensor, " n"]:
    """KL(a || b) = sum a (log a - log b)."""
    return F.kl_div(log_b, log_a, log_target=True, reduction="none").sum(-1)


def divergence(
    student: Float[Tensor, "n t"], teacher: Float[Tensor, "n t"], objective: Objective
) -> Float[Tensor, " n"]:
    """Of each token T^2 times the divergence of the distributions at temperature T, or that of the logits."""
    t, beta, name = objective.temperature, objective.beta, objective.divergence
    if name == "mse":
        return F.mse_loss(student, teacher, reduction="none").mean(-1)
    if name == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=-1)
    log_p, log_q = (student / t).log_softmax(-1), (teacher / t).log_softmax(-1)
    if objective.sparse:
        index = teacher.topk(objective.k, dim=-1).indices
        kept = [x.gather(-1, index) for x in (log_p, log_q)]
        if name == "top-k":
            log_p, log_q = (x.log_softmax(-1) for x in kept)
        elif objective.k < teacher.shape[-1]:
            tails = [_tail(x, index) for x in (log_p, log_q)]
            log_p, log_q = (torch.cat(both, -1) for both in zip(kept, tails, strict=True))
    if name == "reverse-kl":
        return t**2 * kl(log_p, log_q)
    if name == "jsd":
        log_m = (beta * log_q.exp() + (1 - beta) * log_p.exp()).log()
        return t**2 * (beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m))
    if name not in ("forward-kl", *SPARSE):
        raise ValueError(f"no plain form of {name!r}")
    return t**2 * kl(log_q, log_p)  # forward, of all entries or of those that are kept


def distillation_losses(
    student: tuple[Float[Tensor, "s b h"], Float[Tensor, "v h"]],
    teacher: tuple[Float[Tensor, "s b u"], Float[Tensor, "v u"]],
    labels: Int[Tensor, "s b"],
    mask: Float[Tensor, "s b"],
    objective: Objective,
    tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Total, and of each token divergence and cross entropy, as `losses.distillation_losses` has them.

    Args:
        student: Its states after the final norm, and the output layer.
        teacher: The same of the teacher.
        labels: The next tokens.
        mask: The weight of each token.
        objective: What is compared.
        tokens: Entries of the vocabulary; what lies beyond is padding.
    """
    p, q = (hidden.flatten(0, 1) @ weight.T for hidden, weight in (student, teacher))
    kd = divergence(p[:, :tokens], q[:, :tokens], objective).view(labels.shape)
    ce = cross_entropy(p, labels.flatten()).view(labels.shape)
    return (mask * (objective.kd_weight * kd + objective.ce_weight * ce)).sum(), kd, ce


def _tail(log: Float[Tensor, "n t"], index: Int[Tensor, "n k"]) -> Float[Tensor, "n 1"]:
    """Logarithm of the probability of all but `index`."""
    return log.scatter(-1, index, -torch.inf).logsumexp(-1, keepdim=True)
