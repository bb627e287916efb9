"""SIGTERM and Ctrl-C end every job well, under torchrun too, and a failure is told whichever rank it happens on."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest
from workspace import MODEL, ROOT, TRAIN, Workspace

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.outputs import contents

OURS = ["-m", "megatron_ext", "torchrun"]
TORCHRUN = ["-m", "torch.distributed.run"]
TWO_RANKS = ["--standalone", "--nproc-per-node", "2"]
ENDLESS = ["--train-iters", "100000", "--save-interval", "100000", "--eval-interval", "100000"]
PROGRAM = str(ROOT / "tests/support/waiting.py")


@contextmanager
def started(workspace: Workspace, command: list[str], **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Python command of its own session in the workspace, which does not outlive the test."""
    ours = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}
    for file in workspace.path.glob("waiting.*"):
        file.unlink()
    with (workspace.path / "output").open("w") as output:
        run = subprocess.Popen(
            [sys.executable, *command], cwd=workspace.path, env=os.environ | ours | environment,
            stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        yield run
    finally:
        run.terminate()
        run.wait()


def ended(workspace: Workspace, run: subprocess.Popen[bytes]) -> tuple[int, str]:
    """Its exit status and all that it said."""
    status = run.wait()
    return status, (workspace.path / "output").read_text()


def until_waiting(workspace: Workspace, run: subprocess.Popen[bytes], ranks: int) -> None:
    while len(list(workspace.path.glob("waiting.*"))) < ranks:
        assert run.poll() is None, ended(workspace, run)[1][-3000:]
        time.sleep(0.1)


@pytest.mark.slow
def test_a_step_may_take_longer_than_torchrun_waits(workspace: Workspace) -> None:
    """torchrun kills ranks 30 seconds after a signal; the step here, its second, goes on for 35."""
    flags = [*MODEL, *workspace.data, *TRAIN, *ENDLESS, "--save", "patient"]
    with started(workspace, [*OURS, *TWO_RANKS, PROGRAM, *flags], WAIT_AT="2", WAIT_SECONDS="35") as run:
        until_waiting(workspace, run, ranks=2)
        run.send_signal(signal.SIGTERM)
        status, output = ended(workspace, run)
    assert status == 0, output[-3000:]
    assert layout.find(workspace.path / "patient").iteration == 2
    assert [step["step"] for step in workspace.metrics("patient")] == [1, 2]
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("launcher", "number", "measures"),
    [(OURS + TWO_RANKS, signal.SIGTERM, False), ([], signal.SIGINT, False), ([], signal.SIGTERM, True)],
)
def test_before_there_is_anything_to_save_a_signal_ends_the_job_at_once(
    workspace: Workspace, teacher: str, launcher: list[str], number: signal.Signals, measures: bool
) -> None:
    """While data sets are built, which takes minutes for a large corpus, and in an evaluation."""
    flags = [*MODEL, *workspace.data, *TRAIN, *ENDLESS, "--save", f"early-{number.name}"]
    if measures:
        flags = ["--skip-train", "--pretrained-checkpoint", teacher, *workspace.data, "--save-interval", "1"]
    with started(workspace, [*launcher, PROGRAM, *flags], WAIT_AT="data", WAIT_SECONDS="1000") as run:
        until_waiting(workspace, run, ranks=2 if launcher else 1)
        run.send_signal(number)
        status, output = ended(workspace, run)
    assert status == (128 + number if launcher else -number), output[-3000:]
    assert "Traceback" not in output
    assert not launcher or "stopped before the first step" in output


@pytest.mark.parametrize("launcher", [OURS, TORCHRUN])
def test_what_only_another_rank_can_see_is_said(workspace: Workspace, launcher: list[str]) -> None:
    """Rank 1 runs where the data are not, as on a node whose disk is not mounted."""
    flags = [*MODEL, *workspace.data, *TRAIN, *ENDLESS, "--save", str(workspace.path / "one-sided")]
    program = [*launcher, *TWO_RANKS, PROGRAM, *flags]
    with started(workspace, program, ELSEWHERE="1", WAIT_AT="2", WAIT_SECONDS="0") as run:
        status, output = ended(workspace, run)
    lines = output.splitlines()
    if launcher is OURS:
        assert status == 2
        assert lines[-3].startswith("error: rank 1: --tokenizer-model: no such tokenizer")
        assert "Traceback" not in output
    else:  # torchrun's own status and summary, which has our words
        assert status == 1
        assert any(line.startswith("error (rank 1): --tokenizer-model: no such tokenizer") for line in lines)
        assert any("traceback : error: --tokenizer-model: no such tokenizer" in line for line in lines)
    save = workspace.path / "one-sided"  # rank 0 found nothing wrong, if it came so far
    assert not save.exists() or not contents(save)


@pytest.mark.parametrize("launcher", [OURS, TORCHRUN])
def test_ranks_save_and_end_when_what_started_them_is_killed(workspace: Workspace, launcher: list[str]) -> None:
    name = f"orphans-{launcher[-1]}"
    flags = [*MODEL, *workspace.data, *TRAIN, *ENDLESS, "--save", name]
    with started(workspace, [*launcher, *TWO_RANKS, PROGRAM, *flags], WAIT_AT="2", WAIT_SECONDS="2") as run:
        until_waiting(workspace, run, ranks=2)
        ranks = [child for child in psutil.Process(run.pid).children(recursive=True) if PROGRAM in child.cmdline()]
        assert len(ranks) == 2
        run.kill()
        _, alive = psutil.wait_procs(ranks, timeout=60)
        for child in alive:
            child.kill()
    assert alive == []
    assert layout.find(workspace.path / name).iteration == 2
    assert [step["step"] for step in workspace.metrics(name)] == [1, 2]
