"""A process group over processes that are not all in one default group, which torch has no public call for."""

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


def rendezvous(host: str, port: int, timeout: timedelta) -> Any:
    """A client of the store that the default group of rank 0, or torchrun's agent, keeps."""
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)  # type: ignore[reportPrivateImportUsage]


def within(name: str, store: Any) -> Any:
    """A part of the store that others do not see."""
    return c10d.PrefixStore(name, store)


def form_group(name: str, store: Any, rank: int, size: int, backend: str, timeout: timedelta) -> Any:
    """A group in which this process is `rank` of `size`, whatever it is in its default group.

    Collectives and point-to-point calls take it as `group`; peers are numbered as in the group.
    """
    group, _ = c10d._new_process_group_helper(size, rank, [], backend, within(name, store), name, timeout=timeout)  # type: ignore[arg-type]
    c10d._world.pg_group_ranks[group] = {i: i for i in range(size)}
    return group
