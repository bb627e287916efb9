"""Attention of one more token to a cache, by its formula."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def attend(
    query: Float[Tensor, "b n d"],
    keys: Float[Tensor, "l b g d"],
    values: Float[Tensor, "l b g d"],
    position: Int[Tensor, "1"],
    scale: float | None = None,
) -> Float[Tensor, "b n d"]:
    """softmax(scale q k^T) v over the first `position` + 1 tokens of the cache, computed in float32.

    Args:
        query: The token's queries.
        keys: The cache; what lies beyond `position` does not count, whatever it is.
        values: The same of values.
        position: The token's place, at which its key and value are already kept.
        scale: 1 / sqrt(d) by default.

    Returns:
        The output of each head, in the dtype of the query.
    """
    groups, width = keys.shape[2:]
    seen = torch.arange(keys.shape[0], device=keys.device) <= position
    keys, values = (t.float().where(seen[:, None, None, None], 0.0) for t in (keys, values))
    asked = query.float().unflatten(1, (groups, -1)) * (width**-0.5 if scale is None else scale)
    scores = torch.einsum("bgkd,lbgd->bgkl", asked, keys).masked_fill(~seen, -torch.inf)
    return torch.einsum("bgkl,lbgd->bgkd", scores.softmax(-1), values).flatten(1, 2).to(query.dtype)
