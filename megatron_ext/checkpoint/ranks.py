"""The processes that work on one checkpoint together: those of the default process group, or this one alone."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from megatron_ext.errors import CheckpointError


def _meeting() -> Any:
    """`torch.distributed` where processes have met in it, else None; who has not imported torch has met nobody."""
    module = sys.modules.get("torch.distributed")
    return module if module is not None and module.is_initialized() else None


def rank() -> int:
    """This process, from 0."""
    meeting = _meeting()
    return 0 if meeting is None else meeting.get_rank()


def count() -> int:
    """How many they are."""
    meeting = _meeting()
    return 1 if meeting is None else meeting.get_world_size()


def gather[T](value: T) -> list[T]:
    """The values of all processes, in order, on each of them. A collective."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    _meeting().all_gather_object(values, value)
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
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    import torch.distributed as dist

    alone = dist.is_initialized()
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
