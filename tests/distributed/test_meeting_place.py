"""Processes that a job starts meet on a port that is free, and the job's own ranks meet as if nothing had been."""

import random
import socket
from contextlib import suppress
from pathlib import Path

import fork_server
import pytest
import torch.distributed as dist

RANKS = """
import os
from datetime import timedelta
import torch
import torch.distributed as dist
from megatron_ext.platform.process_groups import new_meeting_place

rank, port = int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])
other = new_meeting_place("test", "127.0.0.1", port, rank, timedelta(seconds=60))
assert other not in (port, port + 1)
as_it_was = dict(os.environ)
for environment in ({"MASTER_PORT": str(other), "TORCHELASTIC_USE_AGENT_STORE": "True"}, as_it_was):
    os.environ.clear()
    os.environ.update(as_it_was | environment)
    dist.init_process_group("gloo")
    sum = torch.ones(1)
    dist.all_reduce(sum)
    assert sum.item() == 2
    dist.destroy_process_group()
"""


def two_free_ports() -> int:
    """The first of them."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as first, socket.socket() as second, suppress(OSError):
            first.bind(("127.0.0.1", port))
            second.bind(("127.0.0.1", port + 1))
            return port


@pytest.mark.parametrize("agent", [False, True])
def test_ranks_meet_twice(agent: bool, tmp_path: Path) -> None:
    """With torchrun's agent, which keeps a store, and without; the next port is taken."""
    port = two_free_ports()
    environment = {"MASTER_PORT": str(port)}
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", port + 1))
        taken.listen()
        if agent:
            environment["TORCHELASTIC_USE_AGENT_STORE"] = "True"
            store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        (tmp_path / "ranks.py").write_text(RANKS)
        done = fork_server.run([tmp_path / "ranks.py"], 2, environment=environment)
        if agent:
            assert store.num_keys() > 1
    assert done.returncode == 0, done.stderr[-3000:]
