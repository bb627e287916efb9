"""Head merge: what is lost with a dropped query head is folded into one that stays (Minitron, arXiv 2407.14679)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ext.models.architecture import Architecture


def merge_heads(arch: Architecture, projection: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """A query/key/value projection in which each kept head is twice itself minus the dropped one of its pair.

    Keys and values are as they were; so is a head that equals the one that it takes in. Computed in at least float32.

    Args:
        arch: The model.
        projection: Weight `(qkv, hidden)` or bias `(qkv,)`: per key/value group its query heads, its key, its value.
        pairs: (kept, dropped) query heads, numbered over all groups.
    """
    per_group = arch.num_attention_heads // arch.num_query_groups
    merged = projection.clone()
    heads, new = (t.view(arch.num_query_groups, per_group + 2, arch.kv_channels, -1) for t in (projection, merged))
    exact = torch.promote_types(projection.dtype, torch.float32)
    for kept, dropped in pairs:
        own = heads[kept // per_group, kept % per_group].to(exact)
        lost = own - heads[dropped // per_group, dropped % per_group].to(exact)
        new[kept // per_group, kept % per_group] = own + lost
    return merged
