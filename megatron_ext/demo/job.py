"""The newcomer's ten minutes: the product's own commands, one after the other, on whatever machine this is.

A hybrid model is trained on the Python standard library, cut to half its parameters, and distilled back; the control is
the same small model trained from scratch on the same tokens. Nothing here is special: each step is a command that is
printed before it runs, and the report says what was measured, whichever way it comes out.
"""

import argparse
import json
import math
import os
import platform as host
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from megatron_ext.checkpoint.atomic import write_text
from megatron_ext.data.corpus import build_dataset
from megatron_ext.errors import ConfigError, MegatronExtError
from megatron_ext.reports.metrics_file import read_metrics
from megatron_ext.reports.progress import Progress
from megatron_ext.reports.provenance import git_commit, versions

PROCESSES = 2
SEQUENCE, BATCH = 256, 8
TEACHER_STEPS, STUDENT_STEPS = 240, 160
EVAL_BATCHES = 8  # of the validation split, while training
SETTINGS = {"teacher_steps": TEACHER_STEPS, "student_steps": STUDENT_STEPS, "sequence": SEQUENCE, "batch": BATCH}


class Stopped(SystemExit):
    """SIGTERM or Ctrl-C came: the command that runs saves what it has, and the demo can go on from there."""


class DemoError(MegatronExtError):
    """A command of the demo failed."""


@dataclass(frozen=True)
class Stage:
    """One command of the demo.

    Attributes:
        title: What it does, for people.
        directory: Its run directory (`--save`).
        script: The entry point.
        flags: Its command line.
        steps: Training steps, 0 for commands that do not train.
    """

    title: str
    directory: Path
    script: str
    flags: list[str]
    steps: int = 0

    @property
    def done(self) -> bool:
        """Whether an earlier demo finished it."""
        if self.steps:
            metrics = self.directory / "metrics.jsonl"
            return (self.directory / f"iter_{self.steps:07d}" / "metadata.json").is_file() and metrics.is_file()
        return (self.directory / "results.json").is_file() or (self.directory / "plan.json").is_file()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `megatron-ext demo`."""
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="run directory (default: %(default)s)")


def main(args: argparse.Namespace) -> None:
    """Run what is not done yet, then write and print the report.

    Raises:
        ConfigError: The directory is of a demo with other settings, or the entry points are not where they belong.
        DemoError: A command failed; says where its log is.
    """
    signal.signal(signal.SIGTERM, lambda *_: _stop(signal.SIGTERM))
    signal.signal(signal.SIGINT, lambda *_: _stop(signal.SIGINT))
    console = Console()
    out: Path = args.out
    _claim(out)
    started = time.monotonic()
    console.print("[bold]A hybrid Mamba-2/attention model: trained, halved, distilled back, and measured.[/bold]")
    if not (out / "data" / "manifest.json").is_file():
        console.print("\n$ megatron-ext data --out " + str(out / "data"), highlight=False, soft_wrap=True)
        build_dataset(out / "data")
    seconds = _seconds(out)
    for stage in stages(out):
        if stage.done:
            console.print(f"\n{stage.title}: already there, in {stage.directory}")
            continue
        seconds[stage.directory.name] = _run(stage, console)
        write_text(out / "seconds.json", json.dumps(seconds))
    from megatron_ext.demo.report import headline, write_report

    report = collect(out, seconds)
    write_report(out, report)
    console.print(f"\n[bold]{headline(report)}.[/bold]\n", highlight=False, soft_wrap=True)
    for name in ("teacher", "pruned", "distilled", "scratch"):
        row = report[name]
        console.print(
            f"  {name:<10} {row['params']:>10,} parameters   validation loss {row['val_loss']:.3f}   "
            f"{row['tokens']:>9,} tokens   {row['seconds']:>4.0f} s",
            highlight=False,
            soft_wrap=True,
        )
    console.print(
        f"\n{time.monotonic() - started:.0f} s in all. {out / 'report.md'}, {out / 'report.png'}", soft_wrap=True
    )


def stages(out: Path) -> list[Stage]:
    """The commands of the demo, in order."""
    manifest = json.loads((out / "data" / "manifest.json").read_text())
    data = [
        "--data-path", str(out / "data" / "text_document"),
        "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(out / "data" / "tokenizer"),
        "--make-vocab-size-divisible-by", str(manifest["vocab_divisor"]),
        "--split", "96,4,0", "--seq-length", str(SEQUENCE),
        "--micro-batch-size", str(BATCH // PROCESSES), "--global-batch-size", str(BATCH),
    ]  # fmt: skip

    def training(steps: int, lr: str) -> list[str]:
        return [
            "--train-iters", str(steps), "--lr", lr, "--min-lr", "1e-4", "--lr-decay-style", "cosine",
            "--lr-warmup-iters", "20", "--weight-decay", "0.1", "--adam-beta2", "0.95", "--clip-grad", "1.0",
            "--eval-interval", "40", "--eval-iters", str(EVAL_BATCHES), "--save-interval", "80",
        ]  # fmt: skip

    def train(name: str, title: str, script: str, flags: list[str], steps: int, lr: str = "2e-3") -> Stage:
        save = str(out / name)
        return Stage(
            title, out / name, script, [*flags, *data, *training(steps, lr), "--load", save, "--save", save], steps
        )

    def measure(name: str) -> Stage:
        # All four are measured the same way: on every sequence of the validation split.
        flags = ["--skip-train", "--pretrained-checkpoint", str(out / name), *data]
        directory = out / "validation" / name
        return Stage(
            f"measure {name}",
            directory,
            "pretrain_hybrid.py",
            [*flags, "--save", str(directory), "--save-interval", "1"],
        )

    teacher, pruned = str(out / "teacher"), str(out / "pruned")
    return [
        train("teacher", "train the teacher", "pretrain_hybrid.py", ["--preset", "tiny-hybrid"], TEACHER_STEPS),
        Stage(
            "halve it", out / "pruned", "prune_gpt.py",
            ["--load", teacher, "--save", pruned, "--prune-target-params", "0.5", "--prune-samples", "128", *data],
        ),
        train(
            "distilled", "distil the teacher into the half", "distill_gpt.py",
            ["--distill-teacher", teacher, "--pretrained-checkpoint", pruned], STUDENT_STEPS,
        ),
        train("scratch", "train the same half from scratch", "pretrain_hybrid.py", ["--preset", pruned], STUDENT_STEPS),
        *(measure(name) for name in ("teacher", "pruned", "distilled", "scratch")),
    ]  # fmt: skip


def collect(out: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """The report's numbers, from what the commands left in their run directories."""
    from megatron_ext.checkpoint.resume import architecture_on_disk

    report: dict[str, Any] = {}
    for name in ("teacher", "pruned", "distilled", "scratch"):
        architecture = architecture_on_disk(out / name)
        results = json.loads((out / "validation" / name / "results.json").read_text())
        metrics = out / name / "metrics.jsonl"
        history = read_metrics(metrics) if metrics.is_file() else []
        trained = sum(step["seconds"] for step in history)
        tokens = int(history[-1]["tokens"]) if history else 0
        report[name] = {
            "params": architecture.num_parameters(),
            "non_embedding_params": architecture.num_parameters(embedding=False),
            "val_loss": math.nan if results["val_loss"] is None else results["val_loss"],
            "tokens": tokens,
            "seconds": trained or seconds.get(name, 0.0),
            "tokens_per_second": tokens / trained if trained else 0,
            "pattern": architecture.pattern,
            "history": [{k: step[k] for k in ("tokens", "loss", "val_loss") if k in step} for step in history],
        }
        report["validation"] = {
            "split": "validation",
            "tokens": results.get("validation", {}).get("tokens"),
            "sequences": results.get("validation", {}).get("sequences"),
            "tokens while training": EVAL_BATCHES * BATCH * SEQUENCE,
        }
    report["settings"] = SETTINGS | {"processes": PROCESSES, "commit": git_commit()}
    report["versions"] = versions()
    report["machine"] = {"system": host.platform(), "processor": _processor(), "cores": os.cpu_count()}
    return report


