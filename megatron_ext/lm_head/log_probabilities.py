"""Log-probabilities of given tokens, from hidden states and output weights, without ever holding the logits.

Shapes: n tokens, h hidden, v this rank's columns of the padded vocabulary.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from megatron_ext.lm_head.fused_loss import LMHead
from megatron_ext.lm_head.losses import SLICE
from megatron_ext.lm_head.softcap import softcap_
from megatron_ext.lm_head.vocab_parallel import VocabParallel, row_max
from megatron_ext.models.loss_buffers import CHUNK


@torch.no_grad()
def log_probabilities(model: LMHead, labels: Int[Tensor, " n"], vocabulary: VocabParallel) -> Float[Tensor, "2 n"]:
    """The log-probability of each label in nats, and 1 where it is the most probable token, 0 elsewhere.

    Of equally probable tokens the first counts as the most probable, as `argmax` has it. Padding has no probability.

    Args:
        model: What its logits are made of; its states may be (n, h).
        labels: The tokens that follow, numbers in the whole vocabulary.
        vocabulary: This rank's columns.
    """
    found, start = [labels.new_zeros(2, 0, dtype=torch.float32)], 0
    for logits in fp32_logits(model, vocabulary):
        found.append(_of_logits(logits, labels[start : start + len(logits)], vocabulary))
        start += len(logits)
    return torch.cat(found, dim=-1)


def fp32_logits(model: LMHead, vocabulary: VocabParallel) -> Iterator[Float[Tensor, "n v"]]:
    """The logits of all tokens in order, some at a time, for the caller to overwrite.

    As in `losses`, they are made in the model's type for a chunk of tokens, and fp32 for a slice of that.
    """
    hidden, device = model.hidden.flatten(0, -2), model.hidden.device.type
    chunk = max(1, CHUNK[device] // (vocabulary.columns * model.weight.element_size()))
    slice_ = max(1, SLICE[device] // vocabulary.columns)
    for rows in hidden.split(chunk):
        for part in (rows @ model.weight.T).split(slice_):
            logits = part.to(torch.float32, copy=True)
            softcap_(logits, model.softcap)
            yield logits


def _of_logits(
    logits: Float[Tensor, "n v"], labels: Int[Tensor, " n"], vocabulary: VocabParallel
) -> Float[Tensor, "2 n"]:
    logits[:, vocabulary.unpadded_columns :] = -torch.inf
    largest = row_max(logits)
    (top,) = vocabulary.max(largest)
    local, mine = vocabulary.local(labels)
    label = torch.where(mine, logits.gather(-1, local[:, None])[:, 0], 0.0)
    total, label = vocabulary.sum((logits - top[:, None]).exp().sum(-1), label)
    first = logits.argmax(-1) + vocabulary.first
    (minus,) = vocabulary.max(torch.where(largest == top, -first.float(), -torch.inf))
    return torch.stack([label - top - total.log(), (labels == -minus).float()])
