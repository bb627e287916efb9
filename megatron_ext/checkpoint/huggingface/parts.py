"""The parts of our weights that are tensors of their own elsewhere."""

from torch import Tensor

from megatron_ext.checkpoint.huggingface.family import Part
from megatron_ext.models.architecture import Architecture


def _heads(arch: Architecture, ours: Tensor) -> Tensor:
    """qkv by key/value group: its query heads, its key head, its value head. (group, head, channel, ...)"""
    return ours.view(arch.num_query_groups, -1, arch.kv_channels, *ours.shape[1:])


def query(arch: Architecture, ours: Tensor) -> Tensor:
    """The query heads of all groups."""
    return _heads(arch, ours)[:, :-2]


def key(arch: Architecture, ours: Tensor) -> Tensor:
    """The key heads."""
    return _heads(arch, ours)[:, -2]


def value(arch: Architecture, ours: Tensor) -> Tensor:
    """The value heads."""
    return _heads(arch, ours)[:, -1]


def half(number: int) -> Part:
    """The gate (0) or the up projection (1) of a gated MLP."""
    return lambda arch, ours: ours.unflatten(0, (2, -1))[number]
