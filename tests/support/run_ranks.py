"""A function on several ranks that talk over gloo: `run_ranks(fn, 2, argument)` is the list of what they return."""

import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fork_server
import torch
import torch.distributed as dist

CALL = "call.pickle"


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call `fn(*args)` on `world_size` new processes in one gloo group, and return what each returned, by rank.

    Megatron is usable in them, as in the programs (`models.bootstrap.prepare`).

    Args:
        fn: A function of a module's top level. Its result must be something that `torch.save` can write.
        world_size: How many ranks.
        *args: Its arguments, picklable.
    """
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / CALL).write_bytes(pickle.dumps((fn, args)))
        done = fork_server.run([__file__, directory, str(world_size)], world_size)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return [torch.load(Path(directory) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def call(directory: Path, world_size: int) -> None:
    """What each rank does."""
    rank = int(os.environ.get("RANK", "0"))
    dist.init_process_group("gloo", init_method=f"file://{directory}/init", rank=rank, world_size=world_size)
    try:
        # Imports the test by the name that pytest gave it: `tests.distributed.test_...`.
        fn, args = pickle.loads((directory / CALL).read_bytes())
        torch.save(fn(*args), directory / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    call(Path(sys.argv[1]), int(sys.argv[2]))
