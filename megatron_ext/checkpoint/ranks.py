"""The processes that work on one checkpoint together: those of the default process group, or this one alone."""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist


def rank() -> int:
    """This process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """How many they are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather[T](value: T) -> list[T]:
    """The values of all processes, in order, on each of them. A collective."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def shares(sizes: Sequence[int]) -> list[int]:
    """For each of these pieces of work the process that does it, so that all have about as much; the largest first."""
    loads = [0] * count()
    owners = [0] * len(sizes)
    for piece in sorted(range(len(sizes)), key=lambda piece: -sizes[piece]):
        owners[piece] = loads.index(min(loads))
        loads[owners[piece]] += sizes[piece]
    return owners
