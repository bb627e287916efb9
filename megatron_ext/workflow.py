"""Commands of this package, one after the other, each done once: what the demo and `megatron-ext compress` are made of.

Every command is printed before it runs, writes to a log of its own, and is left out when an earlier run has finished
it. Ctrl-C and SIGTERM let it save; the same workflow goes on from there.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from megatron_ext.checkpoint.atomic import write_text
from megatron_ext.errors import MegatronExtError
from megatron_ext.reports.metrics_file import read_metrics
from megatron_ext.reports.progress import Progress

PROGRAM = "megatron-ext"
STOPPED = (-signal.SIGTERM, 128 + signal.SIGTERM, 128 + signal.SIGINT)
SECONDS = "seconds.json"
"""What each finished command took, by its title."""


class Stopped(SystemExit):
    """SIGTERM or Ctrl-C came: the command that runs saves what it has, and the workflow can go on from there."""


class StageError(MegatronExtError):
    """A command of a workflow failed."""


@dataclass(frozen=True)
class Stage:
    """One command of a workflow.

    Attributes:
        title: What it does, for people; its log is named after it.
        words: The command line after `megatron-ext`.
        directory: Where its result goes.
        steps: Training steps, 0 for commands that do not train.
        output: What is in `directory` when a command that does not train is done; "": the directory itself.
        parallel: Whether it runs under the workflow's launcher.
    """

    title: str
    words: tuple[str, ...]
    directory: Path
    steps: int = 0
    output: str = "results.json"
    parallel: bool = True

    @property
    def done(self) -> bool:
        """Whether an earlier run has finished it."""
        if self.steps:
            metrics = self.directory / "metrics.jsonl"
            return (self.directory / f"iter_{self.steps:07d}" / "metadata.json").is_file() and metrics.is_file()
        return (self.directory / self.output).exists()


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """In the block SIGTERM and Ctrl-C raise `Stopped`."""
    before = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def torchrun(processes: int) -> tuple[str, ...]:
    """The launcher of a workflow on so many processes of this machine."""
    return PROGRAM, "torchrun", "--standalone", "--nproc-per-node", str(processes), "-m", "megatron_ext"


def run(stages: Sequence[Stage], out: Path, launcher: Sequence[str], console: Console) -> dict[str, float]:
    """Run what is not done yet.

    Args:
        stages: The commands.
        out: Where logs go, `logs/`.
        launcher: What comes before the words of a command that runs in parallel, such as `torchrun(2)`.
        console: Where the commands are printed.

    Returns:
        Wall time of each stage, in seconds, by its title; of one that was done before, that of then.

    Raises:
        StageError: A command failed; says where its log is, and how it ends.
        Stopped: It was told to stop, or this process was.
    """
    seconds = read_seconds(out)
    with stopping_on_signals():
        for stage in stages:
            if stage.done:
                console.print(f"\n{stage.title}: already there, in {stage.directory}", highlight=False, soft_wrap=True)
                continue
            seconds[stage.title] = _run(stage, out, launcher, console)
            write_text(out / SECONDS, json.dumps(seconds))
    return seconds


def read_seconds(out: Path) -> dict[str, float]:
    """What the stages of a workflow took that are done."""
    path = out / SECONDS
    return json.loads(path.read_text()) if path.is_file() else {}


def command(stage: Stage, launcher: Sequence[str]) -> str:
    """A stage as a person types it."""
    return shlex.join([*(launcher if stage.parallel else (PROGRAM,)), *stage.words])


def _stop(number: int, _: object) -> NoReturn:
    raise Stopped(128 + number)


def _run(stage: Stage, out: Path, launcher: Sequence[str], console: Console) -> float:
    """Run one command with live progress; its wall time in seconds."""
    log = out / "logs" / f"{re.sub(r'\W+', '-', stage.title)}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    console.print(f"\n$ {command(stage, launcher)}", highlight=False, soft_wrap=True)
    # Spinning threads of several processes on few cores take each other's time.
    processes = int(launcher[launcher.index("--nproc-per-node") + 1]) if "--nproc-per-node" in launcher else 1
    threads = max(1, (os.cpu_count() or 2) // (processes if stage.parallel else 1))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    first, *rest = [*(launcher if stage.parallel else (PROGRAM,)), *stage.words]
    # This very package, whatever else is on the path.
    words = [sys.executable, "-m", "megatron_ext", *rest] if first == PROGRAM else [first, *rest]
    started = time.monotonic()
    with log.open("w") as file:
        # In a session of its own: Ctrl-C on the terminal would reach it a second time.
        process = subprocess.Popen(words, stdout=file, stderr=file, env=environment, start_new_session=True)
        try:
            _watch(stage, process, log, console)
        except Stopped:
            console.print("stopping after this step, and saving; once more stops at once")
            try:
                process.terminate()
                process.wait()
            except Stopped:
                process.terminate()
            console.print(f"stopped; the same command goes on from here. The log: {log}", soft_wrap=True)
            raise
        finally:
            if process.poll() is None:
                process.terminate()  # the second time, nothing is waited for
                process.wait()
    if process.returncode in STOPPED or (not process.returncode and not stage.done):  # told to stop by another
        console.print(f"{stage.title}: stopped; the same command goes on from here. The log: {log}", soft_wrap=True)
        raise Stopped(128 + signal.SIGTERM)
    if process.returncode:
        tail = "\n    ".join(log.read_text(errors="replace").splitlines()[-15:])
        raise StageError(
            f"{stage.title}: the command ended with status {process.returncode}; {log} ends with\n    {tail}"
        )
    return time.monotonic() - started


def _watch(stage: Stage, process: subprocess.Popen, log: Path, console: Console) -> None:
    """Show how far the command is until it ends: its last step, or the last line that it printed."""
    metrics, now = stage.directory / "metrics.jsonl", "done"
    with Progress(stage.title, stage.steps or None) as shown:
        while True:
            ended = process.poll() is not None
            steps = read_metrics(metrics) if stage.steps and metrics.is_file() else []
            if steps:
                last = steps[-1]
                validated = [step["val_loss"] for step in steps if "val_loss" in step]
                validation = f"  validation {validated[-1]:.3f}" if validated else ""
                speed = f"{last['tokens_per_second']:,.0f} tokens/s"
                shown.update(int(last["step"]), note=f"loss {last['loss']:.3f}{validation}  {speed}")
                now = f"{last['step']}/{stage.steps}  {shown.note}"
            elif lines := log.read_text(errors="replace").splitlines()[-1:]:
                shown.update(0, note=lines[0][:60])
            if ended:
                break
            time.sleep(1.0)
    if not process.returncode:
        console.print(f"  {stage.title}: {now}", highlight=False, soft_wrap=True)
