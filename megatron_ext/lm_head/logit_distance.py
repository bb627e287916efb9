"""How far the logits of a model are from another's, of which only the last states are kept."""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from megatron_ext.lm_head.fused_loss import LMHead
from megatron_ext.lm_head.softcap import softcapped

LOGITS_AT_A_TIME = 2**24  # compared in float32; of a micro-batch there may be a hundred times as many


def squared_distances(logits: Float[Tensor, "s b v"], other: LMHead, group: Any) -> Float[Tensor, "2 s b"]:
    """Of each token `||z - z'||^2` and `||z'||^2`, over the whole vocabulary. A collective of the ranks that share it.

    Args:
        logits: z, this rank's part of the vocabulary.
        other: What z' are made of, some positions at a time.
        group: The ranks.
    """
    rows = max(1, LOGITS_AT_A_TIME // logits[0].numel())
    parts = []
    for part, states in zip(logits.split(rows), other.hidden.split(rows), strict=True):
        expected = softcapped((states @ other.weight.T).float(), other.softcap)
        norms = [torch.linalg.vector_norm(value, dim=-1) for value in (part.float() - expected, expected)]
        parts.append(torch.stack(norms).square())
    squares = torch.cat(parts, dim=1)
    if group.size() > 1:
        dist.all_reduce(squares, group=group)
    return squares
