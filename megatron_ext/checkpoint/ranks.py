"""The processes that work on one checkpoint together: those of the default process group, or this one alone."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from megatron_ext.errors import CheckpointError


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


def balance_by_size(sizes: Sequence[int]) -> list[int]:
    """For each of these pieces of work the process that does it, so that all have about as much; the largest first."""
    loads = [0] * count()
    owners = [0] * len(sizes)
    for piece in sorted(range(len(sizes)), key=lambda piece: -sizes[piece]):
        owners[piece] = loads.index(min(loads))
        loads[owners[piece]] += sizes[piece]
    return owners


@contextmanager
def joined() -> Iterator[None]:
    """Let what torchrun started work together inside the block, over gloo."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized()
    if not alone:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        if not alone:
            dist.destroy_process_group()


@contextmanager
def all_or_none() -> Iterator[None]:
    """End the block on all processes, or raise on all of them, so that none waits for one that failed."""
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    others = [other for other in gather(None if problem is None else str(problem)) if other is not None]
    if problem is not None:
        raise problem
    if others:
        raise CheckpointError(f"another process could not write its part: {others[0]}")
