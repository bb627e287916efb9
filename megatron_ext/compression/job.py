"""`megatron-ext compress`: a Hugging Face model in, a smaller one out."""

import argparse
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ext import workflow
from megatron_ext.checkpoint.outputs import check_writable, hold_run
from megatron_ext.compression.options import SPLIT
from megatron_ext.compression.recipe import NAME, Recipe
from megatron_ext.compression.stages import DISTILLED, LONGEST, Request, batch_of, stages
from megatron_ext.errors import ConfigError

if TYPE_CHECKING:
    from megatron_ext.compression.checks import Preflight

WITH_A_RECIPE = ("to", "tokens", "data", "data_path", "split", "seq_length", "global_batch_size", "processes")


def main(args: argparse.Namespace) -> None:
    """Run what is not done yet, and report.

    Raises:
        ConfigError, CheckpointError, DataError, PlanError: Something is wrong; nothing has been started.
        StageError: A command failed; says where its log is.
    """
    if "RANK" in os.environ:
        raise ConfigError(
            "compress starts the ranks itself",
            got=f"RANK={os.environ['RANK']}",
            legal="--processes N, or --launcher WORDS",
        )
    out: Path = args.out
    recipe, preflight = (_replayed(args), None) if args.recipe is not None else _asked(args)
    model = args.model or recipe.model
    launcher = shlex.split(args.launcher) if args.launcher else list(recipe.launcher)
    todo = recipe.at(model, out)
    _check_place(out, recipe)
    if args.dry_run:
        _show(todo, launcher, preflight)
        return
    out.mkdir(parents=True, exist_ok=True)
    hold_run(out)
    if not (out / NAME).is_file():
        recipe.write(out / NAME)
    from rich.console import Console

    from megatron_ext.compression.report import collect, headline, write

    console = Console()
    seconds = workflow.run(todo, out, launcher, console)
    found = collect(model, out, seconds)
    write(out, found, todo, launcher)
    console.print(f"\n[bold]{headline(found)}.[/bold]\n{out / 'report.md'}", highlight=False, soft_wrap=True)


def _asked(args: argparse.Namespace) -> tuple[Recipe, "Preflight"]:
    """The recipe of a command line, and what it is about."""
    if args.model is None or args.tokens is None:
        raise ConfigError("no model, or no budget of tokens", legal="compress MODEL --to 0.5 --tokens 2B --out DIR")
    if args.to is None and not any(word.startswith("--prune-") for word in args.megatron_flags):
        raise ConfigError("no target given", legal="--to 0.5, --to 4B, or flags --prune-*")
    if args.data and args.data_path:
        raise ConfigError("two kinds of data given", got="--data and --data-path", legal="one of them")
    for path in args.data or ():
        if not path.exists():
            raise ConfigError("--data: no such file or directory", got=path)
    from megatron_ext.compression import checks

    original = checks.architecture(args.model)
    ranks = _processes(args)
    sequence = args.seq_length or min(original.max_position_embeddings, LONGEST)
    batch = args.global_batch_size or batch_of(args.tokens, sequence, ranks)
    flags = [*_precision(args), *args.megatron_flags]
    request = Request(
        args.model, args.out, args.to, args.tokens, tuple(args.data or ()), tuple(args.data_path or ()),
        args.split or SPLIT, sequence, batch, original.num_parameters(), tuple(args.tasks), args.verify, tuple(flags),
    )  # fmt: skip
    words = [
        "--seq-length", str(sequence), "--global-batch-size", str(batch),
        "--train-iters", str(request.steps), "--lr", "1e-4",
    ]  # fmt: skip
    preflight = checks.preflight(original, args.to, flags, words, ranks)
    launcher = shlex.split(args.launcher) if args.launcher else workflow.torchrun(ranks)
    return Recipe.of(args.model, args.out, launcher, stages(request)), preflight


def _replayed(args: argparse.Namespace) -> Recipe:
    """The recipe of a file."""
    given = [f"--{name.replace('_', '-')}" for name in WITH_A_RECIPE if getattr(args, name) is not None]
    given += [word for word in args.megatron_flags if word.startswith("--")]
    given += [flag for flag, value in (("--tasks", args.tasks), ("--verify", args.verify)) if value]
    if given:
        raise ConfigError(
            "the recipe says this", got=", ".join(given), legal="edit the recipe; or these flags, and no --recipe"
        )
    recipe = Recipe.read(args.recipe)
    model = args.model or recipe.model
    if not model.exists():
        raise ConfigError("no such model", got=model, legal="a Hugging Face directory")
    return recipe


def _processes(args: argparse.Namespace) -> int:
    if args.processes is not None:
        if args.processes < 1:
            raise ConfigError("--processes", got=args.processes, legal="1 or more")
        return args.processes
    import torch

    return max(1, torch.cuda.device_count())


def _precision(args: argparse.Namespace) -> list[str]:
    """bfloat16 on GPUs, unless a precision is said."""
    from megatron_ext.platform import device_type

    said = {"--bf16", "--fp16"} & set(args.megatron_flags)
    return [] if said or device_type() == "cpu" else ["--bf16"]


def _check_place(out: Path, recipe: Recipe) -> None:
    """Check that a directory can be this compression's: a new one, or one of the same recipe.

    Raises:
        ConfigError: It is of something else, or nothing can be written there.
    """
    path = out / NAME
    if path.is_file():
        if Recipe.read(path) != recipe:
            legal = f"--out NEW_DIRECTORY, or --recipe {path} to go on with it as it is there"
            raise ConfigError("this directory holds another compression", got=path, legal=legal)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError("this directory is not empty and no compression", got=out, legal="--out NEW_DIRECTORY")
    check_writable(out, "--out")


def _show(todo: list[workflow.Stage], launcher: list[str], preflight: "Preflight | None") -> None:
    """Print the commands, and what is known of the models, of memory and of time."""
    for stage in todo:
        done = " (done)" if stage.done else ""
        print(f"# {stage.title}{done}\n{workflow.command(stage, launcher)}\n")
    if preflight is None:
        return
    from megatron_ext.training.dry_run import shown

    before, after = (arch.num_parameters() for arch in (preflight.original, preflight.target))
    steps = next(stage.steps for stage in todo if stage.directory.name == DISTILLED)
    tokens = steps * preflight.layout.tokens
    print(f"parameters:     {before:,} to {after:,} ({after / before:.0%})")
    print(f"distillation:   {steps:,} steps of {preflight.layout.tokens:,} tokens, {tokens:,} in all")
    print(f"memory per GPU: {shown(preflight.memory)}")
    hours, gpus = preflight.seconds("h100") * steps / 3600, preflight.layout.gpus
    print(f"time:           {hours:,.2f} h of distillation on {gpus} H100 at 45% of their peak (estimated)")
