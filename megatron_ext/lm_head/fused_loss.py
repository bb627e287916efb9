"""A loss as one node of the graph: its logits are made for a chunk of tokens at a time, and never kept.

A softmax needs whole rows, so chunks are of tokens. The forward pass makes the losses. The gradient of the output
weights is as large as they are, and what it is to be multiplied with is known in the backward pass only. Where a copy
of it in fp32 is small (`KEPT`), the gradients are made with the losses and kept until then. Where it is large, the
backward pass makes the logits again and adds the gradient where it belongs: six matrix products instead of four, and
nothing of the weights' size in memory. Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models"
(arXiv 2411.09009), make them twice, too.

Where it belongs is Megatron's `weight.main_grad`, if there is one (`platform/main_grad.py`).

Shapes: n tokens, h hidden, v this rank's columns of the padded vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from megatron_ext.lm_head.divergences import TopK
from megatron_ext.lm_head.objective import Objective
from megatron_ext.lm_head.softcap import softcap_, softcap_grad
from megatron_ext.lm_head.vocab_parallel import VocabParallel
from megatron_ext.models.loss_buffers import CHUNK, KEPT
from megatron_ext.platform.main_grad import add, add_to_main_grad, main_grad

TILE = {"cpu": 1, "cuda": 128}
"""Tokens of a tile of a matrix product: a chunk that ends within one wastes the rest of it."""


class LMHead(NamedTuple):
    """The end of a model: what its logits are made of.

    Attributes:
        hidden: States after the final norm, whole in the sequence.
        weight: This rank's rows of the output layer.
        softcap: What bounds the logits, see `softcap`; None for no bound.
    """

    hidden: Float[Tensor, "s b h"]
    weight: Float[Tensor, "v h"]
    softcap: float | None = None


Compare = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""Of a chunk of logits; see `losses.loss_in_torch`."""


class Comparison(NamedTuple):
    """What a chunk of the student's logits is compared with, and how.

    Attributes:
        teacher: The teacher's head, its states (n, h), or its likeliest entries, or None for the cross entropy alone.
        labels: The next tokens.
        objective: What is compared.
        vocabulary: This rank's columns.
        compare: What compares.
        softcap: What bounds the student's logits.
    """

    teacher: LMHead | TopK | None
    labels: Int[Tensor, " n"]
    objective: Objective
    vocabulary: VocabParallel
    compare: Compare
    softcap: float | None = None


class Gradients(NamedTuple):
    """Where the gradients go: `hidden` is overwritten, `weight` added to."""

    hidden: Float[Tensor, "n h"]
    weight: Float[Tensor, "v h"]


class ChunkedLoss(torch.autograd.Function):
    """`total`, and of each token `kd`, `ce` and `finite`, from states (n, h) and weights (v, h)."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, mask, comparison, gradient):
        gradients = None
        if gradient and 4 * weight.numel() <= KEPT[hidden.device.type]:
            gradients = Gradients(torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32))
        kd, ce, finite = run_chunks(hidden, weight, mask, comparison, gradients)
        if gradient:
            ctx.save_for_backward(hidden, mask, *(gradients or ()))
            ctx.weight, ctx.comparison = weight, comparison
        ctx.mark_non_differentiable(kd, ce, finite)
        objective = comparison.objective
        return torch.dot(mask, objective.kd_weight * kd + objective.ce_weight * ce), kd, ce, finite

    @staticmethod
    def backward(ctx: Any, *grad_outputs):
        scale, weight = grad_outputs[0], ctx.weight
        hidden, mask, *kept = ctx.saved_tensors
        main = main_grad(weight)
        if kept:
            found = Gradients(kept[0].mul_(scale), kept[1].mul_(scale))
            return found.hidden, add_to_main_grad(weight, found.weight), None, None, None
        found = Gradients(torch.empty_like(hidden), torch.zeros_like(weight) if main is None else main)
        run_chunks(hidden, weight, mask * scale, ctx.comparison, found)
        return found.hidden, add_to_main_grad(weight, found.weight if main is None else None), None, None, None


def run_chunks(
    hidden: Float[Tensor, "n h"],
    weight: Float[Tensor, "v h"],
    mask: Float[Tensor, " n"],
    comparison: Comparison,
    gradients: Gradients | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`kd`, `ce` and `finite` chunk by chunk, and the gradients of their weighted sum."""
    n, teacher = hidden.shape[0], comparison.teacher
    weights = [weight, teacher.weight] if isinstance(teacher, LMHead) else [weight]
    step = _tokens_at_a_time(n, sum(w.shape[0] * w.element_size() for w in weights), hidden.device)
    logits, *target = (w.new_empty(step, w.shape[0]) for w in weights)
    kd, ce = (hidden.new_empty(n, dtype=torch.float32) for _ in range(2))
    finite = torch.empty(n, dtype=torch.bool, device=hidden.device)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        own, other = logits[: rows.stop - start], teacher
        torch.mm(hidden[rows], weight.T, out=own)
        softcap_(own, comparison.softcap)
        steepness = softcap_grad(own, comparison.softcap) if gradients is not None else None
        if isinstance(teacher, LMHead):
            other = torch.mm(teacher.hidden[rows], teacher.weight.T, out=target[0][: rows.stop - start])
            softcap_(other, teacher.softcap)
        elif isinstance(teacher, TopK):
            other = teacher[rows]
        kd[rows], ce[rows], finite[rows] = comparison.compare(
            own, other, comparison.labels[rows], mask[rows], comparison.objective, comparison.vocabulary,
            gradients is not None,
        )  # fmt: skip
        if gradients is not None:  # `own` has become the gradient of the logits
            if steepness is not None:
                own *= steepness
            torch.mm(own, weight, out=gradients.hidden[rows])
            _add_product(gradients.weight, own, hidden[rows])
    return kd, ce, finite


def _tokens_at_a_time(n: int, bytes_per_token: int, device: torch.device) -> int:
    """Of chunks that are as even as possible, none with more logits than `CHUNK`, all but the last of whole tiles."""
    most, tile = max(1, CHUNK[device.type] // bytes_per_token), TILE[device.type]
    even = -(-n // -(-n // most))
    whole = -(-even // tile) * tile
    if whole <= most:
        return min(n, whole)
    return most // tile * tile or even


def _add_product(total: Float[Tensor, "v h"], grad: Float[Tensor, "n v"], hidden: Float[Tensor, "n h"]) -> None:
    """`total += grad.T @ hidden`, without another tensor of its size.

    A GPU makes products of 16-bit numbers in fp32. A CPU rounds those of a chunk of tokens to 16 bits, as Megatron does
    those of all tokens; widened first they would take five times as long where there are matrix units.
    """
    if total.dtype == grad.dtype:
        total.addmm_(grad.T, hidden)
    elif grad.device.type == "cuda" and total.dtype == torch.float32:
        torch.addmm(total, grad.T, hidden, out_dtype=torch.float32, out=total)
    else:
        step = max(1, 2**21 // hidden.shape[1])
        for start in range(0, grad.shape[1], step):
            columns = slice(start, start + step)
            add(total[columns], grad[:, columns].T @ hidden)
