"""Causal attention by its definition; plain differentiable torch, in any dtype."""

import torch
from jaxtyping import Float
from torch import Tensor


def causal_attention(
    q: Float[Tensor, "b n s d"], k: Float[Tensor, "b g s d"], v: Float[Tensor, "b g s d"], scale: float
) -> Float[Tensor, "b n s d"]:
    """softmax(scale q k^T) v, each position seeing itself and what lies before it.

    Args:
        q: Queries; n / g heads that follow each other share a head of k and v.
        k: Keys.
        v: Values.
        scale: Of the scores.
    """
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = (scale * q @ k.mT).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v
