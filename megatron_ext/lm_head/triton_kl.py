"""A chunk of logits compared by two Triton kernels, on CUDA: forward and reverse KL, with cross entropy.

In torch the comparison passes many times over fp32 temporaries. Here one kernel reads the logits of both models once,
in their own type, and leaves five numbers per token, which one collective combines over the tensor-parallel ranks; a
second kernel reads the logits again and puts the gradient in the place of the student's. Sums are fp32, offsets have 64
bits. The sizes of the vocabulary are constants of the kernels, which are compiled for each model anew.

Maxima and sums are kept together while a row is read: Milakov and Gimelshein, "Online normalizer calculation for
softmax" (arXiv 1805.02867, algorithm 3); the expected difference of the logits is kept in the same way.

Shapes: n tokens of the chunk, v this rank's columns of the padded vocabulary, t those of them that are tokens, u this
rank's columns of the teacher's (t or more), r ranks.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from megatron_ext.lm_head.objective import Objective
from megatron_ext.lm_head.vocab_parallel import VocabParallel

DIVERGENCES = ("forward-kl", "reverse-kl")
"""What these kernels can compare by."""

BLOCK = 4096
"""Columns that a program holds at a time. Not tuned."""
WARPS = 8


def loss_in_triton(
    logits: Float[Tensor, "n v"],
    target: Float[Tensor, "n u"],
    labels: Int[Tensor, " n"],
    mask: Float[Tensor, " n"],
    objective: Objective,
    vocabulary: VocabParallel,
    gradient: bool,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Tensor]:
    """`kd`, `ce` and `finite` of each token; with `gradient` the logits become that of their weighted sum.

    Args:
        logits: The student's, bf16, fp16 or fp32.
        target: The teacher's.
        labels: The next token, numbered over the whole vocabulary.
        mask: The weight of each token; 0 where it does not count.
        objective: One of `DIVERGENCES`.
        vocabulary: This rank's columns.
        gradient: Whether there is one.
    """
    (n, columns), reverse = logits.shape, objective.divergence == "reverse-kl"
    column, here = vocabulary.local(labels)
    column = torch.where(here, column, -1)
    arguments: dict[str, Any] = {
        "student": logits, "teacher": target, "labels": column, "count": n, "student_stride": logits.stride(0),
        "teacher_stride": target.stride(0), "inverse_temperature": 1 / objective.temperature, "COLUMNS": columns,
        "TOKENS": vocabulary.unpadded_columns, "REVERSE": reverse, "BLOCK": min(BLOCK, triton.next_power_of_2(columns)),
        "num_warps": WARPS,
    }  # fmt: skip
    found = logits.new_empty(5, n, dtype=torch.float32)
    _statistics[(n,)](**arguments, out=found, SCALED=objective.temperature != 1)
    if vocabulary.ranks > 1:
        found = _combined(vocabulary.gather(found).unflatten(-1, (vocabulary.ranks, -1)), reverse)
    log_p, log_q, difference, log_whole, at_label = found
    divergence = difference - log_p + log_q if reverse else difference - log_q + log_p
    if gradient:
        _gradient[n, triton.cdiv(columns, arguments["BLOCK"])](
            **arguments, statistics=found, divergence=divergence, mask=mask.float(),
            kd_scale=objective.kd_weight * objective.temperature, ce_scale=objective.ce_weight,
        )  # fmt: skip
    return objective.temperature**2 * divergence, log_whole - at_label, log_q.isfinite()


def _combined(parts: Float[Tensor, "5 r n"], reverse: bool) -> Float[Tensor, "5 n"]:
    """The statistics of the whole vocabulary from those of its parts."""
    log_p, log_q, difference, log_whole, at_label = parts
    p, q, whole = (x.logsumexp(0) for x in (log_p, log_q, log_whole))
    share = (log_p - p if reverse else log_q - q).exp()  # of the distribution, what lies in this part
    return torch.stack([p, q, (share * difference).sum(0), whole, at_label.sum(0)])


@triton.jit
@no_type_check
def _statistics(
    student, teacher, labels, out, count, student_stride, teacher_stride, inverse_temperature,
    COLUMNS: tl.constexpr, TOKENS: tl.constexpr, REVERSE: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For the token of this program, with temperature T and over this rank's columns:

    0. log sum exp(z / T) of the student's logits z;
    1. the same of the teacher's, y;
    2. the mean of (y - z) / T under the teacher's distribution, or of (z - y) / T under the student's if `REVERSE`;
    3. log sum exp(z), padding included;
    4. z at the label, 0 if it is on another rank.
    """
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    lowest = -3.0e38  # minus infinity, but for that its difference from itself is 0
    p_top, p_sum, q_top, q_sum, difference, top, total = lowest, 0.0, lowest, 0.0, 0.0, lowest, 0.0
    for start in range(0, TOKENS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < TOKENS
        whole = tl.load(student + column, mask=inside, other=-float("inf")).to(tl.float32)
        z = whole * inverse_temperature
        y = tl.load(teacher + column, mask=inside, other=-float("inf")).to(tl.float32) * inverse_temperature
        new_p, new_q = tl.maximum(p_top, tl.max(z, 0)), tl.maximum(q_top, tl.max(y, 0))
        p, q = tl.exp(z - new_p), tl.exp(y - new_q)
        p_shrinks, q_shrinks = tl.exp(p_top - new_p), tl.exp(q_top - new_q)
        p_sum = p_sum * p_shrinks + tl.sum(p, 0)
        q_sum = q_sum * q_shrinks + tl.sum(q, 0)
        if REVERSE:
            difference = difference * p_shrinks + tl.sum(tl.where(p > 0, p * (z - y), 0.0), 0)
        else:
            difference = difference * q_shrinks + tl.sum(tl.where(q > 0, q * (y - z), 0.0), 0)
        p_top, q_top = new_p, new_q
        if SCALED:
            new = tl.maximum(top, tl.max(whole, 0))
            total = total * tl.exp(top - new) + tl.sum(tl.exp(whole - new), 0)
            top = new
    if not SCALED:
        top, total = p_top, p_sum
    for start in range(TOKENS, COLUMNS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        whole = tl.load(student + column, mask=column < COLUMNS, other=-float("inf")).to(tl.float32)
        new = tl.maximum(top, tl.max(whole, 0))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(whole - new), 0)
        top = new
    weight = p_sum if REVERSE else q_sum
    label = tl.load(labels + row)
    out += row
    tl.store(out, p_top + tl.log(p_sum))
    tl.store(out + count, q_top + tl.log(q_sum))
    tl.store(out + 2 * count, tl.where(weight > 0, difference / weight, 0.0))
    tl.store(out + 3 * count, top + tl.log(total))
    tl.store(out + 4 * count, tl.load(student + label, mask=label >= 0, other=0.0).to(tl.float32))


@triton.jit
@no_type_check
def _gradient(
    student, teacher, labels, mask, statistics, divergence, count, student_stride, teacher_stride, inverse_temperature,
    kd_scale, ce_scale,
    COLUMNS: tl.constexpr, TOKENS: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`mask (kd_scale grad + ce_scale (softmax(z) - onehot))` in the place of z, one block of one token per program.

    The gradient is p - q, or p ((z - y) / T - log_p + log_q - KL) if `REVERSE`, and nothing for padding.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    weight = tl.broadcast_to(tl.load(mask + row), [BLOCK])
    log_p, log_q = tl.load(statistics + row), tl.load(statistics + count + row)
    inside = column < COLUMNS
    student += row * student_stride + column
    whole = tl.load(student, mask=inside & (weight != 0), other=0.0).to(tl.float32)
    token = column < TOKENS
    y = tl.load(teacher + row * teacher_stride + column, mask=token & (weight != 0), other=0.0).to(tl.float32)
    z, y = whole * inverse_temperature, y * inverse_temperature
    p = tl.exp(z - log_p)
    if REVERSE:
        grad = tl.where(p > 0, p * (z - y - (log_p - log_q) - tl.load(divergence + row)), 0.0)
    else:
        grad = p - tl.exp(y - log_q)
    grad = tl.where(token, grad * kd_scale, 0.0)
    if ce_scale != 0:
        probability = tl.exp(whole - tl.load(statistics + 3 * count + row))
        grad += ce_scale * (probability - tl.where(column == tl.load(labels + row), 1.0, 0.0))
    tl.store(student, tl.where(weight != 0, weight * grad, 0.0).to(student.dtype.element_ty), mask=inside)
