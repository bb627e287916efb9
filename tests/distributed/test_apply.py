"""Several processes apply a plan together, and what one process does is what they do."""

import signal
from dataclasses import replace
from pathlib import Path

import fork_server
import pytest
import torch
from random_models import random_scores, random_weights
from run_ranks import run_ranks

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.checkpoint.writer import writing
from megatron_ext.errors import CheckpointError
from megatron_ext.models.presets import PRESETS
from megatron_ext.pruning.apply import apply
from megatron_ext.pruning.budget import Targets
from megatron_ext.pruning.magnitude import magnitudes
from megatron_ext.pruning.plan import Plan
from megatron_ext.pruning.select import make_plan

ARCH = replace(PRESETS["tiny-hybrid"].architecture, hidden_size=64, padded_vocab_size=128)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("apply") / "source"
    with writing(path, ARCH) as writer:
        for key, tensor in random_weights(ARCH).items():
            writer.write(key, tensor.float())
    return path


def small() -> Plan:
    return make_plan(random_scores(ARCH), ARCH, Targets(hidden_size=32, ffn_hidden_size=96, num_layers=4))


def apply_together(source: Path, destination: Path) -> str:
    attachments = {"note.txt": lambda path: path.write_text(str(torch.distributed.get_rank()))}
    apply(small(), source, destination, attachments)
    return "done"


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_the_work(source: Path, tmp_path: Path, count: int) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    apply(small(), source, alone)
    assert run_ranks(apply_together, count, source, together) == ["done"] * count
    left, right = CheckpointReader(alone), CheckpointReader(together)
    assert left.shapes == right.shapes
    assert all(torch.equal(left.read(key), right.read(key)) for key in left.shapes)
    sizes = [(together / "release" / f"__{rank}_0.distcp").stat().st_size for rank in range(count)]
    assert max(sizes) < 1.5 * min(sizes)
    assert (together / "note.txt").read_text() == "0"


def measure_together(source: Path) -> dict[str, torch.Tensor]:
    return magnitudes(CheckpointReader(source), ARCH)


def test_processes_measure_magnitudes_together(source: Path) -> None:
    """Bit for bit what one does, on each of them."""
    alone = measure_together(source)
    for found in run_ranks(measure_together, 2, source):
        assert found.keys() == alone.keys()
        assert all(torch.equal(found[name], value) for name, value in alone.items())


def lose_the_disk(self: CheckpointReader, key: str, place: torch.Tensor, rows: tuple[int, int] | None = None) -> None:
    raise OSError("disk gone")


def fail_together(source: Path, destination: Path) -> str:
    if torch.distributed.get_rank() == 1:
        CheckpointReader.fill = lose_the_disk
    try:
        apply(small(), source, destination)
    except (OSError, CheckpointError) as error:
        return str(error)
    return "done"


def test_one_that_fails_stops_all(source: Path, tmp_path: Path) -> None:
    """Nobody waits for ever, and nothing appears."""
    messages = run_ranks(fail_together, 2, source, tmp_path / "out")
    assert "another process" in messages[0]
    assert all("disk gone" in message for message in messages)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from megatron_ext.checkpoint.writer import CheckpointWriter
from megatron_ext.pruning.apply import apply
from megatron_ext.pruning.plan import Plan

append, left = CheckpointWriter._append, int(sys.argv[4])
def append_and_die(self, *args):
    global left
    append(self, *args)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
CheckpointWriter._append = append_and_die
apply(Plan.load(sys.argv[1]), sys.argv[2], sys.argv[3])
"""


def test_a_killed_process_leaves_nothing_that_looks_complete(source: Path, tmp_path: Path) -> None:
    """Killed while it writes the first tensor, one in the middle, and the last: the same command then succeeds."""
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    small().save(plan)
    writes = len(small().target.pattern) * 3
    for stop in (1, writes, 2 * writes):
        done = fork_server.run_code(KILLED, plan, source, out, str(stop))
        assert done.returncode == -signal.SIGKILL
        assert not out.exists()
        for remains in tmp_path.glob(".out.*"):
            with pytest.raises(CheckpointError):
                layout.find(remains)
    assert fork_server.run_code(KILLED, plan, source, out, "-1").returncode == 0
    assert (
        CheckpointReader(out).shapes.keys()
        == CheckpointReader(apply(small(), source, tmp_path / "again")).shapes.keys()
    )
