"""The distillation losses as they are written in the papers: float64, whole logits, autograd."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div, log_softmax, mse_loss

from megatron_ext.lm_head.objective import Objective


def divergence(student: Tensor, teacher: Tensor, objective: Objective) -> Tensor:
    """Of each token, from logits without padding (n, t), in float64."""
    t, beta, k = objective.temperature, objective.beta, objective.k
    if objective.divergence == "mse":
        return mse_loss(student, teacher, reduction="none").mean(-1)
    if objective.divergence == "cosine":
        return 1 - cosine_similarity(student, teacher, dim=-1)
    if objective.divergence == "top-k":
        index = teacher.topk(k, dim=-1).indices
        student, teacher = student.gather(-1, index), teacher.gather(-1, index)
    log_p, log_q = log_softmax(student / t, -1), log_softmax(teacher / t, -1)
    if objective.divergence == "top-k-rest":
        index = teacher.topk(k, dim=-1).indices
        log_p, log_q = (torch.cat([x.gather(-1, index), _rest(x, index)], -1) for x in (log_p, log_q))
    kl = lambda log_a, log_b: kl_div(log_b, log_a, log_target=True, reduction="none").sum(-1)  # noqa: E731
    if objective.divergence == "reverse-kl":
        return t**2 * kl(log_p, log_q)
    if objective.divergence == "jsd":
        log_m = (beta * log_q.exp() + (1 - beta) * log_p.exp()).log()
        return t**2 * (beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m))
    return t**2 * kl(log_q, log_p)


def losses(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], labels: Tensor, mask: Tensor,
    objective: Objective, tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Total, divergence and cross entropy from (hidden, weight) of both."""
    p, q = (hidden.flatten(0, 1) @ weight.T for hidden, weight in (student, teacher))
    kd = divergence(p[:, :tokens], q[:, :tokens], objective).view(labels.shape)
    ce = cross_entropy(p, labels.flatten(), reduction="none").view(labels.shape)
    return (mask * (objective.kd_weight * kd + objective.ce_weight * ce)).sum(), kd, ce


def _rest(log: Tensor, index: Tensor) -> Tensor:
    """Logarithm of the probability of all but `index`; 0 and no gradient where that is all."""
    if index.shape[-1] == log.shape[-1]:
        return log.new_full((*log.shape[:-1], 1), -1e9)
    return log.scatter(-1, index, -torch.inf).logsumexp(-1, keepdim=True)
