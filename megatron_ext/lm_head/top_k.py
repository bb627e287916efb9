"""A teacher's likeliest next tokens, from its hidden states and output weights, without ever holding the logits."""

from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from megatron_ext.lm_head.divergences import TopK, softmax, top_k
from megatron_ext.lm_head.fused_loss import LMHead
from megatron_ext.lm_head.log_probabilities import fp32_logits
from megatron_ext.lm_head.vocab_parallel import VocabParallel


class TeacherTopK(NamedTuple):
    """What is known of each token, n = s b of them.

    Attributes:
        kept: The k likeliest entries, the likeliest first, and the rest; the same on every tensor-parallel rank.
        finite: Whether all logits were finite.
    """

    kept: TopK
    finite: Bool[Tensor, " n"]


@torch.no_grad()
def teacher_top_k(teacher: LMHead, vocabulary: VocabParallel, k: int, temperature: float) -> TeacherTopK:
    """The k likeliest entries of softmax(logits / temperature) over a vocabulary that may be split and padded.

    Args:
        teacher: What its logits are made of.
        vocabulary: This rank's columns.
        k: At most `vocabulary.vocab_size`.
        temperature: Of the distribution.
    """
    parts = []
    for logits in fp32_logits(teacher, vocabulary):
        (distribution,) = softmax(vocabulary, logits[:, : vocabulary.unpadded_columns], temperature=temperature)
        found = top_k(distribution, vocabulary, k)
        log_q, order = found.log_q.sort(dim=-1, descending=True)
        parts.append((found.index.gather(-1, order), log_q, found.log_rest, distribution.log_sum.isfinite()))
    index, log_q, log_rest, finite = (torch.cat(column) for column in zip(*parts, strict=True))
    return TeacherTopK(TopK(index, log_q, log_rest), finite)
