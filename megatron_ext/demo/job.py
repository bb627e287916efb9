"""The newcomer's ten minutes: the product's own commands, one after the other, on whatever machine this is.

A hybrid model is trained on the Python standard library, cut to half its parameters, and distilled back; the control is
the same small model trained from scratch on the same tokens. Nothing here is special: each step is a command that is
printed before it runs, and the report says what was measured, whichever way it comes out.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_ext import workflow
from megatron_ext.checkpoint.atomic import write_text
from megatron_ext.data.corpus import build_dataset
from megatron_ext.demo import real_model
from megatron_ext.errors import ConfigError
from megatron_ext.reports.metrics_file import read_metrics
from megatron_ext.reports.provenance import git_commit, machine, versions
from megatron_ext.workflow import Stage

PROCESSES = 2
SEQUENCE, BATCH = 256, 8
TEACHER_STEPS, STUDENT_STEPS = 240, 160
EVAL_BATCHES = 8  # of the validation split, while training
HALVED = "halve it"
SETTINGS = {"teacher_steps": TEACHER_STEPS, "student_steps": STUDENT_STEPS, "sequence": SEQUENCE, "batch": BATCH}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `megatron-ext demo`."""
    parser.add_argument("--out", type=Path, help="run directory (default: runs/demo, with --real runs/real_model)")
    real = "a real model, SmolLM2-135M-Instruct, in place of one that is trained first"
    parser.add_argument("--real", action="store_true", help=real)
    parser.add_argument("--gpu", action="store_true", help="with --real: more text, longer sequences, bf16, on one GPU")


def main(args: argparse.Namespace) -> None:
    """Run what is not done yet, then write and print the report.

    Raises:
        ConfigError: The directory is of a demo with other settings.
        StageError: A command failed; says where its log is.
    """
    with workflow.stopping_on_signals():
        _run(args)


def _run(args: argparse.Namespace) -> None:
    console = Console()
    if args.real:
        _run_real(args.out or Path("runs/real_model"), real_model.GPU if args.gpu else real_model.CPU, console)
        return
    if args.gpu:
        raise ConfigError("--gpu goes with --real")
    out: Path = args.out or Path("runs/demo")
    _claim(out, SETTINGS)
    started = time.monotonic()
    console.print("[bold]A hybrid Mamba-2/attention model: trained, halved, distilled back, and measured.[/bold]")
    if not (out / "data" / "manifest.json").is_file():
        console.print("\n$ megatron-ext data --out " + str(out / "data"), highlight=False, soft_wrap=True)
        build_dataset(out / "data")
    seconds = workflow.run(stages(out), out, workflow.torchrun(PROCESSES), console)
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


def _run_real(out: Path, size: real_model.Size, console: Console) -> None:
    """The same with a model that others have trained; see `real_model`."""
    _claim(out, real_model.settings(size))
    started = time.monotonic()
    console.print("[bold]SmolLM2-135M-Instruct: converted, cut, distilled back, converted back, and measured.[/bold]")
    file = real_model.model_file(console)
    sources = real_model.write_texts(out / "texts")
    launcher = workflow.torchrun(size.processes)
    workflow.run(real_model.first_stages(out, size, file), out, launcher, console)
    best = real_model.best_cut(out)
    seconds = workflow.run(real_model.last_stages(out, size, best), out, launcher, console)
    from megatron_ext.demo import real_report

    report = real_model.collect(out, size, seconds, sources)
    real_report.write_report(out, report)
    console.print(f"\n[bold]{real_report.headline(report)}.[/bold]\n", highlight=False, soft_wrap=True)
    for _, title, row in real_report.rows(report):
        console.print(f"  {row['loss']:.3f} nats per token   {title}", highlight=False, soft_wrap=True)
    for answer in report["answers"][real_model.DISTILLED][:1]:
        console.print(f"\n  {answer['prompt']}\n  {answer['text']}", highlight=False, soft_wrap=True)
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

    def train(name: str, title: str, job: str, flags: list[str], steps: int, lr: str = "2e-3") -> Stage:
        save = ["--load", str(out / name), "--save", str(out / name)]
        return Stage(title, (job, *flags, *data, *training(steps, lr), *save), out / name, steps)

    def measure(name: str) -> Stage:
        # All four are measured the same way: on every sequence of the validation split.
        flags = ["--skip-train", "--pretrained-checkpoint", str(out / name), *data]
        directory = out / "validation" / name
        words = ("pretrain", *flags, "--save", str(directory), "--save-interval", "1")
        return Stage(f"measure {name}", words, directory)

    teacher, pruned = str(out / "teacher"), str(out / "pruned")
    return [
        train("teacher", "train the teacher", "pretrain", ["--preset", "tiny-hybrid"], TEACHER_STEPS),
        Stage(
            HALVED,
            ("prune", "--load", teacher, "--save", pruned, "--prune-target-params", "0.5", "--prune-samples", "128",
             *data),
            out / "pruned", output="plan.json",
        ),
        train(
            "distilled", "distil the teacher into the half", "distill",
            ["--distill-teacher", teacher, "--pretrained-checkpoint", pruned], STUDENT_STEPS,
        ),
        train("scratch", "train the same half from scratch", "pretrain", ["--preset", pruned], STUDENT_STEPS),
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
            "seconds": trained or seconds.get(HALVED, 0.0),
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
    report["machine"] = machine() | {"cores": os.cpu_count()}
    return report


def _claim(out: Path, own: dict[str, Any]) -> None:
    settings = out / "settings.json"
    if settings.is_file() and json.loads(settings.read_text()) != own:
        raise ConfigError("this directory holds a demo with other settings", got=out, legal="--out NEW_DIRECTORY")
    if not settings.is_file() and out.exists() and any(out.iterdir()):
        raise ConfigError("this directory is not empty and no demo", got=out, legal="--out NEW_DIRECTORY")
    out.mkdir(parents=True, exist_ok=True)
    write_text(settings, json.dumps(own))
