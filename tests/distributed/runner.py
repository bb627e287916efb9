"""A function on several ranks that talk over gloo: `run_ranks(fn, 2, argument)` is the list of what they return."""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# New processes inherit the path, and import the test by the name pytest gave it: `tests.distributed.test_...`.
sys.path.append(str(Path(__file__).parents[2]))


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call `fn(*args)` on `world_size` new processes in one gloo group, and return what each returned, by rank.

    Args:
        fn: A function of a module's top level. Its result must be something that `torch.save` can write.
        world_size: How many ranks.
        *args: Its arguments, picklable.
    """
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(_rank, args=(world_size, directory, fn, args), nprocs=world_size)
        return [torch.load(Path(directory) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _rank(rank: int, world_size: int, directory: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/init", rank=rank, world_size=world_size)
    try:
        torch.save(fn(*args), Path(directory) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