def _stop(number: signal.Signals) -> NoReturn:
    raise Stopped(128 + number)


def _claim(out: Path) -> None:
    settings = out / "settings.json"
    if settings.is_file() and json.loads(settings.read_text()) != SETTINGS:
        raise ConfigError("this directory holds a demo with other settings", got=out, legal="--out NEW_DIRECTORY")
    if not settings.is_file() and out.exists() and any(out.iterdir()):
        raise ConfigError("this directory is not empty and no demo", got=out, legal="--out NEW_DIRECTORY")
    out.mkdir(parents=True, exist_ok=True)
    write_text(settings, json.dumps(SETTINGS))


def _seconds(out: Path) -> dict[str, float]:
    path = out / "seconds.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _run(stage: Stage, console: Console) -> float:
    """Run one command under torchrun with live progress; its wall time in seconds."""
    script = Path(__file__).parents[2] / stage.script
    if not script.is_file():
        raise ConfigError("the demo runs from a checkout of the repository", got=script, legal="git clone, make demo")
    log = stage.directory.parent / "logs" / f"{stage.title.replace(' ', '-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    console.print(
        f"\n$ megatron-ext torchrun --nproc-per-node {PROCESSES} {stage.script} {shlex.join(stage.flags)}",
        highlight=False,
        soft_wrap=True,
    )
    launcher = [sys.executable, "-m", "megatron_ext", "torchrun", "--standalone", "--nproc-per-node", str(PROCESSES)]
    # Spinning threads of two processes on two cores take each other's time.
    environment = os.environ | {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // PROCESSES)),
        "OMP_WAIT_POLICY": "passive",
    }
    started = time.monotonic()
    with log.open("w") as file:
        # In a session of its own: Ctrl-C on the terminal would reach it a second time.
        process = subprocess.Popen(
            [*launcher, str(script), *stage.flags], stdout=file, stderr=file, env=environment, start_new_session=True
        )
        try:
            _watch(stage, process, console)
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
    if process.returncode:
        tail = "\n    ".join(log.read_text(errors="replace").splitlines()[-15:])
        raise DemoError(
            f"{stage.title}: the command ended with status {process.returncode}; {log} ends with\n    {tail}"
        )
    return time.monotonic() - started


def _watch(stage: Stage, process: subprocess.Popen, console: Console) -> None:
    """Show the last line of the run's metrics until the process ends."""
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
            if ended:
                break
            time.sleep(1.0)
    console.print(f"  {stage.title}: {now}", highlight=False, soft_wrap=True)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return host.processor() or host.machine()
