"""A process group over processes that are not all in one default group, which torch has no public call for."""

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


def rendezvous(host: str, port: int, timeout: timedelta) -> Any:
    """A client of the store that the default group of rank 0, or torchrun's agent, keeps."""
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)  # type: ignore[reportPrivateImportUsage]


def prefix_store(name: str, store: Any) -> Any:
    """A part of the store that others do not see."""
    return c10d.PrefixStore(name, store)


def form_group(name: str, store: Any, rank: int, size: int, backend: str, timeout: timedelta) -> Any:
    """A group in which this process is `rank` of `size`, whatever it is in its default group.

    Collectives and point-to-point calls take it as `group`; peers are numbered as in the group.
    """
    group, _ = c10d._new_process_group_helper(size, rank, [], backend, prefix_store(name, store), name, timeout=timeout)  # type: ignore[arg-type]
    c10d._world.pg_group_ranks[group] = {i: i for i in range(size)}
    return group


def new_meeting_place(name: str, host: str, port: int, rank: int, timeout: timedelta) -> int:
    """The port of one more store, which rank 0 keeps until it ends; every rank must ask for it.

    It is a free one that the system gives, and the others learn of it in the store that all ranks have: torchrun's
    agent's, or the one that rank 0 is to keep at `port` for its process groups, and keeps from now on.

    Args:
        name: What it is for.
        host: Where rank 0 is.
        port: Of the store that all ranks have.
        rank: This one's number.
        timeout: How long to wait for the others.
    """
    first = rank == 0
    keeps = first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    known = dist.TCPStore(host, port, is_master=keeps, wait_for_workers=False, timeout=timeout, multi_tenant=True)  # type: ignore[reportPrivateImportUsage]
    if first:
        own = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)  # type: ignore[reportPrivateImportUsage]
        _kept.extend([known, own])
        known.set(name, str(own.port))
    return int(known.get(name))


_kept: list[Any] = []
"""Stores that others still read; a server ends with its object."""
